"""measure(): what a regularized network is doing, as a dict of plain numbers."""

from __future__ import annotations

import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchreg._checks import nonnegative
from torchreg._distributed import is_sharded, unsharded
from torchreg._tensors import Step, widened
from torchreg.binding import connectivity
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import ParameterRef
from torchreg.inspection.certificates import Stationarity
from torchreg.inspection.zero_counts import counted
from torchreg.kernels import Summary, summarize
from torchreg.optim.attachment import carriers
from torchreg.penalties import Penalty
from torchreg.penalties.group_lasso import GroupPenalty
from torchreg.penalties.groups import Columns, Rows
from torchreg.penalties.toward import Toward
from torchreg.views import tags
from torchreg.views.reading import read

NEAR_ZERO = 1e-3
_QUANTILES = (0.1, 0.5, 0.9)
_BY_WEIGHT = (
    ("sparsity", ""),
    ("sparsity_near_zero", ""),
    ("support_churn", ""),
    ("sparsity_inputs", ""),
    ("sparsity_neurons", ""),
    ("weight_norm_l1", ""),
    ("weight_norm_l2", ""),
    *(("weight_group_norm", f".p{round(100 * q)}") for q in _QUANTILES),
    ("threshold", ""),
)

_gauges: weakref.WeakKeyDictionary[Any, Gauge] = weakref.WeakKeyDictionary()
"""What `measure` remembers of each target from call to call."""


def measure(
    target: nn.Module | Regularizer,
    *,
    near_zero: float = NEAR_ZERO,
    stationarity: Stationarity | None = None,
) -> dict[str, float]:
    """Sparsity, norms, penalties and thresholds of a network as plain numbers, for any logger.

    The keys are tags, `metric/<parameter>`, in letters, digits and `_ . / -`; they stay the same from call to call.

    | key | what it is |
    |---|---|
    | `overview/sparsity` | exact zeros / weights |
    | `overview/params_kept` | the number of weights that are not 0 |
    | `overview/penalty`, `penalty/<term>` | Ω, in total and by term |
    | `schedule/lambda_<term>` | λ in force; with several strengths `schedule/lambda_<term>.<strength>` |
    | `spread/sparsity.min`, `.max` | sparsity of the least and the most sparse weight |
    | `sparsity/<p>` | the same, by weight |
    | `sparsity_near_zero/<p>`, `/total` | weights with abs(w) ≤ `near_zero`, zeros included / weights |
    | `support_churn/<p>`, `/total` | weights that became zero or nonzero since the last call for `target` / weights |
    | `sparsity_inputs/<p>`, `sparsity_neurons/<p>` | dead inputs and dead neurons, as shares |
    | `weight_norm_l1/<p>`, `weight_norm_l2/<p>` | abs(w) summed, and the square root of w² summed |
    | `weight_group_norm/<p>.p10`, `.p50`, `.p90` | quantiles of ‖w_g‖₂ over the penalty's groups, else over rows |
    | `threshold/<p>` | λ·step: the largest abs(w) that the prox of a step takes to 0, for half of the weights |
    | `stationarity/total`, `/relative`, `/rest`, `/term.<term>` | where it is given |

    A tied weight counts once. For a model there are no penalties, strengths and thresholds; 0 stands for the threshold
    of a weight on the loss route, of an empty one, of one whose adaptive optimizer has taken no step, and under
    Adafactor of one without its gradient. Sharded weights are gathered, one after the other, so every process has to
    call it. From call to call it remembers which weights were zero: a byte a weight, on its device.

    Args:
        target: a regularizer, whose selected parameters are measured, or a model, whose weights with two or more
            dimensions are (no norm layers and no embeddings).
        near_zero: what counts as nearly zero, ≥ 0, in units of a weight.
        stationarity: what `torchreg.stationarity` found, to stand among the numbers.
    Returns:
        Plain floats. Reading them waits for each device once, however many layers there are.
    Raises:
        TypeError, ValueError: `near_zero` is no number ≥ 0, `target` is neither, or it has no weights, or
            `stationarity` is that of other terms.
    Warns:
        UserWarning: a weight has entries that are NaN or infinite; once for each weight, by its name.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 2.0]]))
    >>> numbers = measure(Regularizer(model, L1(0.1)))
    >>> numbers["overview/sparsity"], numbers["sparsity_inputs/0.weight"], numbers["penalty/l1"]
    (0.625, 0.5, 0.5)
    """
    near_zero = nonnegative("near_zero", near_zero, "pass what counts as nearly zero, such as 1e-3")
    if stationarity is not None and not isinstance(stationarity, Stationarity):
        raise TypeError(
            f"stationarity is a {type(stationarity).__name__}; pass what torchreg.stationarity(reg, closure) returned"
        )
    if not isinstance(target, (nn.Module, Regularizer)):
        raise TypeError(f"expected a model or a Regularizer, got {type(target).__name__}; pass what trains")
    if target not in _gauges:
        _gauges[target] = Gauge(target)
    numbers, _ = _gauges[target].read(near_zero)
    for message in _gauges[target].broken.values():
        warnings.warn(message, stacklevel=2)
    return numbers | ({} if stationarity is None else _gauges[target].certified(stationarity))


