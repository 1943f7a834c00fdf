"""The texts of the dashboard: the glossary, the regularizer, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from torchreg._tables import printable
from torchreg.binding.regularizer import Regularizer
from torchreg.inspection.zero_counts import Sparsity, sparsity_cells


def glossary(near_zero: float) -> str:
    """The meaning of each group of tags, as a table."""
    rows = [
        ("overview/sparsity", "share of the weights that are exactly 0"),
        ("overview/params_kept", "number of weights that are not 0"),
        ("overview/penalty, penalty/", "Ω, in total and by term; λ is included"),
        ("overview/loss", "the loss as it was logged"),
        ("overview/loss_data, overview/objective", "the loss without the penalty, and with it"),
        ("schedule/lambda_", "λ in force: the strength times its factor"),
        ("schedule/lr", "the learning rate"),
        ("sparsity/", "share of exact zeros, by weight"),
        ("sparsity_near_zero/", f"share of the weights with abs(w) ≤ {near_zero:g}, the zeros included"),
        ("support_churn/", "share of the weights that became zero or nonzero since the last measurement"),
        ("sparsity_inputs/, sparsity_neurons/", "share of inputs and of neurons whose every weight is 0"),
        ("spread/", "sparsity of the least and of the most sparse weight"),
        ("threshold/", "λ·step: the prox of a step sets abs(w) up to this to 0; the median over the weights"),
        ("weight_norm_l1/, weight_norm_l2/", "sum of abs(w), root of the sum of w²"),
        ("weight_group_norm/", "quantiles of the norms of the groups of the penalty, else of the rows"),
        ("weight_nonzero/", "histogram of the weights that are not 0"),
        ("weight_masks/", "black: not 0; neurons are rows, inputs are columns"),
        ("weight_input_map/", "norm of the weights that read each input; light grey: dead"),
        ("weight_filters/", "filters of the first convolution; mid grey is 0"),
        ("stationarity/", "distance of −gradient from λ∂Ω: 0 at a solution"),
    ]
    return markdown(["tag", "meaning"], [[f"`{tag}`", meaning] for tag, meaning in rows])


def regularizer_text(regularizer: Regularizer) -> str:
    """The terms as they were written, and `explain()`, which shows λ = 0 at the first step of a warm-up."""
    terms = "\n".join(f"{printable(key)}: {term.base!r}" for key, term in regularizer.terms.items())
    return f"```\n{terms}\n```\n\nAt the first step, with schedules at work:\n\n```\n{regularizer.explain()}\n```"


def sparsity_text(sparsity: Sparsity) -> str:
    """The table of `sparsity()`."""
    header, *layers, total = sparsity_cells(sparsity)
    return markdown(header, [*([code(name), *cells] for name, *cells in layers), ["**total**", *total[1:]]])


def code(text: str) -> str:
    """`text` as code in Markdown. A backtick in it would end the code, and a picture or a link could follow.

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
