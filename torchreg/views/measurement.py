"""measure(): the state of a regularized network, as a dict of plain numbers."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from torchreg.inspection.zero_counts import counted_weights
from torchreg.kernels import Summary, summarize
from torchreg.optim.attachment import carriers
from torchreg.penalties import Penalty
from torchreg.penalties.group_penalty import GroupPenalty
from torchreg.penalties.groups import Columns, Rows
from torchreg.penalties.toward import Toward
from torchreg.views import tags
from torchreg.views.reading import read

NEAR_ZERO = 1e-3

_gauges: weakref.WeakKeyDictionary[Any, Gauge] = weakref.WeakKeyDictionary()
"""The gauge of each target of `measure`, which remembers the last call."""


def measure(
    target: nn.Module | Regularizer,
    *,
    near_zero: float = NEAR_ZERO,
    stationarity: Stationarity | None = None,
) -> dict[str, float]:
    """Sparsity, norms, penalties and thresholds of a network as plain numbers, for any logger.

    The keys are tags, `metric/<parameter>`, in letters, digits and `_ . / -`; they stay the same from call to call.

    | key | meaning |
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
    | `weight_norm_l1/<p>`, `weight_norm_l2/<p>` | sum of abs(w), and square root of the sum of w² |
    | `weight_group_norm/<p>.p10`, `.p50`, `.p90` | quantiles of ‖w_g‖₂ over the groups of the penalty, else over rows |
    | `threshold/<p>` | λ·step: the prox of a step sets abs(w) up to this to 0; the median over the weights |
    | `stationarity/total`, `/relative`, `/unpenalized`, `/term.<term>` | the certificate `stationarity`, if given |

    A tied weight counts once. A model has no penalties, strengths and thresholds. The threshold is 0 for a weight that
    is regularized through the loss, for an empty one, for one whose adaptive optimizer has taken no step, and under
    Adafactor for one without its gradient. Sharded weights are gathered, one at a time, so every process has to call
    this. It remembers from call to call which weights were zero: one byte per weight, on the device of the weight.

    Args:
        target: a regularizer, whose selected parameters are measured, or a model, whose weights with two or more
            dimensions are measured (no norm layers and no embeddings).
        near_zero: the largest magnitude that counts as nearly zero, ≥ 0, in units of a weight.
        stationarity: the result of `torchreg.stationarity`, to be included in the numbers.
    Returns:
        Plain floats. Reading them waits for each device once, for any number of layers.
    Raises:
        TypeError, ValueError: `near_zero` is not a number ≥ 0, `target` is neither a regularizer nor a model or has no
            weights, or `stationarity` is a certificate of other terms.
    Warns:
        UserWarning: a weight has entries that are NaN or infinite; once for each weight, by its name.

    >>> model = nn.Sequential(nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     _ = model[0].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 2.0]]))
    >>> numbers = measure(Regularizer(model, L1(0.1)))
    >>> numbers["overview/sparsity"], numbers["sparsity_inputs/0.weight"], numbers["penalty/l1"]
    (0.625, 0.5, 0.5)
    """
    near_zero = nonnegative("near_zero", near_zero, "pass the largest magnitude that is nearly zero, such as 1e-3")
    if stationarity is not None and not isinstance(stationarity, Stationarity):
        raise TypeError(
            f"stationarity is a {type(stationarity).__name__}; pass the result of torchreg.stationarity(reg, closure)"
        )
    if not isinstance(target, (nn.Module, Regularizer)):
        raise TypeError(f"expected a model or a Regularizer, got {type(target).__name__}")
    if target not in _gauges:
        _gauges[target] = Gauge(target)
    gauge = _gauges[target]
    numbers, _ = gauge.read(near_zero)
    for message in gauge.broken.values():
        warnings.warn(message, stacklevel=2)
    return numbers | ({} if stationarity is None else gauge.certificate_numbers(stationarity))


class Gauge:
    """Measures one target repeatedly, and remembers which weights were zero at the last measurement."""

    def __init__(self, target: nn.Module | Regularizer) -> None:
        # A weak reference, since a gauge in `_gauges` must not keep its target alive.
        self._target: Callable[[], Any] = weakref.ref(target)
        self.terms = tags.unique(target) if isinstance(target, Regularizer) else {}
        self.tags: dict[str, str] = {}
        self._keys: list[list[str]] = []  # by weight, the keys of the columns
        self._supports: dict[str, Tensor] = {}
        self._limits: dict[str, tuple[Penalty, float]] = {}
        self._reported: set[str] = set()
        # By name, a message on each weight that the last read was the first to find broken.
        self.broken: dict[str, str] = {}
        self.waiting_seconds = 0.0  # the time that the last read waited for devices
        self.entries()

    def entries(self) -> list[ParameterRef]:
        """The weights as they are now."""
        entries = counted_weights(self._target())
        names = [entry.name for entry in entries]
        if names != list(self.tags):
            self.tags = tags.unique(names)
            self._keys = [[column.format(tag) for column, _ in COLUMNS] for tag in self.tags.values()]
        return entries

    @torch.no_grad()
    def read(self, near_zero: float, others: Sequence[Tensor] = ()) -> tuple[dict[str, float], list[float]]:
        """The numbers of `measure`, and those of the 0-d tensors `others`, in one read of each device."""
        weights = self._weights()
        if any(is_sharded(weight.entry.parameter) for weight in weights):  # gathers one weight at a time
            tensors = [named for weight in weights for named in self._tensors([weight], near_zero)]
        else:
            tensors = self._tensors(weights, near_zero)
        entries, self.waiting_seconds = read([*(tensor for named in tensors for tensor in named.values()), *others])
        remaining = iter(entries)
        for weight, named in zip(weights, tensors, strict=True):
            weight.numbers = {name: next(remaining) for name in named}
        numbers = {**_overview(weights), **self._by_term(weights)}
        for weight, keys in zip(weights, self._keys, strict=True):
            numbers.update((key, function(weight)) for key, (_, function) in zip(keys, COLUMNS, strict=True))
        self.broken = {
            weight.entry.name: f"{weight.entry.name} has {weight.n_broken:,} NaN or infinite entries of "
            f"{weight.shape.numel():,}, and training does not repair them; go back to an earlier checkpoint, and lower "
            "lr or clip the gradients"
            for weight in weights
            if weight.n_broken and weight.entry.name not in self._reported
        }
        self._reported.update(self.broken)
        return numbers, [value for [value] in remaining]

    def certificate_numbers(self, certificate: Stationarity) -> dict[str, float]:
        """The numbers of a certificate, by their tags."""
        if unknown := certificate.by_term.keys() - self.terms.keys():
            raise ValueError(
                f"the certificate is of the terms {sorted(unknown)}, which the measured target does not have; measure "
                "the regularizer that stationarity(reg, closure) was given"
            )
        numbers = {f"stationarity/{name}": getattr(certificate, name) for name in ("total", "relative", "unpenalized")}
        return numbers | {f"stationarity/term.{self.terms[key]}": value for key, value in certificate.by_term.items()}

    def _tensors(self, weights: Sequence[_Weight], near_zero: float) -> list[dict[str, Tensor]]:
        """The tensors of each weight that are to be read, by name, from one pass over the weights."""
        whole = [connectivity.weights(weight.entry) for weight in weights]
        summaries = summarize(whole, near_zero, [self._supports[weight.entry.name] for weight in weights])
        return [weight.tensors(w, summary) for weight, w, summary in zip(weights, whole, summaries, strict=True)]

    def _weights(self) -> list[_Weight]:
        """The weights as they are now, with their penalties and steps."""
        target, entries = self._target(), self.entries()
        weights = [_Weight(entry, entry.parameter.shape) for entry in entries]
        for weight in weights:
            support, device = self._supports.get(weight.entry.name), weight.entry.parameter.device
            weight.has_support = support is not None and support.shape == weight.shape and support.device == device
            if not weight.has_support:
                with torch.inference_mode(False):  # a tensor made in inference mode cannot be written to outside of it
                    support = torch.zeros(weight.shape, dtype=torch.bool, device=device)
                self._supports[weight.entry.name] = support
        if isinstance(target, Regularizer) and target.enabled:
            steps = {id_: step for carrier in carriers(target) for id_, step in carrier.sampled_steps().items()}
            for weight, binding in zip(weights, target.bindings(), strict=True):
                weight.term, weight.penalty = binding.term.key, binding.penalty
                weight.step = steps.get(id(weight.entry.parameter), 0.0) if weight.shape.numel() else 0.0
                weight.limit = self._limit(weight) if id(weight.entry.parameter) in steps else 0.0
        return weights

    def _limit(self, weight: _Weight) -> float:
        """λ: a weight leaves 0 if its |gradient| is larger; for groups, the root mean square of a group's gradient."""
        assert weight.penalty is not None
        penalty, limit = self._limits.get(weight.entry.name, (None, 0.0))
        if penalty is not weight.penalty:
            penalty = weight.penalty
            shape = (1,) * len(weight.shape) if penalty.separable else weight.shape
            try:
                norm = penalty.dual_norm(torch.ones((), device="cpu").expand(shape)).item()
            except NotImplementedError:  # a penalty without certificates
                norm = math.inf
            limit = 1 / norm if norm > 0 else math.inf
            self._limits[weight.entry.name] = (penalty, limit)
        return limit

    def _by_term(self, weights: Sequence[_Weight]) -> dict[str, float]:
        """Ω and λ, in total and of each term."""
        target = self._target()
        if not isinstance(target, Regularizer):
            return {}
        values = dict.fromkeys(self.terms, 0.0)
        for weight in weights:
            if weight.penalty is not None:
                values[weight.term] += weight.penalty_value
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
    """One weight: `tensors` are to be read from its device, and its properties follow from the `numbers` in them."""

    entry: ParameterRef
    shape: torch.Size
    has_support: bool = False  # the last measurement has recorded which entries were zero
    term: str = ""
    penalty: Penalty | None = None
    limit: float = 0.0
    step: Step = 0.0
    n_inputs: int = 0
    n_neurons: int = 0
    numbers: dict[str, list[float]] = field(default_factory=dict)  # by the names of `tensors`

    def tensors(self, w: Tensor, summary: Summary) -> dict[str, Tensor]:
        """The tensors to be read, by name, on the device of `w`, which is the whole weight."""
        inputs, neurons = _alive_units(self.entry, w, summary)
        self.n_inputs, self.n_neurons = inputs.numel(), neurons.numel()
        tensors = {
            "counts": summary.counts,
            "sums": summary.sums,
            "squared group norms": _quantiles(_squared_norms(self.penalty, w, summary)),
            "alive inputs": torch.count_nonzero(inputs),
            "alive neurons": torch.count_nonzero(neurons),
        }
        if isinstance(self.step, Tensor):
            tensors["step"] = unsharded(self.step).median()
        if self.penalty is not None and self._penalty_of_sums(0.0, 0.0) is None:
            tensors["penalty"] = unsharded(self.penalty(self.entry.parameter.detach()))
        return tensors

    @property
    def size(self) -> int:
        """The number of entries, and 1 for an empty weight, so that shares of it are 0."""
        return self.shape.numel() or 1

    @property
    def n_zeros(self) -> float:
        return self.numbers["counts"][0]

    @property
    def n_near_zero(self) -> float:
        return self.numbers["counts"][1]

    @property
    def n_broken(self) -> float:
        return self.numbers["counts"][2]

    @property
    def n_changed(self) -> float:
        """The number of entries that became zero or nonzero since the last measurement."""
        return self.numbers["counts"][3] if self.has_support else 0

    @property
    def penalty_value(self) -> float:
        """Ω of this weight."""
        if "penalty" in self.numbers:
            return self.numbers["penalty"][0]
        return self._penalty_of_sums(*self.numbers["sums"][:2]) or 0.0

    @property
    def threshold(self) -> float:
        step = self.numbers["step"][0] if "step" in self.numbers else self.step
        assert not isinstance(step, Tensor)
        return self.limit * step if step else 0.0

    def _penalty_of_sums(self, absolute: float, squares: float) -> float | None:
        """Ω as a function of Σ|w| and Σw², or None if it is not; the sums are of the weights after masking."""
        soft = None if self.penalty is None or connectivity.masked(self.entry) else self.penalty.coefficients()
        return None if soft is None or soft.anchor is not None else soft.l1 * absolute + soft.l2 * squares


