"""Hooks around each real step of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class StepHooks:
    """Calls functions before and after each real step of an optimizer, until `remove()`.

    torch fires an optimizer's hooks once for every class in its chain whose `step` it has wrapped, so they fire twice
    where a class ends in `super().step()`. The innermost call is the real step: `after` runs once, at the first post
    hook that follows a pre hook.

    Args:
        before: is called at each pre hook, the last of which is that of the real step.
        after: is called after the step.
        first: `after` runs before the post hooks that others have registered.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        after: Callable[[], object],
        before: Callable[[], object] = lambda: None,
        first: bool = False,
    ) -> None:
        self._before, self._after = before, after
        self.in_step = False
        pre = optimizer.register_step_pre_hook(self._pre_hook)
        post = optimizer.register_step_post_hook(self._post_hook)
        if first:
            optimizer._optimizer_step_post_hooks.move_to_end(post.id, last=False)  # type: ignore[attr-defined]
        self._handles = [pre, post]

    def _pre_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before()
        self.in_step = True

    def _post_hook(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.in_step:
            self.in_step = False
            self._after()

    def remove(self) -> None:
        """Takes the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()


def unwrapped_optimizer(optimizer: object) -> Optimizer:
    """The torch optimizer inside the wrappers that Accelerate, Lightning and others hand out.

    Raises:
        TypeError: there is none.
    """
    inner = optimizer
    while not (isinstance(inner, Optimizer) and hasattr(inner, "_optimizer_step_post_hooks")):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}; pass the optimizer itself"
            )
        inner = inner.optimizer
    return inner
