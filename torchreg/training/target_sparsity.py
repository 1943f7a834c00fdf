"""Target sparsity: λ moves so that training ends with a wished share of zeros."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from torchreg._checks import checked_state, nonnegative, whole_number
from torchreg._distributed import layout_of, unsharded
from torchreg._tensors import widened
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.penalties.groups import Groups
from torchreg.training.schedules import Curve

FIRST = 0.01
"""The factor to begin with: a strength that is 100 times too large starts at what would be right, not above it."""
GAIN = 3.0
"""By how much log λ answers to logit S: with 2 some networks came late to the target, with 6 λ followed the noise."""
SMOOTHING = 0.25
"""The share of a new reading in the mean that steers: batches shake S, and a small network counts in large steps."""
FASTEST = 40.0
"""The most that log λ may change by in a whole training, evenly divided: no single reading moves it far."""
SOONEST = 0.1
"""What is missing is never made up for in a smaller share of the steps: weights take time to reach zero."""
FAR = 0.05
"""An error before the finish above which the finish changes more than the last digits: it warns."""


class TargetSparsity:
    """Moves λ so that exactly the share `target` of the weights is zero when training ends.

    Call `step()` once after each `optimizer.step()`. Every few steps it reads the share S of zeros and moves the factor
    of λ, with z = log(S/(1 − S)):

        log factor += 3·[3·(z_target − z)/(steps left)·(steps since the last reading) − (z − z at the last reading)]

    S then follows dS/dt = 3·(target − S)/(time left), the cubic path from wherever it is; z is a running mean, and the
    most by which λ moves at once halves where it turns round. The factor begins at 0.01, so that the strength may be
    wrong by 100 times in either direction, and `factor` ends at what was found.

    In the last steps, the `finish`, the zeros are set: as many as wished, to the weight, the smallest |w| of all. They
    stay zero at every `step()`, and the factor is 0, so that the weights that are left train without the penalty. To
    train on after the end, call `step()` on, or `freeze_zeros`. Sharded weights are gathered for each reading, one at a
    time, so that the zeros are those of one process; every process calls `step()`.

    Args:
        regularizer: whose factors to move; a proximal optimizer carries it already.
        target: 0 < target < 1, or a curve from step to target such as `schedules.Cubic(0, 0.9, steps=8000)`.
        total_steps: the number of calls of `step()` until training ends.
        term: the only term to move and to count; None is all of them.
        groups: count groups, such as `Rows()`: target is the share of groups that are zero, and the finish takes those
            of the least root mean square. None counts weights.
        finish: the share of the steps that the finish takes.
        every: steps between two readings, each one synchronization with the device, at most total_steps/20; None is
            total_steps/200.
    Attributes:
        last_step: the number of calls of `step()`.
        sparsity: the share of zeros at the last reading.
        factor: of λ, as it was found; in the finish `reg[term].factor` is 0.
    Raises:
        TypeError: an argument is of a kind that cannot serve.
        ValueError: the target cannot be reached: out of range, or all or none of so few weights; the penalty makes no
            such zeros (L2 makes none, and a group lasso none within a group); a strength is 0; or no proximal optimizer
            carries a parameter, as a penalty in the loss makes no zeros. Nothing has changed.
    Warns:
        UserWarning: half of the steps have made hardly a zero, or the finish had to move S by more than 5 points.
    Source: Zhu and Gupta, 2017, for the cubic path.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(20, 1)
    >>> reg = Regularizer(model, L1(0.1))
    >>> optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.05, regularizer=reg)
    >>> target = TargetSparsity(reg, 0.75, total_steps=200)
    >>> x = torch.randn(100, 20)
    >>> for _ in range(200):
    ...     optimizer.zero_grad()
    ...     (model(x)[:, 0] - x[:, :5].sum(1)).square().mean().backward()
    ...     optimizer.step()
    ...     target.step()
    >>> target.sparsity, int((model.weight == 0).sum())
    (0.75, 15)
    """

    def __init__(
        self,
        regularizer: Regularizer,
        target: float | Curve,
        *,
        total_steps: int,
        term: str | None = None,
        groups: Groups | None = None,
        finish: float = 0.1,
        every: int | None = None,
    ) -> None:
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"expected a Regularizer, whose strength is to be found, got {type(regularizer).__name__}; "
                "build one: Regularizer(model, L1(1e-4))"
            )
        if term is not None and term not in regularizer.terms:
            raise ValueError(f"no term {term!r} to move; the terms are {list(regularizer.terms)}")
        if not (groups is None or isinstance(groups, Groups)):
            raise TypeError(
                f"groups={groups!r} is not a geometry; write groups=Rows() or groups=Columns(), or leave it out"
            )
        self.regularizer = regularizer
        self.total_steps = whole_number("total_steps", total_steps, least=50)
        self._target = target
        self._terms = list(regularizer.terms) if term is None else [term]
        self._groups = groups
        length = nonnegative("finish", finish, "pass the share of the steps that it takes, such as 0.1")
        if not 0 < length < 1:
            raise ValueError(f"finish={finish!r} must lie between 0 and 1; pass a share of the steps, such as 0.1")
        self._control_ends = max(total_steps - max(1, round(length * total_steps)), 1)
        self._every = max(1, total_steps // 200) if every is None else whole_number("every", every)
        if self._every > total_steps // 20:
            raise ValueError(
                f"every={every} gives fewer than 20 readings in {total_steps} steps, too few to steer by; pass "
                f"{total_steps // 20} or less"
            )
        self._check()
        self._units = sum(zero.numel() for zero in self._zeros())
        if not callable(target) and self._at(total_steps) == 0:
            raise ValueError("target=0 needs no zeros; leave TargetSparsity out, or pass a target such as 0.9")
        self._at(0)
        self._wanted = round(self._at(total_steps) * self._units)
        if not 0 < self._wanted < self._units:
            how_many = "none" if self._wanted == 0 else "all"
            raise ValueError(
                f"a target of {self._at(total_steps):g} is {how_many} of {self._units} {self._kind}; "
                "pass one that leaves some and zeroes some"
            )
        self.last_step = 0
        self.sparsity = self._read()
        self.factor = FIRST
        self._z = self._logit(self.sparsity)
        self._change, self._limit = 0.0, math.inf  # of log λ, at the last reading, and at most
        self._kept: dict[str, Tensor] = {}  # in the finish, by name: which units are held at zero
        self._set(FIRST)

    # ------------------------------------------------------------------ stepping

    @property
    def target(self) -> float:
        """The target of the present step."""
        return self._at(self.last_step)

    @torch.no_grad()
    def step(self) -> None:
        """Reads and moves λ where it is time to, and holds the zeros in the finish: after each `optimizer.step()`."""
        self.last_step += 1
        if self.last_step < self._control_ends:
            if self.last_step % self._every == 0:
                self._control()
            return
        if not self._kept:
            self._choose()
        self._hold()
        if self.last_step == self.total_steps:
            self.sparsity = self._read()
            if (zeros := round(self.sparsity * self._units)) > self._wanted:
                warnings.warn(
                    f"{zeros:,} of {self._units:,} {self._kind} are zero, {self._wanted:,} were wished: the others "
                    "have no gradient, as behind dead neurons; begin at a smaller strength, or train for longer",
                    stacklevel=3,
                )

    def _control(self) -> None:
        self.sparsity, before = self._read(), self._z
        self._z += SMOOTHING * (self._logit(self.sparsity) - before)
        passed, wished = self._every / self._control_ends, self._logit(self.target)
        left, lead = SOONEST, 0.0
        if callable(self._target):  # it gives the path: λ keeps up with it
            lead = wished - self._logit(self._at(self.last_step - self._every))
        else:
            left = max(1 - self.last_step / self._control_ends, SOONEST)
        change = GAIN * (3 * (wished - self._z) / left * passed + lead - (self._z - before))
        # Where λ turns round the next moves are smaller, so that it settles whatever S answers and how soon.
        fastest = FASTEST * passed
        turned = change * self._change < 0
        self._limit = max(self._limit / 2, fastest / 20) if turned else min(self._limit * 1.2, fastest)
        self._change = min(max(change, -self._limit), self._limit)
        self.factor *= math.exp(self._change)
        self._set(self.factor)
        half = self._control_ends // 2
        if half <= self.last_step < half + self._every and self.sparsity < self.target / 100:
            warnings.warn(
                f"half of the steps have zeroed {self.sparsity:.2%} of the {self._kind} on the way to "
                f"{self.target:.2%}, and λ's factor is {self.factor:.3g}; see that optimizer.step() comes before each "
                "step(), that the regularizer is enabled and lr above 0, or begin at a larger strength",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ the finish

    def _choose(self) -> None:
        """Decides which units are held at zero: the zeros and the smallest, or where they are too many, fewer zeros."""
        zeros, self.sparsity = self._zeros(), self._read()
        self._set(0.0)
        aim, mean = self._wanted / self._units, 1 / (1 + math.exp(-self._z))
        error = self.sparsity - aim
        if min(abs(error), abs(mean - aim)) > FAR:  # one reading alone may be the noise of a batch
            warnings.warn(
                f"the penalty had zeroed {self.sparsity:.2%} of the {self._kind} when the finish began, and the finish "
                f"makes it {aim:.2%} by size alone; train for longer, or begin at another strength: factor "
                f"{self.factor:.3g} of this one is where it stood",
                stacklevel=4,
            )
        scores = [
            self._sizes(binding, zero, too_many=error > 0)
            for binding, zero in zip(self._bindings(), zeros, strict=True)
        ]
        every_score = torch.cat([score.flatten().to(scores[0].device) for score in scores])
        chosen = torch.zeros_like(every_score, dtype=torch.bool)
        chosen[every_score.topk(self._wanted, largest=False).indices] = True
        parts = chosen.split([zero.numel() for zero in zeros])
        self._kept = {
            binding.name: part.view(zero.shape).to(zero.device)
            for binding, part, zero in zip(self._bindings(), parts, zeros, strict=True)
        }

    def _sizes(self, binding: Binding, zero: Tensor, too_many: bool) -> Tensor:
        """The score of each unit: the smallest become zero; of too many zeros, the largest gradients are released."""
        parameter, anchor = _whole(binding)
        if not too_many:
            w = parameter - anchor
        else:
            gradient = binding.parameter().grad
            w = torch.zeros_like(parameter) if gradient is None else unsharded(gradient)
        size = widened(w).abs()
        if self._groups is not None:
            size = self._groups.norms(size) / math.sqrt(self._groups.size(size))
        return torch.where(zero, size, torch.inf) if too_many else size

    def _hold(self) -> None:
        for binding in self._bindings():
            w, anchor, kept = binding.parameter(), _anchor(binding), self._kept[binding.name]
            layout = layout_of(w)
            w = layout.part(w)
            w.copy_(torch.where(layout.part(kept), layout.part(anchor), w))

    # ------------------------------------------------------------------ reading

    def _bindings(self) -> list[Binding]:
        return [binding for binding in self.regularizer.bindings() if binding.term.key in self._terms]

    def _zeros(self) -> list[Tensor]:
        """A mask for each parameter of the units that are zero; toward w₀, of those that are at w₀."""
        found = []
        for binding in self._bindings():
            w, anchor = _whole(binding)
            live = w != anchor
            if self._groups is not None:
                live = live.any(dim=self._groups.dim(live), keepdim=True)
            found.append(~live)
        return found

    def _read(self) -> float:
        counts: dict[torch.device, list[Tensor]] = {}
        for zero in self._zeros():
            counts.setdefault(zero.device, []).append(zero.count_nonzero())
        return sum(sum(torch.stack(own).tolist()) for own in counts.values()) / self._units

    def _logit(self, share: float) -> float:
        """log S/(1 − S), level where it would run away: near no zeros, and well beyond the target."""
        aim = self._wanted / self._units
        share = min(max(share, min(0.05, aim / 4)), 1 - (1 - aim) / 4)
        return math.log(share / (1 - share))

    def _at(self, step: int) -> float:
        target = self._target(step) if callable(self._target) else self._target
        share = nonnegative("target", target, "pass the share of zeros, such as 0.9")
        if share >= 1:
            raise ValueError(f"target={share!r} must be below 1: it is a share, and 0.9 means 90% zeros")
        return share

    def _set(self, factor: float) -> None:
        for term in self._terms:
            self.regularizer[term].factor = factor

    @property
    def _kind(self) -> str:
        return "weights" if self._groups is None else f"groups of {self._groups!r}"

    # ------------------------------------------------------------------ what can be reached

    def _check(self) -> None:
        """Raises where the zeros that are wished cannot come about."""
        for binding in self._bindings():
            parameter = binding.parameter()
            if binding.carrier is None:
                raise ValueError(
                    f"no proximal optimizer carries {binding.name}, and a penalty in the loss makes no zeros; build "
                    "one: tr.optim.ProxAdam(model.parameters(), regularizer=reg)"
                )
            penalty = binding.term.base.scaled(binding.scale)
            # One unit next to nothing and all others huge: does the penalty zero that one alone?
            w = torch.full(parameter.shape, 1e12, device=parameter.device)
            unit = torch.zeros(w.shape if self._groups is None else self._groups.shape(w), device=w.device).bool()
            unit.view(-1)[:1] = True
            zero = penalty.prox(torch.where(unit, 1e-12, w), 1.0) == 0
            if not bool((zero | ~unit).all()):
                what = "single weights" if self._groups is None else self._kind
                raise ValueError(
                    f"{penalty!r} of {binding.name} never zeroes {what}, whatever its factor; give a penalty that does "
                    "(L1, or GroupLasso with groups=Rows()), a strength above 0, or the term that has one: term=..."
                )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and in the finish which units are held: for `torch.load(weights_only=True)`."""
        return {
            "last_step": self.last_step,
            "factor": self.factor,
            "sparsity": self.sparsity,
            "z": self._z,
            "change": self._change,
            "limit": self._limit,
            "kept": dict(self._kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where that one stood, bit for bit.

        Raises:
            TypeError: it is not a state of a TargetSparsity.
            ValueError: it holds zeros of other parameters or shapes; nothing has changed.
        """
        checked_state(state, list(self.state_dict()))
        last_step = whole_number("last_step", state["last_step"], least=0)
        factor = nonnegative("factor", state["factor"], "load what state_dict() gave")
        numbers = [state[name] for name in ("sparsity", "z", "change", "limit")]
        kept = cast("Mapping[str, Tensor]", state["kept"])
        shapes = {binding.name: zero.shape for binding, zero in zip(self._bindings(), self._zeros(), strict=True)}
        if ({name: zero.shape for name, zero in kept.items()} or shapes) != shapes:
            raise ValueError(
                f"the state holds zeros of {list(kept)}, here are {list(shapes)}; load it into the same model"
            )
        self.sparsity, self._z, self._change, self._limit = map(float, numbers)
        self.last_step, self.factor = last_step, factor
        self._kept = {
            binding.name: kept[binding.name].to(binding.parameter().device) for binding in self._bindings() if kept
        }
        self._set(0.0 if kept else factor)

    def __repr__(self) -> str:
        return (
            f"TargetSparsity({self.target:.2%} of {self._units:,} {self._kind}, step {self.last_step} of "
            f"{self.total_steps}, {self.sparsity:.2%} zero at factor {self.factor:.3g})"
        )


def _whole(binding: Binding) -> tuple[Tensor, Tensor]:
    """The weight, and what counts as zero; gathered where it is sharded, as the smallest of all weights are wanted."""
    return unsharded(binding.parameter().detach()), unsharded(_anchor(binding))


def _anchor(binding: Binding) -> Tensor:
    """The value that counts as zero: 0, or w₀."""
    parameter = binding.parameter()
    return (
        torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        if binding.anchor is None
        else binding.anchor.to(parameter.dtype)
    )