_QUANTILES = (0.1, 0.5, 0.9)
COLUMNS: tuple[tuple[str, Callable[[_Weight], float]], ...] = (
    ("sparsity/{}", lambda weight: weight.n_zeros / weight.size),
    ("sparsity_near_zero/{}", lambda weight: weight.n_near_zero / weight.size),
    ("support_churn/{}", lambda weight: weight.n_changed / weight.size),
    ("sparsity_inputs/{}", lambda weight: _missing_share(weight.numbers["alive inputs"][0], weight.n_inputs)),
    ("sparsity_neurons/{}", lambda weight: _missing_share(weight.numbers["alive neurons"][0], weight.n_neurons)),
    ("weight_norm_l1/{}", lambda weight: weight.numbers["sums"][0]),
    ("weight_norm_l2/{}", lambda weight: math.sqrt(weight.numbers["sums"][1])),
    ("weight_group_norm/{}.p10", lambda weight: math.sqrt(weight.numbers["squared group norms"][0])),
    ("weight_group_norm/{}.p50", lambda weight: math.sqrt(weight.numbers["squared group norms"][1])),
    ("weight_group_norm/{}.p90", lambda weight: math.sqrt(weight.numbers["squared group norms"][2])),
    ("threshold/{}", lambda weight: weight.threshold),
)
"""The numbers of each weight: the key, in which {} stands for the tag of the weight, and the function of the weight."""


