"""Figures: the numbers that are really drawn, read back from the artists, against numpy and scikit-learn."""

from __future__ import annotations

import gc
import io
import itertools
import math
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from sklearn.datasets import load_diabetes
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import lasso_path
from sklearn.preprocessing import scale
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

import torchreg as tr
from tests.inspection.test_zero_counts import LAYERS, dense, prune
from tests.models import Reads, array
from torchreg.views import plots
from torchreg.views.plots import style
from torchreg.views.plots.layers import without_common_parts
from torchreg.views.weight_maps import input_strengths, mask_pixels


def png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=50)
    return picture.getvalue()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def line(figure: Figure, label: str) -> np.ndarray:
    [found] = [line for line in figure.axes[0].lines if line.get_label() == label]
    return np.stack([np.asarray(data, dtype=float) for data in found.get_data()])


def measured(layers: int, points: int = 5) -> list[dict[str, float]]:
    return [
        {"overview/sparsity": t / points, "overview/accuracy": 0.9}
        | {f"sparsity/blocks.{i}.fc.weight": t / (points + i) for i in range(layers)}
        for t in range(points)
    ]


def sparse(weight: Tensor) -> Tensor:
    with torch.no_grad():
        prune(weight)
    return weight


FIGURES = {
    "regularization_path": lambda: plots.regularization_path([1.0, 0.1], [[0.0, 0.0], [0.5, -0.1]], chosen=0.5),
    "one λ": lambda: plots.regularization_path([0.1], [[0.0, 1.0]]),
    "a path of zeros": lambda: plots.regularization_path([0.2, 0.1], np.zeros((2, 3))),
    "frontier": lambda: plots.frontier(
        {"a": ([0.5, 0.9], [[0.9, 0.8], [0.7, 0.8]]), "b": (0.0, 0.95)}, reference={"dense": [0.94, 0.96], "tiny": 0.7}
    ),
    "sparsity_over_time": lambda: plots.sparsity_over_time(range(5), measured(3)),
    "one step": lambda: plots.sparsity_over_time([3], measured(3, points=1)),
    "many layers": lambda: plots.sparsity_over_time(range(5), measured(300)),
    "one step of many layers": lambda: plots.sparsity_over_time([3], measured(7, points=1)),
    "weight_histogram": lambda: plots.weight_histogram(sparse(torch.randn(6, 5))),
    "input_map": lambda: plots.input_map(sparse(torch.randn(4, 64))),
    "bars": lambda: plots.input_map(sparse(torch.randn(4, 10))),
    "channels": lambda: plots.input_map(torch.randn(4, 48), (3, 4, 4)),
    "masks": lambda: plots.masks(nn.Sequential(nn.Linear(600, 4), nn.Conv2d(2, 3, 3)), most=1),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_every_figure_renders_and_none_of_it_is_pyplots(make):
    figure = make()
    assert type(figure) is Figure
    assert png(figure).startswith(b"\x89PNG")
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_figure_leaves_nothing_behind():
    figure = weakref.ref(plots.weight_histogram(torch.ones(2, 2)))
    gc.collect()
    assert figure() is None


def test_threads_may_draw_at_once():
    makes = [FIGURES["frontier"], FIGURES["sparsity_over_time"], lambda: plots.masks(torch.eye(20))]
    alone = [png(make()) for make in makes]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda make: png(make()), makes * 2)) == alone * 2


