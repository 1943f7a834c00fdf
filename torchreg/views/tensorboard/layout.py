"""The custom-scalar page: the curves that share a chart, generated for a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

MAX_LINES = 6  # more layers than these are a band from the least to the most sparse layer
_LINES_PER_CHART = 4
_MAX_WEIGHTS = 24  # of more weights only some are drawn
_SAMPLE = 8

T = TypeVar("T")


def evenly_spread(items: Sequence[T], most: int = _SAMPLE) -> list[T]:
    """At most `most` items at even distances, including the first and the last.

    >>> evenly_spread(range(300), 4)
    [0, 100, 199, 299]
    """
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def layout(parameters: Sequence[str]) -> Any:
    """A `Layout` of three pages: the trade-off, sparsity by layer, and norms.

    It does not depend on the penalty: TensorBoard merges the charts of all runs, and would show a chart that differs
    between runs twice.

    Args:
        parameters: the tags of the weights.
    """
    from tensorboard.plugins.custom_scalar import layout_pb2 as pb

    def matches(title: str, *patterns: str) -> Any:
        # A pattern is a regular expression that must match the start of a tag.
        return pb.Chart(title=title, multiline=pb.MultilineChartContent(tag=patterns))

    def lines(title: str, tags: Sequence[str]) -> Any:
        return matches(title, *(f"^{re.escape(tag)}$" for tag in tags))

    def by_layer(title: str, metric: str) -> list[Any]:
        shown = list(parameters) if len(parameters) <= _MAX_WEIGHTS else evenly_spread(parameters)
        if len(shown) < len(parameters):
            title += f", {len(shown)} of {len(parameters)} weights"
        tags = [f"{metric}/{parameter}" for parameter in shown]
        pages = [tags[i : i + _LINES_PER_CHART] for i in range(0, len(tags), _LINES_PER_CHART)]
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
        spread,  # TensorBoard draws a chart with a band last, at any position in this list
    ]
    zeros = by_layer("zeros", "sparsity")
    dead = [*by_layer("dead inputs", "sparsity_inputs"), *by_layer("dead neurons", "sparsity_neurons")]
    sparsity = [*zeros, *dead] if len(parameters) <= MAX_LINES else [spread, *zeros]
    norms = [*by_layer("L2 norm", "weight_norm_l2"), *by_layer("λ·step", "threshold")]
    return pb.Layout(
        category=[
            pb.Category(title="1 Trade-off", chart=trade_off),
            pb.Category(title="2 Sparsity by layer", chart=sparsity),
            pb.Category(title="3 Norms and thresholds", chart=norms, closed=True),
        ]
    )
