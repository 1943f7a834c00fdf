"""What the dashboard says in words: the glossary, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from torchreg._tables import printable
from torchreg.binding.regularizer import Regularizer
from torchreg.inspection.zero_counts import Sparsity, sparsity_cells


def glossary(near_zero: float) -> str:
    """What each group of tags means."""
    rows = [
        ("overview/sparsity", "share of the weights that are exactly 0"),
        ("overview/params_kept", "number of weights that are not 0"),
        ("overview/penalty, penalty/", "Ω, in total and by term: λ times what the penalty sums up"),
        ("overview/loss", "the loss as it was logged"),
        ("overview/loss_data, overview/objective", "the loss without the penalty, and with it"),
        ("schedule/lambda_", "λ in force: the strength times its factor"),
        ("schedule/lr", "the learning rate"),
        ("sparsity/", "share of exact zeros, by weight"),
        ("sparsity_near_zero/", f"share of the weights with abs(w) ≤ {near_zero:g}, the zeros included"),
        ("support_churn/", "share of the weights that became zero or nonzero since they were last measured"),
        ("sparsity_inputs/, sparsity_neurons/", "share of inputs and of neurons whose every weight is 0"),
        ("spread/", "sparsity of the least and of the most sparse weight"),
        ("threshold/", "λ·step: the largest abs(w) that the prox of a step takes to 0, for half of the weights"),
        ("weight_norm_l1/, weight_norm_l2/", "sum of abs(w), root of the sum of w²"),
        ("weight_group_norm/", "quantiles of the norms of the groups: those of the penalty, else the rows"),
        ("weight_nonzero/", "histogram of the weights that are not 0"),
        ("weight_masks/", "black: not 0; neurons down, inputs across"),
        ("weight_input_map/", "norm of what each input feeds; light grey: dead"),
        ("weight_filters/", "filters of the first convolution; mid grey is 0"),
        ("stationarity/", "distance of −gradient from λ∂Ω: 0 at a solution"),
    ]
    return markdown(["tag", "what it is"], [[f"`{tag}`", meaning] for tag, meaning in rows])


def regularizer(found: Regularizer) -> str:
    """Its terms as they were written, and `explain()`: at the first step of a warm-up, that alone would say λ = 0."""
    terms = "\n".join(f"{printable(key)}: {term.base!r}" for key, term in found.terms.items())
    return f"```\n{terms}\n```\n\nAt the first step, with schedules at work:\n\n```\n{found.explain()}\n```"


def summary(found: Sparsity) -> str:
    """The table of `sparsity()`."""
    header, *layers, total = sparsity_cells(found)
    return markdown(header, [*([code(name), *rest] for name, *rest in layers), ["**total**", *total[1:]]])


def code(text: str) -> str:
    """`text` as Markdown's code, which a backtick of its own would end: what follows it could be a picture or a link.

    >>> code("a`![b](c)")
    "`a'![b](c)`"
    """
    return f"`{text.replace('`', chr(39))}`"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown.

    >>> print(markdown(["a", "b"], [["1", "2 | 3"]]))
    | a | b |
    |---|---|
    | 1 | 2 \\| 3 |
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
