"""A recipe: stages in a row, read as a table; and the way through them, which goes on after a crash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchreg._checks import checked_state, whole_number
from torchreg._tables import render_table
from torchreg.binding.regularizer import Regularizer
from torchreg.training.session import check_regularizer, copied, rng_states, set_rng
from torchreg.training.stage import Refit, Stage, check_enabled, zeros_of

# ---------------------------------------------------------------------- a recipe


class Recipe(tuple[Stage, ...]):
    """Stages in a row: a tuple, checked; `print` shows a table.

    A recipe is changed as tuples and dataclasses are: `Recipe(*recipe[:2], Refit(500))`,
    `dataclasses.replace(recipe[1], steps=8000)`.

    Args:
        stages: one or more, in their order.
    Raises:
        TypeError: one is not a stage.
        ValueError: there is none, a `Refit` has no zeros to keep, or a stage rewinds to no earlier point.

    >>> recipe = Recipe(Pretrain(500), Regularize(4000), Refit(2000, rewind=1))
    >>> print(recipe)
    stage  name        steps  what holds
    -----  ----------  -----  -------------------------------------------------------
    1      Pretrain      500  penalty off
    2      Regularize  4,000  penalty on
    3      Refit       2,000  penalty off, zeros kept; from the weights after stage 1
    total              6,500
    """

    __slots__ = ()

    def __new__(cls, *stages: Stage) -> Recipe:
        """A recipe of these stages."""
        if not stages:
            raise ValueError("a recipe of no stages trains nothing; pass one or more, such as Regularize(4000)")
        for number, stage in enumerate(stages, start=1):
            if not isinstance(stage, Stage):
                raise TypeError(
                    f"stage {number} is {stage!r}, which is not a stage; pass Pretrain, Regularize, Sparsify or Refit, "
                    "and a recipe within a recipe as *recipe"
                )
            before = stages[number - 2] if number > 1 else None
            if isinstance(stage, Refit) and not (before and before.leaves_zeros):
                raise ValueError(
                    f"stage {number}, {stage!r}, has no zeros to keep, as {before or 'nothing'} comes before it; put a "
                    "Regularize there (or for a model that is sparse already: with Refit(n).on(reg, optimizer))"
                )
            if stage.rewind is not None and stage.rewind >= number - 1:
                raise ValueError(
                    f"stage {number}, {stage!r}, rewinds to no earlier point: without it, it starts after stage "
                    f"{number - 1}; pass the number of a stage before that, 0 for the beginning, or leave rewind out"
                )
        return super().__new__(cls, stages)

    def __getnewargs__(self) -> tuple[Stage, ...]:
        """The stages, of which a copy or a pickle is made."""
        return tuple(self)

    def repeat(self, times: int) -> Recipe:
        """The whole recipe so many times in a row; `rewind` goes on counting from the first stage of all.

        >>> Recipe(Pretrain(500), *Recipe(Regularize(400), Refit(200)).repeat(2))
        Recipe(Pretrain(steps=500), Regularize(steps=400), Refit(steps=200), Regularize(steps=400), Refit(steps=200))
        """
        return Recipe(*tuple(self) * whole_number("times", times))

    def stages(self, regularizer: Regularizer) -> Stages:
        """The stages to go through with the model of `regularizer`.

        Raises:
            TypeError: `regularizer` is not a regularizer.
            ValueError: `regularizer` is disabled, lacks a term that a stage moves, or selects a weight that cannot be
                zero.
        """
        return Stages(regularizer, self)

    def __repr__(self) -> str:
        return f"Recipe({', '.join(map(repr, self))})"

    def __str__(self) -> str:
        rows = [
            [f"{number}", type(stage).__name__, f"{stage.steps:,}", stage.description + _rewinding(stage)]
            for number, stage in enumerate(self, start=1)
        ]
        rows.append(["total", "", f"{sum(stage.steps for stage in self):,}", ""])
        return render_table(["stage", "name", "steps", "what holds"], rows, right=[2])


# ---------------------------------------------------------------------- going through it


class Stages:
    """A recipe on its way through the stages, as `Recipe.stages` returns it.

    An iterator over the stages to come. A stage is done once the next one is asked for. One that an error or a `break`
    broke off begins anew the next time: from the weights and strengths that it began with, and the state that torch's
    random generators had then. With an optimizer of its own in each stage the outcome is that of a training that was
    never broken off, bit for bit.

    Attributes:
        regularizer, recipe: what it was made of.
        done: how many stages are done.

    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Linear(20, 1), torch.randn(100, 20)
    >>> reg = Regularizer(model, L1(1.0))
    >>> for stage in Recipe(Pretrain(50), Regularize(100), Refit(100)).stages(reg):
    ...     optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.05, regularizer=reg)
    ...     with stage.on(reg, optimizer):
    ...         for _ in range(stage.steps):
    ...             optimizer.zero_grad()
    ...             (model(x)[:, 0] - 2 * x[:, :5].sum(1)).square().mean().backward()
    ...             optimizer.step()
    >>> int((model.weight == 0).sum()), [round(w, 2) for w in model.weight[0, :5].tolist()]
    (15, [2.0, 2.0, 2.0, 2.0, 2.0])

    Save the state when a stage begins, and a later run goes on there:

    >>> recipe = Recipe(Pretrain(1), Regularize(2))
    >>> stages = recipe.stages(reg)
    >>> for stage in stages:
    ...     torch.save(stages.state_dict(), "stages.pt")  # and here the training of this stage
    >>> stages
    Stages(2 of 2 done)
    >>> stages = recipe.stages(reg)
    >>> stages.load_state_dict(torch.load("stages.pt", weights_only=True))
    >>> stages
    Stages(1 of 2 done)
    """

    def __init__(self, regularizer: Regularizer, recipe: Recipe) -> None:
        check_regularizer(regularizer)
        check_enabled(regularizer)
        for binding in regularizer.bindings():
            if binding.selected.computed:
                raise ValueError(
                    f"{binding.name} is computed by a parametrization, so that no zeros can be kept in it; remove the "
                    "parametrization, or exclude it from the regularizer"
                )
        for stage in recipe:
            stage.check(regularizer)
        self.regularizer, self.recipe = regularizer, recipe
        self.done = 0
        self._start: dict[str, Any] = {}  # where the next stage begins, once the first one has begun
        self._kept: dict[int, dict[str, Any]] = {}  # by stage, the model after it, to rewind to

    def __iter__(self) -> Iterator[Stage]:
        """The stages to come, each once the one before is done."""
        if not self._start:
            self._begin(self.done)
        elif self.done < len(self.recipe):
            self._put_back(self._start)
        while self.done < len(self.recipe):
            stage = self.recipe[self.done]
            if stage.rewind is not None:
                self._rewind(self._kept[stage.rewind])
            yield stage
            self._begin(self.done + 1)

    def state_dict(self) -> dict[str, Any]:
        """The point where the present stage began: numbers and tensors, for `torch.load(weights_only=True)`.

        Saved anywhere within a stage it is the same, so save it when a stage begins, or after the last.
        """
        return {"done": self.done, "start": self._start or self._point(), "kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there: model, strengths and random generators are as they were, when a stage is asked for again.

        Raises:
            TypeError: it is not a state of stages.
            ValueError: it is of another model or other terms, or of a recipe that is shorter or keeps other weights to
                rewind to; nothing has changed.
        """
        checked_state(state, ["done", "start", "kept"])
        done = whole_number("done", state["done"], least=0)
        start = dict(checked_state(state["start"], ["model", "strengths", "rng"]))
        if done > len(self.recipe):
            raise ValueError(
                f"the state has {done} stages done, and the recipe has {len(self.recipe)}; load it into the stages of "
                "its own recipe"
            )
        after = {**state["kept"], done: start["model"]}
        if missing := [f"{number}" for number in self._needed(done) if number not in after]:
            raise ValueError(
                f"the state has not kept the weights after stage {', '.join(missing)}, to which the recipe rewinds; "
                "load it into the stages of its own recipe"
            )
        theirs, ours = _shapes(start["model"]), _shapes(self.regularizer.model.state_dict())
        if theirs != ours:
            name = next(name for name in [*theirs, *ours] if theirs.get(name) != ours.get(name))
            raise ValueError(
                f"the state is of another model: it has {name} in shape {theirs.get(name)}, here it is in "
                f"{ours.get(name)}; build the model of the recipe's training"
            )
        self._put_back(start)
        self.done, self._start, self._kept = done, start, {number: after[number] for number in self._needed(done)}

    def _point(self) -> dict[str, Any]:
        """The point where the training stands."""
        regularizer = self.regularizer
        return {
            "model": copied(regularizer.model.state_dict()),
            "strengths": regularizer.state_dict(),
            "rng": rng_states(regularizer.model),
        }

    def _begin(self, done: int) -> None:
        """Keeps where the stage after `done` stages begins, and what later stages rewind to; on an error all stays."""
        start = self._point()
        after = {**self._kept, done: start["model"]}
        self.done, self._start, self._kept = done, start, {number: after[number] for number in self._needed(done)}

    def _needed(self, done: int) -> list[int]:
        """After which of the stages that are done the weights are needed yet."""
        points = {stage.rewind for stage in self.recipe[done:] if stage.rewind is not None}
        return sorted(point for point in points if point <= done)

    def _put_back(self, start: Mapping[str, Any]) -> None:
        self.regularizer.load_state_dict(start["strengths"])
        self.regularizer.model.load_state_dict(start["model"])
        set_rng(start["rng"])

    @torch.no_grad()
    def _rewind(self, model: Mapping[str, Any]) -> None:
        """The model as it was then, with the zeros of now."""
        bindings, zeros = self.regularizer.bindings(), zeros_of(self.regularizer)
        self.regularizer.model.load_state_dict(model)
        for binding, (corner, zero) in zip(bindings, zeros, strict=True):
            binding.parameter().copy_(torch.where(zero, corner, binding.parameter()))

    def __repr__(self) -> str:
        return f"Stages({self.done} of {len(self.recipe)} done)"


def _rewinding(stage: Stage) -> str:
    if stage.rewind is None:
        return ""
    return "; from the weights " + (f"after stage {stage.rewind}" if stage.rewind else "of the beginning")


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in state.items()}