def test_a_figure_needs_neither_pyplot_nor_a_display():
    code = (
        "import io, sys, torch; from torchreg import plots; assert 'matplotlib' not in sys.modules; "
        "plots.weight_histogram(torch.eye(3)).savefig(io.BytesIO(), format='png'); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {"MPLBACKEND": "tkagg", "PATH": "", "HOME": "/nonexistent"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


def test_a_notebook_shows_a_figure_without_pyplot():
    formatters = pytest.importorskip("IPython.core.formatters")
    assert formatters.PNGFormatter()(plots.masks(torch.eye(2))).startswith(b"\x89PNG")


def test_a_pickled_figure_is_shown_as_its_own():
    figure = plots.masks(torch.eye(2))
    copy = pickle.loads(pickle.dumps(figure))
    copy.set_size_inches(1, 1)
    assert len(copy._repr_png_()) < len(figure._repr_png_())


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[plots\]'"):
        plots.masks(torch.eye(2))


@pytest.mark.parametrize("name", FIGURES)
def test_a_part_of_ones_own_page_takes_every_figure(name, monkeypatch):
    page = Figure(figsize=(9, 3), layout="constrained")
    left, right = page.subfigures(1, 2)
    canvas = style.canvas
    monkeypatch.setattr(style, "canvas", lambda figure, width, height: canvas(right, width, height))
    assert FIGURES[name]() is page
    assert right.axes
    assert not left.axes
    assert png(page)


def test_the_default_device_has_no_say():
    weight = torch.eye(3)
    with torch.device("meta"):  # as set_default_device("cuda") on a machine that has one
        plots.regularization_path([1.0, 0.1], [[0.0, 0.0], [0.5, -0.1]], names=["a", "b"])
        plots.frontier({"a": ([0.5, 0.9], [[0.9, 0.8], [0.7, 0.8]])})
        plots.sparsity_over_time(range(5), measured(3))
        plots.sparsity_over_time(range(5), measured(9))
        plots.weight_histogram(weight)
        plots.input_map(weight)
        plots.masks(weight)


def test_what_is_no_figure_is_refused():
    with pytest.raises(TypeError, match="Axes"):
        plots.masks(torch.eye(2), figure=Figure().subplots())


# ---------------------------------------------------------------------- colours and labels


def lightness(colour: str) -> float:
    """L* of CIELAB, 0 to 100: what a grey-scale print keeps."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    y = np.dot([0.2126, 0.7152, 0.0722], linear)
    return 116 * np.cbrt(y) - 16 if y > 0.008856 else 903.3 * y


def test_neighbouring_series_differ_in_lightness_and_in_style():
    styles = list(itertools.islice(style.styles(), 28))
    for one, other in itertools.pairwise(styles):
        assert abs(lightness(one["color"]) - lightness(other["color"])) > 12
        assert one["linestyle"] != other["linestyle"]
        assert one["marker"] != other["marker"]
    assert all(lightness(style["color"]) < 75 for style in styles), "readable on white"
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 28


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_as_near_to_their_lines_as_isotonic_regression_allows(seed):
    places = np.sort(np.random.default_rng(seed).normal(size=7))
    gap, low, high = 0.5, -1.5, 2.5
    offsets = gap * np.arange(7)
    nearest = isotonic_regression(places - offsets, y_min=low, y_max=high - offsets[-1]) + offsets
    np.testing.assert_allclose(style.spread_apart(places.tolist(), gap, low, high), nearest)


def test_the_labels_of_lines_that_end_alike_do_not_overlap():
    figure = plots.sparsity_over_time([0, 1], [{f"sparsity/w{i}": 1.0 for i in range(6)}] * 2)
    figure.draw_without_rendering()
    # Of the text alone: an annotation's own extent has its leader line in it.
    boxes = sorted((Text.get_window_extent(text) for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 6
    assert all(below.y1 < above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert boxes[-1].y1 < figure.bbox.y1


def test_names_are_shown_without_what_they_share():
    names = [f"model.layers.{i}.attn.weight" for i in range(9)]
    assert without_common_parts(names) == ("model.layers.*.attn.weight", list("012345678"))
    assert without_common_parts(["a", "b"]) == ("layer", ["a", "b"])
    for names in (["a.weight", "a.b.weight"], ["x.a.x", "x.x"], ["a.b.c.d", "a.e.d"]):
        pattern, left = without_common_parts(names)
        assert [pattern.replace("*", own) for own in left] == names
        assert all(left)


# ---------------------------------------------------------------------- paths


@pytest.fixture(scope="module")
def path() -> tuple[np.ndarray, np.ndarray, list[str]]:
    data = load_diabetes()
    lambdas, weights, _ = lasso_path(scale(data.data), scale(data.target), eps=1e-3)
    return lambdas, weights.T, list(data.feature_names)


def test_a_path_is_drawn_where_its_weights_are_not_zero(path):
    lambdas, weights, names = path
    figure = plots.regularization_path(lambdas, weights, names=names)
    largest = np.argsort(-np.abs(weights[-1]))[:6]
    assert set(texts(figure)) == {names[i] for i in largest}
    for i in largest:
        x, y = line(figure, names[i])
        np.testing.assert_array_equal(x, lambdas)
        drawn = ~np.isnan(y)
        np.testing.assert_array_equal(y[drawn], weights[drawn, i])
        assert drawn[weights[:, i] != 0].all()
        start = np.flatnonzero(weights[:, i])[0]
        assert np.flatnonzero(drawn)[0] == max(start - 1, 0), "from the last zero before it"


def test_lambda_falls_to_the_right_whatever_the_order_given(path):
    lambdas, weights, names = path
    shuffled = np.random.default_rng(0).permutation(len(lambdas))
    figure = plots.regularization_path(lambdas[shuffled], weights[shuffled], names=names)
    np.testing.assert_array_equal(line(figure, "bmi")[0], np.sort(lambdas)[::-1])
    assert figure.axes[0].get_xscale() == "log"
    assert figure.axes[0].get_xlim() == (lambdas.max(), lambdas.min())


def test_the_counts_above_are_those_of_the_path(path):
    lambdas, weights, _ = path
    figure = plots.regularization_path(lambdas, weights)
    [above] = figure.axes[0].child_axes
    counts = dict(zip(lambdas, (weights != 0).sum(1), strict=True))
    assert len(above.get_xticks()) >= 5
    assert [int(label.get_text()) for label in above.get_xticklabels()] == [counts[tick] for tick in above.get_xticks()]


def test_of_many_weights_the_largest_are_coloured_and_the_rest_grey():
    weights = torch.arange(40.0).repeat(3, 1) / 100
    weights[:, 7] = 0
    figure = plots.regularization_path([3, 2, 1], weights)
    assert set(texts(figure)) == {f"w[{i}]" for i in range(34, 40)}
    grey = [line for line in figure.axes[0].lines if line.get_color() == "0.75"]
    assert len(grey) == 32, "neither w[0] nor w[7] is ever anything but 0"


def test_the_chosen_lambda_is_a_vertical_line(path):
    lambdas, weights, _ = path
    figure = plots.regularization_path(lambdas, weights, chosen=float(lambdas[30]))
    verticals = [line for line in figure.axes[0].lines if list(line.get_xdata()) == [lambdas[30]] * 2]
    assert len(verticals) == 1
    assert f"λ = {lambdas[30]:.3g}" in texts(figure)


def test_a_path_may_be_a_list_of_tensors():
    weights = [nn.Parameter(torch.tensor([0.0, 1.0])), torch.tensor([0.5, 2.0], dtype=torch.bfloat16)]
    figure = plots.regularization_path([torch.tensor(2.0), 1.0], weights)
    np.testing.assert_array_equal(line(figure, "w[1]"), [[2, 1], [1, 2]])


def test_a_path_that_was_walked_is_drawn_as_it_stands():
    model = nn.Linear(3, 1, bias=False)
    weights = iter([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [2.0, 0.0, -1.0], [3.0, 0.5, -1.0]])

    def fit(model, reg):
        with torch.no_grad():
            model.weight[0] = torch.tensor(next(weights))

    scores = iter([0.0, 0.5, 0.75, 0.25])
    reg = tr.Regularizer(model, tr.L1(1.0))
    walked = tr.path(reg, fit, lambdas=[4.0, 2.0, 1.0, 0.0], score=lambda _: next(scores))
    figure = plots.regularization_path(walked, names=["a", "b", "c"], chosen=walked.best().strength)
    np.testing.assert_array_equal(line(figure, "a"), [[4, 2, 1], [0, 1, 2]])
    np.testing.assert_array_equal(line(figure, "c"), [[4, 2, 1], [math.nan, 0, -1]])
    assert "λ = 1" in texts(figure)
    figure = plots.regularization_path(walked, walked.weights().abs(), names=["a", "b", "c"])
    np.testing.assert_array_equal(line(figure, "c")[1], [math.nan, 0, 1])

    figure = plots.frontier({"path": walked})
    np.testing.assert_allclose(line(figure, "path"), [[100, 200 / 3, 100 / 3], [0.25, 0.75, 0.5]])


# ---------------------------------------------------------------------- frontiers


def test_a_frontier_is_the_median_and_the_range_over_seeds():
    rng = np.random.default_rng(0)
    sparsity, score = rng.uniform(0, 0.99, (6, 5)), rng.normal(size=(6, 5))
    figure = plots.frontier({"prox": (sparsity, score)})
    order = np.argsort(np.median(sparsity, axis=1))
    left = 100 * (1 - np.median(sparsity, axis=1))[order]
    np.testing.assert_allclose(line(figure, "prox"), [left, np.median(score, axis=1)[order]])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for x, scores in zip(left, score[order], strict=True):
        ends = band[np.isclose(band[:, 0], x), 1]
        assert ends.min() == scores.min()
        assert ends.max() == scores.max()
    assert figure.axes[0].get_legend().get_title().get_text() == "median and range of 5 seeds"


def test_weights_left_fall_to_the_right_on_a_logarithmic_axis():
    figure = plots.frontier({"prox": ([0.0, 0.9, 0.99, 0.995], [4, 3, 2, 1])})
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    left, right = axes.get_xlim()
    assert left > 100 > 0.5 > right
    figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {"100", "10", "1"} <= set(shown)


@pytest.mark.parametrize("sparsity", [[0.0, 0.3], [0.0, 0.9], [0.0, 0.99999], [0.5]])
def test_some_ticks_are_seen_whatever_the_range(sparsity):
    axes = plots.frontier({"prox": (sparsity, [1.0] * len(sparsity))}).axes[0]
    right, left = sorted(axes.get_xlim())
    ticks = [tick for tick in axes.get_xticks() if right <= tick <= left]
    assert 1 <= len(ticks) <= 10
    assert len(ticks) > 1 or len(sparsity) == 1


def test_references_are_horizontal_lines_with_their_own_range():
    figure = plots.frontier({"prox": (0.9, 0.8)}, reference={"dense": [0.94, 0.91, 0.99], "half": 0.5})
    assert list(line(figure, "dense")[1]) == [0.94, 0.94]
    assert list(line(figure, "half")[1]) == [0.5, 0.5]
    [band] = figure.axes[0].patches
    assert band.get_path().transformed(band.get_patch_transform()).get_extents().intervaly == pytest.approx(
        [0.91, 0.99]
    )
    assert legend(figure) == ["prox", "dense", "half"]


# ---------------------------------------------------------------------- over time


def test_few_layers_are_lines_with_their_names_at_the_end():
    figure = plots.sparsity_over_time([0, 10, 20, 30, 40], measured(6))
    assert len(figure.axes) == 1
    assert set(texts(figure)) == {"total", *(f"blocks.{i}.fc.weight" for i in range(6))}
    expected = [[0, 10, 20, 30, 40], [t / 8 for t in range(5)]]
    np.testing.assert_allclose(line(figure, "blocks.3.fc.weight"), expected)


def test_a_line_joins_the_steps_at_which_its_layer_was_measured():
    two = {"sparsity/a": 0.1, "sparsity/b": 0.2}
    figure = plots.sparsity_over_time([0, 1, 2], [two, {"sparsity/a": 0.5, "sparsity/b": math.nan}, two])
    assert list(line(figure, "a")[0]) == [0, 1, 2]
    assert list(line(figure, "b")[0]) == [0, 2]


@pytest.mark.parametrize("layers", [7, 48, 300])
def test_many_layers_are_rows_under_a_line_of_the_total(layers):
    measurements = measured(layers)
    del measurements[2]["sparsity/blocks.5.fc.weight"]
    steps = [0, 10, 20, 100, 200]
    figure = plots.sparsity_over_time(steps, measurements)
    total, rows, _ = figure.axes
    np.testing.assert_allclose(total.lines[0].get_data(), [steps, [t / 5 for t in range(5)]])
    [mesh] = rows.collections
    expected = np.array([[t / (5 + i) for t in range(5)] for i in range(layers)])
    shares = mesh.get_array()
    assert shares.mask[5, 2]
    assert shares.mask.sum() == 1
    np.testing.assert_allclose(shares[~shares.mask], expected[~shares.mask])
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-5, 5, 15, 60, 150, 250])
    assert mesh.get_clim() == (0, 1)


@pytest.mark.parametrize("layers", [7, 48, 300])
def test_the_names_of_many_layers_do_not_overlap(layers):
    figure = plots.sparsity_over_time(range(5), measured(layers))
    figure.draw_without_rendering()
    rows = figure.axes[1]
    names = rows.get_yticklabels()
    boxes = sorted((name.get_window_extent() for name in names), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    assert len(names) >= min(layers, 15)
    for name, tick in zip(names, rows.get_yticks(), strict=True):
        assert name.get_text() == str(int(tick)), "the name of its own row"
    assert rows.get_ylabel().startswith("blocks.*.fc.weight")
    assert rows.get_ylim() == (layers, 0)


def test_the_total_alone_is_a_line_too():
    figure = plots.sparsity_over_time([0, 1], [{"overview/sparsity": torch.tensor(x)} for x in (0.0, 0.5)])
    assert texts(figure) == ["total"]


def test_many_layers_need_no_total():
    measurements = [{key: x for key, x in one.items() if key != "overview/sparsity"} for one in measured(9)]
    figure = plots.sparsity_over_time(range(5), measurements)
    assert len(figure.axes) == 2, "the rows, and what their colours mean"


# ---------------------------------------------------------------------- histograms


def bins(figure: Figure) -> tuple[np.ndarray, np.ndarray]:
    [stairs] = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_data")]
    counts, edges, _ = stairs.get_data()
    return np.asarray(counts), np.asarray(edges)


def zero_bars(figure: Figure) -> list[float]:
    return [p.get_height() for p in figure.axes[0].patches if not hasattr(p, "get_data") and p.get_height()]


def test_the_bins_hold_every_nonzero_and_the_bar_every_zero():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    sparse(model[0].weight)
    weights = np.concatenate([array(layer.weight).ravel() for layer in model])
    figure = plots.weight_histogram(model)
    counts, edges = bins(figure)
    nonzero = weights[weights != 0]
    np.testing.assert_array_equal(counts, np.histogram(nonzero, edges)[0])
    assert counts.sum() == len(nonzero)
    assert np.abs(edges).min() == 0, "no bin has both signs"
    zeros = len(weights) - len(nonzero)
    assert zero_bars(figure) == [zeros]
    assert legend(figure) == [f"{len(nonzero):,} not zero", f"{zeros / 1800:.2%} exact zeros: {zeros:,} of 1,800"]


def test_one_layer_is_chosen_as_anywhere_else():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    assert legend(plots.weight_histogram(model, include="1.weight")) == ["6 not zero"]
    assert legend(plots.weight_histogram(model, exclude="1.weight")) == ["12 not zero"]
    assert legend(plots.weight_histogram(tr.Regularizer(model, tr.L1(1.0), include="*.bias"))) == ["5 not zero"]


HARD = {
    "all zero": (torch.zeros(3, 4), ["100.00% exact zeros: 12 of 12"]),
    "empty": (torch.zeros(0, 4), ["no weights"]),
    "one weight": (torch.tensor([[0.5]]), ["1 not zero"]),
    "one value": (torch.full((2, 2), -3.0), ["4 not zero"]),
    "NaN and inf": (
        torch.tensor([[math.nan, math.inf, 0.0, 1.0]]),
        ["1 not zero", "25.00% exact zeros: 1 of 4", "2 not finite, not drawn"],
    ),
    "NaN alone": (torch.tensor([[math.nan]]), ["1 not finite, not drawn"]),
    "huge": (torch.tensor([[-3e38, 3e38]]), ["2 not zero"]),
    "tiny": (torch.tensor([[5e-324]], dtype=torch.float64), ["1 not zero"]),
    "neighbours": (torch.tensor([[1.0, 1.0 + 2.0**-52]], dtype=torch.float64), ["2 not zero"]),
    "bfloat16": (torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), ["1 not zero", "50.00% exact zeros: 1 of 2"]),
    "a vector": (torch.tensor([0.0, 1.0]), ["1 not zero", "50.00% exact zeros: 1 of 2"]),
}


@pytest.mark.parametrize(("weights", "said"), HARD.values(), ids=HARD)
def test_a_histogram_takes_any_weights(weights, said):
    figure = plots.weight_histogram(weights)
    assert legend(figure) == said
    assert png(figure)
    if "not zero" in said[0]:
        counts, edges = bins(figure)
        assert counts.sum() == int(said[0].split()[0])
        assert len(counts) < 200
        assert (np.diff(edges) >= 0).all()


def test_complex_weights_are_drawn_by_their_modulus():
    figure = plots.weight_histogram(torch.tensor([[3 + 4j, 0j, -5j]]))
    counts, edges = bins(figure)
    assert figure.axes[0].get_xlabel() == "|weight|"
    assert counts.sum() == 2
    assert edges[0] <= 5 <= edges[-1]
    assert zero_bars(figure) == [1]


def test_what_pruning_masks_is_zero():
    layer = nn.Linear(10, 10)
    l1_unstructured(layer, "weight", amount=0.3)
    assert legend(plots.weight_histogram(layer))[1] == "30.00% exact zeros: 30 of 100"


# ---------------------------------------------------------------------- inputs


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_strength_of_an_input_is_the_norm_of_all_that_reads_it(make):
    layer = make()
    if layer.weight.dim() < 2:
        pytest.skip("no inputs")
    sparse(layer.weight)
    strengths = input_strengths(tr.select(layer, "weight")[0])
    expected = np.linalg.norm(np.moveaxis(dense(layer), 1, 0).reshape(len(strengths), -1), axis=1)
    np.testing.assert_allclose(strengths.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(strengths.numpy() == 0, expected == 0)


def entry(weight: Tensor) -> tr.ParameterRef:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    return tr.select(layer, "weight")[0]


def test_a_live_input_is_never_dead_however_small_its_weights():
    strengths = input_strengths(entry(torch.tensor([[3e-30, 0.0, 3e30], [4e-30, 0.0, 4e30]])))
    torch.testing.assert_close(strengths, torch.tensor([5e-30, 0.0, 5e30]), rtol=1e-6, atol=0)


def test_input_strengths_and_mask_pixels_read_nothing():
    own = entry(torch.randn(300, 20))
    with Reads() as reads:
        input_strengths(own)
        mask_pixels(own)
    assert reads.count == 0


def test_complex_and_half_precision_inputs_have_a_norm():
    assert input_strengths(entry(torch.tensor([[3 + 0j, 0j], [4j, 0j]]))).tolist() == [5, 0]
    assert input_strengths(entry(torch.full((300, 1), 200.0, dtype=torch.float16))).item() == pytest.approx(
        200 * math.sqrt(300)
    )
    assert input_strengths(entry(torch.zeros(0, 3))).tolist() == [0, 0, 0]


def test_784_inputs_are_an_image_with_the_dead_ones_masked():
    torch.manual_seed(0)
    weight = torch.randn(5, 784)
    weight[:, 100:200] = 0
    figure = plots.input_map(nn.Sequential(nn.Flatten(), own := nn.Linear(784, 5), nn.Linear(5, 2)))
    assert figure.axes[0].get_title() == "1.weight\n784 of 784 inputs live"
    with torch.no_grad():
        own.weight.copy_(weight)
    figure = plots.input_map(own)
    [image] = figure.axes[0].images
    pixels = image.get_array()
    assert pixels.shape == (28, 28)
    norms = np.linalg.norm(array(weight), axis=0).reshape(28, 28)
    np.testing.assert_array_equal(np.ma.getmaskarray(pixels), norms == 0)
    np.testing.assert_allclose(pixels.filled(0), norms, rtol=1e-6)
    assert image.get_clim() == pytest.approx((0, norms.max()))
    assert image.cmap.get_bad() == pytest.approx([*to_rgb("lightgrey"), 1])
    assert figure.axes[0].get_title() == "weight\n684 of 784 inputs live"
    assert figure.axes[0].get_xlabel() == "grey: dead"


def test_inputs_that_are_no_square_are_bars():
    weight = torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, math.nan]])
    figure = plots.input_map(weight)
    shown = {patch.get_label(): list(patch.get_data().values) for patch in figure.axes[0].patches}
    assert shown == {"dead": [0, 5, 0], "norm": [5, 0, 0], "not finite": [0, 0, 5]}
    assert figure.axes[0].get_title() == "2 of 3 inputs live\n1 with weights that are not finite"
    assert figure.axes[0].get_xlabel() == "input (grey: dead)"


def test_a_weight_that_is_not_finite_is_no_dead_input():
    weight = torch.ones(2, 64)
    weight[0, 9] = math.nan
    [image] = plots.input_map(weight).axes[0].images
    pixels = image.get_array()
    assert not np.ma.getmaskarray(pixels).any()
    assert (pixels > image.get_clim()[1]).sum() == 1


def test_channels_are_images_of_their_own_on_one_scale():
    weight = torch.arange(1.0, 33).repeat(2, 1)
    figure = plots.input_map(weight, (2, 4, 4))
    first, second = (axes.images[0] for axes in figure.axes[:2])
    expected = math.sqrt(2) * np.arange(1, 33).reshape(2, 4, 4)
    np.testing.assert_allclose(np.stack([first.get_array(), second.get_array()]), expected)
    assert first.get_clim() == second.get_clim()


def test_a_convolutions_channels_are_bars_for_they_have_no_place():
    assert not plots.input_map(nn.Conv2d(64, 2, 1)).axes[0].images
    assert plots.input_map(nn.Conv2d(64, 2, 1), (8, 8)).axes[0].images


def test_the_first_weight_is_the_first_with_inputs_or_the_one_named():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3), nn.Linear(3, 2))
    reg = tr.Regularizer(model, tr.L1(1.0), include=["1.bias", "2.weight"])
    assert plots.input_map(model).axes[0].get_title().startswith("1.weight\n4 of 4")
    assert plots.input_map(reg).axes[0].get_title().startswith("2.weight\n3 of 3")
    assert plots.input_map(reg, name="1.weight").axes[0].get_title().startswith("1.weight")
    assert plots.input_map(nn.Embedding(9, 5), name="weight").axes[0].get_title() == "weight\n5 of 5 inputs live"


# ---------------------------------------------------------------------- masks


@pytest.mark.parametrize("shape", [(5, 7), (300, 784), (256, 256), (257, 3), (1, 1000)])
def test_a_pixel_is_the_share_of_nonzeros_in_its_block(shape):
    weight = sparse(torch.randn(shape))
    pixels = mask_pixels(entry(weight)).numpy()
    alive = array(weight) != 0
    steps = [-(-length // 256) for length in shape]
    expected = [
        [alive[i : i + steps[0], j : j + steps[1]].mean() for j in range(0, shape[1], steps[1])]
        for i in range(0, shape[0], steps[0])
    ]
    np.testing.assert_allclose(pixels, expected, rtol=1e-6)
    assert max(pixels.shape) <= 256


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_filters_are_rows_and_inputs_by_kernel_columns(make):
    layer = make()
    sparse(layer.weight)
    rows = mask_pixels(tr.select(layer, "weight")[0]).numpy()
    if layer.weight.dim() < 2:
        np.testing.assert_array_equal(rows[:, 0], array(layer.weight) != 0)
        return
    groups = getattr(layer, "groups", 1)
    full = dense(layer) != 0
    outs, ins = full.shape[0] // groups, full.shape[1] // groups
    for o, own in enumerate(rows):  # a filter of a grouped convolution reads the inputs of its own group
        first = o // outs * ins
        np.testing.assert_array_equal(own, full[o, first : first + ins].ravel())


def test_masks_are_drawn_with_name_shape_and_share():
    model = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 2))
    sparse(model[0].weight)
    figure = plots.masks(model)
    first, second = figure.axes[:2]
    np.testing.assert_array_equal(first.images[0].get_array(), array(model[0].weight) != 0)
    assert second.images[0].get_array().shape == (3, 8)
    left = np.count_nonzero(array(model[0].weight)) / 12
    assert first.get_title() == f"0.weight\n3×4, {left:.2%} left"
    assert second.get_title() == "1.weight\n3×2×2×2, 100.00% left"


def test_black_is_the_fullest_block_and_the_title_says_so():
    weight = torch.zeros(512, 1024)
    weight[0, :4] = 1
    figure = plots.masks(weight)
    assert figure.axes[0].images[0].get_clim() == (0, 0.5)
    assert figure.axes[0].get_title().endswith("black: 50% of a 2×4 block")


def test_what_is_left_out_is_said():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(9)])
    figure = plots.masks(model, most=5)
    assert sum(bool(axes.images) for axes in figure.axes) == 5
    assert figure.get_supxlabel().endswith("4 more weights are not shown")
    assert not plots.masks(model).get_supxlabel().endswith("shown")


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 4), torch.zeros(0, 4), torch.ones(1, 1), torch.full((2, 2), math.nan)]
)
def test_masks_take_dead_empty_and_broken_weights(weight):
    assert png(plots.masks(weight))


# ---------------------------------------------------------------------- what is refused

MODEL = nn.Sequential(nn.Linear(4, 3))
REFUSED = {
    "no weights of that number": (
        lambda: plots.regularization_path([1.0, 0.5], [[1.0]]),
        "2 lambdas and 1 rows of weights do not pair up; give one row",
    ),
    "a path without scores": (
        lambda: plots.frontier({"L1": tr.path(tr.Regularizer(nn.Linear(2, 1), tr.L1(1.0)), print, lambdas=[1])}),
        r"results\['L1'\] is a path without scores; make it with path",
    ),
    "no path": (lambda: plots.regularization_path([], []), r"lambdas has shape \(0,\), but it needs 1 dimensions"),
    "flat weights": (
        lambda: plots.regularization_path([1.0], [1.0]),
        r"weights has shape \(1,\), but it needs 2 dimensions",
    ),
    "λ = 0": (lambda: plots.regularization_path([1.0, 0.0], [[1.0], [2.0]]), "the entry 0, .* logarithmic axis; leave"),
    "NaN": (lambda: plots.regularization_path([1.0], [[math.nan]]), "weights has 1 of 1 numbers that are not finite"),
    "ragged": (lambda: plots.regularization_path([2.0, 1.0], [[1.0], [1.0, 2.0]]), "weights is not an array .*; pass"),
    "other names": (
        lambda: plots.regularization_path([1.0], [[1.0]], names=["a", "b"]),
        "2 names do not fit 1 weights",
    ),
    "λ off the path": (
        lambda: plots.regularization_path([1.0, 0.1], [[1.0], [2.0]], chosen=3),
        "chosen=3 lies outside the path, 0.1 to 1; pass",
    ),
    "negative λ": (lambda: plots.regularization_path([1.0], [[1.0]], chosen=-1), "chosen=-1 must be finite"),
    "no results": (lambda: plots.frontier({}), "results is empty; give at least one"),
    "percents": (lambda: plots.frontier({"a": (95.6, 0.9)}), "'a' has the sparsity 95.6, .*; divide percents by 100"),
    "nothing left": (lambda: plots.frontier({"a": (1.0, 0.1)}), "the sparsity 1, .*; leave the point out"),
    "more scores": (
        lambda: plots.frontier({"a": ([0.1, 0.2], [1])}),
        "'a' has 2 sparsities and 1 scores; give as many",
    ),
    "a failed run": (
        lambda: plots.frontier({"a": (0.1, math.nan)}),
        "the score of 'a' has 1 of 1 .*; leave these",
    ),
    "no references": (lambda: plots.frontier({"a": (0.1, 1)}, reference={}), "reference is empty"),
    "more steps": (
        lambda: plots.sparsity_over_time([0, 1], measured(1, 1)),
        "2 steps and 1 measurements do not pair up",
    ),
    "steps back": (lambda: plots.sparsity_over_time([0, 5, 5], measured(1, 3)), "5 follows 5; give them in order"),
    "nothing measured": (lambda: plots.sparsity_over_time([0], [{"loss": 1.0}]), r"among \['loss'\]; its keys are"),
    "measured in percent": (
        lambda: plots.sparsity_over_time([0], [{"sparsity/a": 95}]),
        "sparsity/a is 95, but a share",
    ),
    "no bins": (lambda: plots.weight_histogram(MODEL, bins=0), "bins=0 must be at least 1"),
    "a pattern for a tensor": (lambda: plots.weight_histogram(torch.eye(2), include="a"), "nothing to select from"),
    "a pattern for nothing": (lambda: plots.masks(MODEL, include="fc.weight"), 'pattern "fc.weight" matches no'),
    "nothing to count": (lambda: plots.masks(nn.ReLU()), "ReLU has no weight of two or more dimensions"),
    "no masks": (lambda: plots.masks(MODEL, most=0), "most=0 must be at least 1"),
    "another shape": (
        lambda: plots.input_map(MODEL, (2, 3)),
        r"shape=\(2, 3\) does not hold the 4 inputs of 0.weight; pass .* whose product is 4",
    ),
    "four dimensions": (lambda: plots.input_map(MODEL, (1, 1, 2, 2)), "does not hold the 4 inputs"),
    "a misspelt name": (
        lambda: plots.input_map(MODEL, name="0.wieght"),
        '"0.wieght" matches no .*; did you mean "0.weight"',
    ),
    "a name for a tensor": (lambda: plots.input_map(torch.eye(2), name="weight"), "a single weight has no name"),
    "a bias": (lambda: plots.input_map(MODEL, name="0.bias"), r"0.bias has shape \(3,\) and so no inputs; name"),
    "no inputs": (lambda: plots.input_map(torch.zeros(3, 0)), "0 inputs"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_value_that_cannot_be_drawn_is_refused_with_the_reason(call, message):
    with pytest.raises(ValueError, match=message):
        call()


MISTAKEN = {
    "words": (lambda: plots.regularization_path("abc", [[1.0]]), "lambdas is not an array of real numbers"),
    "complex": (
        lambda: plots.regularization_path([1.0], torch.ones(1, 1, dtype=torch.complex64)),
        "complex, .* modulus",
    ),
    "one name": (lambda: plots.regularization_path([1.0], [[1.0]], names="age"), "names='age' is a str; pass a list"),
    "no λ": (lambda: plots.regularization_path([1.0], [[1.0]], chosen="1se"), "chosen='1se' is a str"),
    "a list": (lambda: plots.frontier([(0.5, 0.9)]), "results is a list; pass a dict"),
    "no pair": (lambda: plots.frontier({"a": 0.5}), r"results\['a'\] is not a pair; give"),
    "a single dict": (lambda: plots.sparsity_over_time([0], {"sparsity/a": 1.0}), "a list of dicts, .* got dict"),
    "no number": (
        lambda: plots.sparsity_over_time([0], [{"sparsity/a": "half"}]),
        "sparsity/a is 'half', not a number",
    ),
    "half a bin": (lambda: plots.weight_histogram(MODEL, bins=2.5), "bins=2.5 is a float"),
    "no model": (lambda: plots.masks("fc1.weight"), "expected a model, a Regularizer or a weight, got str"),
    "an array": (lambda: plots.input_map(np.eye(2)), "expected a model, .* got ndarray"),
    "integers": (lambda: plots.weight_histogram(torch.eye(2, dtype=torch.long)), r"torch.int64; convert them"),
    "some": (lambda: plots.masks(MODEL, most=True), "most=True is a bool"),
    "no shape": (lambda: plots.input_map(MODEL, 4), "shape=4 is not a shape; pass integers"),
    "half a pixel": (lambda: plots.input_map(MODEL, (2.0, 2.0)), "is not a shape"),
}


@pytest.mark.parametrize(("call", "message"), MISTAKEN.values(), ids=MISTAKEN)
def test_what_is_of_the_wrong_kind_is_refused_with_the_next_move(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_many_channels_stand_in_rows():
    figure = plots.input_map(torch.randn(4, 18 * 16), (18, 4, 4))
    drawn = [axes for axes in figure.axes if axes.images]
    assert len(drawn) == 18
    assert len({round(axes.get_position().y0, 3) for axes in drawn}) == 3
    assert max(figure.get_size_inches()) < 12


def test_what_a_csv_file_gave_back_is_drawn():
    rows = [{"step": str(step), "overview/sparsity": str(share)} for step, share in ((0, 0.0), (10, 0.25), (20, 0.5))]
    figure = plots.sparsity_over_time([row["step"] for row in rows], rows)
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == [0, 0.25, 0.5]
    assert line.get_xdata().tolist() == [0, 10, 20]