class Gauge:
    """Measures one target again and again, and remembers which of its weights were zero the last time."""

    def __init__(self, target: nn.Module | Regularizer) -> None:
        # Weakly: what `measure` remembers must not keep alive what it is remembered for.
        self._target: Callable[[], Any] = weakref.ref(target)
        self.terms = tags.unique(target) if isinstance(target, Regularizer) else {}
        self.tags: dict[str, str] = {}
        self._keys: list[str] = []
        self._supports: dict[str, Tensor] = {}
        self._limits: dict[str, tuple[Penalty, float]] = {}
        self._told: set[str] = set()
        self.broken: dict[str, str] = {}  # by name, what the last read found for the first time not to be finite
        self.waited = 0.0  # seconds, in the last read, for the devices to catch up
        self.entries()

    def entries(self) -> list[ParameterRef]:
        """The weights as they are now."""
        entries = counted(self._target())
        names = [entry.name for entry in entries]
        if names != list(self.tags):
            self.tags = tags.unique(names)
            self._keys = [f"{metric}/{tag}{end}" for tag in self.tags.values() for metric, end in _BY_WEIGHT]
        return entries

    @torch.no_grad()
    def read(self, near_zero: float, also: Sequence[Tensor] = ()) -> tuple[dict[str, float], list[float]]:
        """The numbers of `measure`, and those of the 0-d tensors `also`, in one read of each device."""
        weights = self._weights()
        if any(is_sharded(weight.entry.parameter) for weight in weights):  # one is whole at a time
            tensors = [own for weight in weights for own in self._tensors([weight], near_zero)]
        else:
            tensors = self._tensors(weights, near_zero)
        numbers_read, self.waited = read([*itertools.chain.from_iterable(tensors), *also])
        found = iter(numbers_read)
        rows = [weight.numbers([next(found) for _ in own]) for weight, own in zip(weights, tensors, strict=True)]
        numbers = {**_overview(weights, rows), **self._by_term(weights)}
        numbers.update(zip(self._keys, itertools.chain.from_iterable(rows), strict=True))
        self.broken = {
            weight.entry.name: f"{weight.entry.name} has {weight.broken:,} NaN or infinite entries of "
            f"{weight.shape.numel():,}, and training does not mend them; go back to a checkpoint from before, and "
            "lower lr or clip the gradients"
            for weight in weights
            if weight.broken and weight.entry.name not in self._told
        }
        self._told.update(self.broken)
        return numbers, [value for [value] in found]

    def certified(self, found: Stationarity) -> dict[str, float]:
        """A certificate by its tags."""
        if strange := found.by_term.keys() - self.terms.keys():
            raise ValueError(
                f"the certificate is of the terms {sorted(strange)}, which what is measured does not have; measure the "
                "regularizer that stationarity(reg, closure) was given"
            )
        numbers = {f"stationarity/{name}": getattr(found, name) for name in ("total", "relative", "rest")}
        return numbers | {f"stationarity/term.{self.terms[key]}": value for key, value in found.by_term.items()}

    def _tensors(self, weights: Sequence[_Weight], near_zero: float) -> list[list[Tensor]]:
        """What is to be read of each weight, all in one pass over them."""
        whole = [connectivity.weights(weight.entry) for weight in weights]
        summaries = summarize(whole, near_zero, [self._supports[weight.entry.name] for weight in weights])
        return [weight.tensors(w, summary) for weight, w, summary in zip(weights, whole, summaries, strict=True)]

    def _weights(self) -> list[_Weight]:
        """The weights as they are now, with what acts on them."""
        target, entries = self._target(), self.entries()
        weights = [_Weight(entry, entry.parameter.shape) for entry in entries]
        for weight in weights:
            known, device = self._supports.get(weight.entry.name), weight.entry.parameter.device
            weight.seen = known is not None and known.shape == weight.shape and known.device == device
            if not weight.seen:
                with torch.inference_mode(False):  # one made in inference mode could not be written to after it
                    fresh = torch.zeros(weight.shape, dtype=torch.bool, device=device)
                self._supports[weight.entry.name] = fresh
        if isinstance(target, Regularizer) and target.enabled:
            steps = {id_: step for carrier in carriers(target) for id_, step in carrier.sampled_steps().items()}
            for weight, binding in zip(weights, target.bindings(), strict=True):
                weight.term, weight.penalty = binding.term.key, binding.penalty
                weight.step = steps.get(id(weight.entry.parameter), 0.0) if weight.shape.numel() else 0.0
                weight.limit = self._limit(weight) if id(weight.entry.parameter) in steps else 0.0
        return weights

    def _limit(self, weight: _Weight) -> float:
        """λ as what |gradient| must exceed to leave 0; with groups the root mean square of a group's gradient."""
        assert weight.penalty is not None
        known = self._limits.get(weight.entry.name)
        if known is None or known[0] is not weight.penalty:
            ones = torch.ones((), device="cpu").expand(
                (1,) * len(weight.shape) if weight.penalty.separable else weight.shape
            )
            try:
                norm = weight.penalty._dual_norm(ones).item()
            except NotImplementedError:  # a penalty without certificates
                norm = math.inf
            known = self._limits[weight.entry.name] = (weight.penalty, 1 / norm if norm > 0 else math.inf)
        return known[1]

    def _by_term(self, weights: Sequence[_Weight]) -> dict[str, float]:
        """Ω and λ, in total and of each term."""
        target = self._target()
        if not isinstance(target, Regularizer):
            return {}
        values = dict.fromkeys(self.terms, 0.0)
        for weight in weights:
            if weight.penalty is not None:
                values[weight.term] += weight.value
        numbers = {"overview/penalty": math.fsum(values.values())}
        for key, tag in self.terms.items():
            term = target[key]
            numbers[f"penalty/{tag}"] = values[key]
            for name, strength in term.strengths.items():
                end = f".{name}" if len(term.strengths) > 1 else ""
                numbers[f"schedule/lambda_{tag}{end}"] = strength * term.factor if target.enabled else 0.0
        return numbers