def _missing_share(count: float, total: int) -> float:
    return (total - count) / (total or 1)


def _alive_units(entry: ParameterRef, w: Tensor, summary: Summary) -> tuple[Tensor, Tensor]:
    """Tensors that are nonzero for each input and each neuron with a nonzero weight, as `sparsity` counts them."""
    if w.dim() > 1 and connectivity.in_plain_order(entry.owner):
        return summary.column_nonzeros, summary.row_nonzeros
    return connectivity.alive_units(w != 0, entry.owner)


def _squared_norms(penalty: Penalty | None, w: Tensor, summary: Summary) -> Tensor:
    """‖w_g‖² of the groups of the penalty, or of the rows if it has no groups."""
    inner = penalty.penalty if isinstance(penalty, Toward) else penalty
    groups = inner.groups if isinstance(inner, GroupPenalty) else Rows()
    if isinstance(groups, Rows):
        return summary.row_squares
    if isinstance(groups, Columns):
        return summary.column_squares
    return groups.norms(widened(w)).flatten().square()


def _quantiles(norms: Tensor) -> Tensor:
    """Quantiles by nearest rank; zeros for an empty tensor."""
    if not len(norms):
        return norms.new_zeros(len(_QUANTILES))
    ordered = norms.sort().values
    return torch.stack([ordered[math.ceil(q * len(norms)) - 1] for q in _QUANTILES])


def _overview(weights: Sequence[_Weight]) -> dict[str, float]:
    """The numbers of all weights together."""
    size = sum(weight.shape.numel() for weight in weights)
    n_zeros = sum(weight.n_zeros for weight in weights)
    shares = [weight.n_zeros / weight.size for weight in weights]
    return {
        "overview/sparsity": n_zeros / (size or 1),
        "overview/params_kept": float(size - n_zeros),
        "sparsity_near_zero/total": sum(weight.n_near_zero for weight in weights) / (size or 1),
        "support_churn/total": sum(weight.n_changed for weight in weights) / (size or 1),
        "spread/sparsity.min": min(shares),
        "spread/sparsity.max": max(shares),
    }
