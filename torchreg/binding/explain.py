"""The table of `Regularizer.explain()`: every parameter of the model, its penalty, and why the rest is left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from torchreg._tables import printable, render_table, shape_text
from torchreg.binding import connectivity
from torchreg.binding.bindings import Binding
from torchreg.binding.selection import LAYERS, named_parameters, norms_behind


def explained(model: nn.Module, bindings: list[Binding], why_not: Mapping[str, str], enabled: bool) -> str:
    """The table: a row for each parameter of the model.

    Args:
        why_not: by name, why a parameter has no penalty.
        enabled: the regularizer is switched on.
    """
    by_name = {binding.name: binding for binding in bindings}
    rows = []
    entries = named_parameters(model)
    norms = norms_behind(model)
    known = {name for entry in entries for name in entry.names}
    for entry in [*entries, *(binding.selected for name, binding in by_name.items() if name not in known)]:
        parameter = entry.parameter
        lazy = is_lazy(parameter)
        shape = "lazy" if lazy else shape_text(parameter.shape)
        count = "" if lazy else str(parameter.numel())
        binding = next((by_name[name] for name in entry.names if name in by_name), None)
        if binding is None:
            why = why_not.get(entry.name, "not selected")
            if why == "frozen" and parameter.requires_grad:
                why = "was frozen when the Regularizer was built"
            rows.append([printable(entry.name), shape, count, "", "", "", why])
            continue
        penalty = binding.term.penalty.scaled(binding.scale)
        strengths = ", ".join(f"{name}={getattr(penalty, name):g}" for name in penalty.strengths)
        carrier = "loss" if binding.carrier is None else binding.carrier.describe()
        tied = f"tied to {', '.join(printable(name) for name, _ in entry.ties)}" if entry.ties else ""
        computed = "computed by a parametrization" if entry.computed else ""
        notes = [
            binding.note,
            tied,
            computed,
            *_caveats(binding, norms, by_prox=binding.carrier is not None),
            "" if binding.anchor is None else "toward",
            "" if enabled else "disabled",
        ]
        name, term = printable(binding.name), printable(binding.term.key)
        rows.append([name, shape, count, term, strengths, carrier, "; ".join(note for note in notes if note)])
    return render_table(["parameter", "shape", "weights", "term", "λ", "acts in", "note"], rows, right=[2])


def _caveats(binding: Binding, norms: Mapping[int, str], by_prox: bool) -> Iterator[str]:
    """Notes on a penalty that does not do what it says."""
    penalty = binding.term.base
    if by_prox and not penalty.convex and not penalty.linearizes:
        yield "not convex: where weights rest depends on the step, with tr.Reweighted it does not"
    owner, parameter = binding.selected.owner, binding.parameter()
    # A sharded tensor would need every process to count, one without data has none.
    here = type(parameter) is nn.Parameter and not parameter.is_meta
    if here and (broken := parameter.numel() - int(parameter.isfinite().sum())):
        yield f"{broken} NaN or infinite"
    if (
        binding.anchor is not None or binding.selected.attribute != "weight"
    ):  # toward w₀ ≠ 0 a scale counts, and zeros move
        return
    if id(owner) in norms:
        yield f"norm layer {norms[id(owner)]} undoes its scale"
    elif by_prox and isinstance(owner, LAYERS) and here:
        dead, neurons = connectivity.dead_under_relu(binding.selected)
        if dead:
            yield f"{dead} of {neurons} outputs dead under ReLU"