@dataclass
class _Weight:
    """One weight: the tensors to be read from its device, and the numbers that follow from them."""

    entry: ParameterRef
    shape: torch.Size
    seen: bool = False  # its support was written down before
    term: str = ""
    penalty: Penalty | None = None
    limit: float = 0.0
    step: Step = 0.0
    value: float = 0.0  # of the penalty, once it is read

    def tensors(self, w: Tensor, summary: Summary) -> list[Tensor]:
        """What is to be read, on the device of `w`: the whole weight."""
        living, self.inputs, self.neurons = _living(self.entry, w, summary)
        found = [summary.counts, summary.sums, _quantiles(_squared_norms(self.penalty, w, summary)), *living]
        if isinstance(self.step, Tensor):
            found.append(unsharded(self.step).median())
        if self.penalty is not None and self._by_sums() is None:
            found.append(unsharded(self.penalty(self.entry.parameter.detach())))
        return found

    def numbers(self, found: Sequence[Sequence[float]]) -> list[float]:
        """In the order of `_BY_WEIGHT`."""
        counts, (absolute, squares, _), quantiles, (inputs,), (neurons,), *rest = found
        self.zeros, self.near, self.broken, changed = counts
        self.changed = changed if self.seen else 0
        step = rest.pop(0)[0] if isinstance(self.step, Tensor) else self.step
        if self.penalty is not None:
            by_sums = self._by_sums(absolute, squares)
            self.value = rest.pop()[0] if by_sums is None else by_sums
        size = self.shape.numel() or 1
        return [
            self.zeros / size,
            self.near / size,
            self.changed / size,
            (self.inputs - inputs) / (self.inputs or 1),
            (self.neurons - neurons) / (self.neurons or 1),
            absolute,
            math.sqrt(squares),
            *map(math.sqrt, quantiles),
            self.limit * step if step else 0.0,
        ]

    def _by_sums(self, absolute: float = 0.0, squares: float = 0.0) -> float | None:
        """Ω by Σ|w| and Σw², where that is enough: these are of the weights that the model computes with."""
        soft = None if self.penalty is None or connectivity.masked(self.entry) else self.penalty._soft()
        return None if soft is None or soft.anchor is not None else soft.l1 * absolute + soft.l2 * squares


