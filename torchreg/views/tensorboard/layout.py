"""The custom-scalar page: which curves stand together, generated for the model at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

FEW = 6  # layers that one can tell apart as lines; above, a band from the least to the most sparse one
LINES = 4  # lines in a chart
MOST = 8  # of many terms, and of more than 24 weights, so many are shown one by one

T = TypeVar("T")


def some(items: Sequence[T], most: int = MOST) -> list[T]:
    """At most `most` of them, evenly spread, with the first and the last.

    >>> some(range(300), 4)
    [0, 100, 199, 299]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def layout(parameters: Sequence[str]) -> Any:
    """A `Layout` of three pages: the trade-off, sparsity by layer, and norms.

    It is the same for every penalty: TensorBoard shows the charts of all runs, and one that differs a second time.

    Args:
        parameters: the tags of the weights.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2 as pb

    def matches(title: str, *patterns: str) -> Any:
        # Regular expressions, matched from the start.
        return pb.Chart(title=title, multiline=pb.MultilineChartContent(tag=patterns))

    def lines(title: str, tags: Sequence[str]) -> Any:
        return matches(title, *(f"^{re.escape(tag)}$" for tag in tags))

    def by_layer(title: str, metric: str) -> list[Any]:
        shown = list(parameters) if len(parameters) <= 24 else some(parameters)
        if len(shown) < len(parameters):
            title += f", {len(shown)} of {len(parameters)} weights"
        tags = [f"{metric}/{parameter}" for parameter in shown]
        pages = [tags[i : i + LINES] for i in range(0, len(tags), LINES)]
        numbers = [f" ({i + 1} of {len(pages)})" if len(pages) > 1 else "" for i in range(len(pages))]
        return [lines(title + number, page) for number, page in zip(numbers, pages, strict=True)]

    spread = pb.Chart(
        title="sparsity: the least sparse layer, all, the most sparse",
        margin=pb.MarginChartContent(
            series=[
                pb.MarginChartContent.Series(
                    value="overview/sparsity", lower="spread/sparsity.min", upper="spread/sparsity.max"
                )
            ]
        ),
    )
    trade_off = [
        lines("sparsity and accuracy", ["overview/sparsity", "overview/accuracy"]),
        lines("loss and penalty", ["overview/loss", "overview/loss_data", "overview/penalty"]),
        matches("penalty by term", "^penalty/"),
        matches("λ by term", "^schedule/lambda_"),
        lines("weights that became zero or nonzero", ["support_churn/total"]),
        spread,  # TensorBoard draws it last in any case
    ]
    zeros = by_layer("zeros", "sparsity")
    dead = [*by_layer("dead inputs", "sparsity_inputs"), *by_layer("dead neurons", "sparsity_neurons")]
    sparsity = [*zeros, *dead] if len(parameters) <= FEW else [spread, *zeros]
    norms = [*by_layer("L2 norm", "weight_norm_l2"), *by_layer("λ·step", "threshold")]
    return pb.Layout(
        category=[
            pb.Category(title="1 Trade-off", chart=trade_off),
            pb.Category(title="2 Sparsity by layer", chart=sparsity),
            pb.Category(title="3 Norms and thresholds", chart=norms, closed=True),
        ]
    )