def _living(entry: ParameterRef, w: Tensor, summary: Summary) -> tuple[list[Tensor], int, int]:
    """How many inputs and neurons have a weight that is not 0, and how many there are, as `sparsity` counts them."""
    if w.dim() > 1 and connectivity.in_plain_order(entry.owner):
        inputs, neurons = summary.column_nonzeros, summary.row_nonzeros
    else:
        inputs, neurons = connectivity.alive_units(w != 0, entry.owner)
    return [torch.count_nonzero(inputs), torch.count_nonzero(neurons)], inputs.numel(), neurons.numel()


def _squared_norms(penalty: Penalty | None, w: Tensor, summary: Summary) -> Tensor:
    """‖w_g‖² of the groups that the penalty has, else of the rows."""
    inner = penalty.penalty if isinstance(penalty, Toward) else penalty
    groups = inner.groups if isinstance(inner, GroupPenalty) else Rows()
    if isinstance(groups, Rows):
        return summary.row_squares
    if isinstance(groups, Columns):
        return summary.column_squares
    return groups.norms(widened(w)).flatten().square()


def _quantiles(norms: Tensor) -> Tensor:
    """By nearest rank; zeros of nothing."""
    if not len(norms):
        return norms.new_zeros(len(_QUANTILES))
    ordered = norms.sort().values
    return torch.stack([ordered[math.ceil(q * len(norms)) - 1] for q in _QUANTILES])


def _overview(weights: Sequence[_Weight], rows: Sequence[Sequence[float]]) -> dict[str, float]:
    total = sum(weight.shape.numel() for weight in weights)
    zeros = sum(weight.zeros for weight in weights)
    fractions = [row[0] for row in rows]
    return {
        "overview/sparsity": zeros / (total or 1),
        "overview/params_kept": float(total - zeros),
        "sparsity_near_zero/total": sum(weight.near for weight in weights) / (total or 1),
        "support_churn/total": sum(weight.changed for weight in weights) / (total or 1),
        "spread/sparsity.min": min(fractions),
        "spread/sparsity.max": max(fractions),
    }
