"""The dashboard of the main job in headless Chromium: every tab of TensorBoard shows what the runs have led to.

A picture of every tab is kept in tests/output/, or in the folder named by TORCHREG_SCREENSHOTS. Needs playwright
(of the extra `test`) and Debian's package chromium, without which the tests skip; `.ci/run` installs it.
"""

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import ROOT
from tests.examples.test_mnist_mlp import REAL, run

api = pytest.importorskip("playwright.sync_api", reason="no playwright; install it: pip install '.[test]'")
expect = api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium; install Debian's package: apt-get install chromium fonts-dejavu-core"
)

OUTPUT = Path(os.environ.get("TORCHREG_SCREENSHOTS", ROOT / "tests" / "output"))
SECONDS = 30  # a page on a slow machine
L1 = 2e-3  # large, so that a training this short has zeros
FLAGS = f"--epochs 1 --refit-epochs 1 --warmup-epochs 0.5 --batch-size 1024 --l1 {L1}".split()
RUNS = ["L1_in_loss", "plain", "prox_L1", "prox_elastic_net"]
WEIGHTS = ["fc1.weight", "fc2.weight", "fc3.weight"]
LIGHT_GREY = 211


class Row(NamedTuple):
    """What the script printed of a run: the truth for what the page shows of it."""

    accuracy: float
    sparsity: float
    left: list[str]
    live_inputs: float


class Job(NamedTuple):
    folder: Path
    rows: dict[str, Row]
    logs: dict[str, EventAccumulator]
    last_step: int


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The main job in short: real MNIST where TORCHREG_DATA is, the digits elsewhere."""
    folder = tmp_path_factory.mktemp("job")
    _, printed = run(folder, *FLAGS, offline=REAL is None)
    rows = {}
    for name, cells in printed.items():
        _, refitted, zeros, *left, live, _ = cells
        alive, pixels = map(int, live.split(" of "))
        rows[name.replace(" ", "_")] = Row(float(refitted) / 100, float(zeros) / 100, left, alive / pixels)
    assert sorted(rows) == RUNS
    logs = {name: EventAccumulator(str(folder / "runs" / name), size_guidance={"histograms": 0}) for name in RUNS}
    last = {log.Reload().Scalars("overview/sparsity")[-1].step for log in logs.values()}
    assert len(last) == 1
    return Job(folder / "runs", rows, logs, last.pop())


@pytest.fixture(scope="module")
def links(job):
    """The links that `torchreg dashboard` prints: overview and charts."""
    command = [sys.executable, "-m", "torchreg", "dashboard", str(job.folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = dict(re.split(r":\s+", process.stdout.readline().strip(), maxsplit=1) for _ in range(3))
            assert lines.pop("runs") == ", ".join(RUNS)
            yield lines
        finally:
            process.terminate()  # not SIGINT, which background jobs of a shell ignore
            process.wait(30)


@pytest.fixture(scope="module")
def browser():
    flags = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield browser.new_context(viewport={"width": 1600, "height": 1400})
        browser.close()


@pytest.fixture
def page(browser, links):
    """An empty page. At the end its picture is kept, and it has had no error and has asked nobody but TensorBoard."""
    base = links["overview"].partition("/?")[0]
    assert base.startswith("http://127.0.0.1:")
    faults = []
    page = browser.new_page()
    page.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: None if sent.url.startswith((base, "data:", "blob:")) else faults.append(sent.url))
    page.on("response", lambda got: faults.append(f"{got.status} {got.url}") if got.status >= 400 else None)
    yield page
    OUTPUT.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=OUTPUT / f"{re.search('#([a-z_]+)', page.url)[1]}.png")
    page.close()
    assert not faults


def tab(page, links, name):
    page.goto(f"{links['overview'].partition('?')[0]}#{name}")


def strength(name):
    return 0.0 if name == "plain" else L1


def cells(row):
    return [" ".join(text.split()) for text in row.all_text_contents()]


def drawn(locator):
    """An element as it stands on the screen: (height, width, 3), 0 to 255."""
    pixels = np.asarray(Image.open(io.BytesIO(locator.screenshot())).convert("RGB")).astype(int)
    return pixels[1:-1, 1:-1]  # an edge may fall between two pixels of the screen


def share(pixels, colour):
    return (abs(pixels - colour).max(-1) <= 2).mean()


# ---------------------------------------------------------------------- the tabs


def test_the_overview_opens_with_sparsity_and_accuracy_pinned_and_not_smoothed(page, links, job):
    page.goto(links["overview"])
    listed = page.locator("runs-data-table tb-data-table-content-row")
    expect(listed).to_have_text([re.compile(rf"^\s*{name}\s*$") for name in RUNS])
    colours = {
        row.inner_text().strip(): row.locator(".run-color-swatch").evaluate("e => getComputedStyle(e).backgroundColor")
        for row in listed.all()
    }
    pinned = page.locator("metrics-pinned-view scalar-card")
    expect(pinned).to_have_count(2)
    for card, metric in zip(pinned.all(), ("sparsity", "accuracy"), strict=True):
        expect(card.locator("tb-truncated-path")).to_have_attribute("title", f"overview/{metric}")
        rows = card.locator("tb-data-table-content-row")
        expect(rows).to_have_count(len(RUNS))
        # Where it smooths, the table has a column of smoothed values.
        expect(card.locator("tb-data-table-header-cell")).to_contain_text(["Run", "Value", "Step", "Relative"])
        for row, name in zip(rows.all(), RUNS, strict=True):
            _, shown, value, step, *_ = cells(row.locator("tb-data-table-content-cell"))
            assert (shown, step) == (name, f"{job.last_step:,}")
            assert float(value) == pytest.approx(getattr(job.rows[name], metric), abs=1e-4)
        canvas = drawn(card.locator("canvas"))
        seen = [name for name in RUNS if share(canvas, np.fromstring(colours[name][4:-1], sep=",")) > 1e-3]
        assert set(seen) & {"prox_L1", "prox_elastic_net"}, "a line is drawn; of equal ones the last hides the others"
        assert set(seen) & {"plain", "L1_in_loss"}
    expect(page.locator("metrics-card-group-toolbar").first).to_contain_text("overview")
    tags = ["accuracy", "loss_data", "objective", "params_kept", "penalty", "sparsity"]
    first = page.locator("metrics-card-grid").nth(1).locator("scalar-card")
    expect(first.locator("tb-truncated-path.tag")).to_have_text([re.compile(rf"overview\s*/{tag}") for tag in tags])


def series(*tags, runs=RUNS):
    return {f"{tag} ({name})" for tag in tags for name in runs}


def by_weight(metric):
    return series(*(f"{metric}/{weight}" for weight in WEIGHTS))


L1_RUNS = RUNS[:3]
CHARTS = {
    "1 Trade-off": {
        "sparsity and accuracy": series("overview/sparsity", "overview/accuracy"),
        "loss and penalty": series("overview/loss_data", "overview/penalty"),
        "penalty by term": series("penalty/l1", runs=L1_RUNS) | series("penalty/elastic_net", runs=RUNS[3:]),
        "λ by term": series("schedule/lambda_l1", runs=L1_RUNS)
        | series("schedule/lambda_elastic_net.l1", "schedule/lambda_elastic_net.l2", runs=RUNS[3:]),
        "weights that became zero or nonzero": series("support_churn/total"),
        "sparsity: the least sparse layer, all, the most sparse": series("overview/sparsity"),
    },
    "2 Sparsity by layer": {
        "zeros": by_weight("sparsity"),
        "dead inputs": by_weight("sparsity_inputs"),
        "dead neurons": by_weight("sparsity_neurons"),
    },
    "3 Norms and thresholds": {
        "L2 norm": by_weight("weight_norm_l2"),
        "λ·step": by_weight("threshold"),
    },
}


def test_custom_scalars_have_every_chart_once_with_a_line_for_every_run(page, links):
    page.goto(links["charts"])
    pages = page.locator("tf-custom-scalar-dashboard tf-category-paginated-view")
    expect(pages.locator(".category-name")).to_have_text(list(CHARTS))
    expect(pages.locator("iron-collapse.iron-collapse-opened[no-animation]")).to_have_count(2)
    pages.nth(2).locator("button.heading").click()
    for shown, charts in zip(pages.all(), CHARTS.values(), strict=True):
        cards = shown.locator("tf-custom-scalar-multi-line-chart-card, tf-custom-scalar-margin-chart-card")
        expect(cards.locator("tf-card-heading")).to_contain_text(list(charts))
        for card, (title, wanted) in zip(cards.all(), charts.items(), strict=True):
            margin = title.startswith("sparsity: ")
            entries = card.locator(".match-list-entry")
            expect(entries, title).to_have_count(len(wanted))
            assert {text.partition(" ")[2] for text in cells(entries)} == wanted  # a symbol, the tag, the run
            # A margin chart draws each line, and once more the band's; a path of one point has no L.
            expect(card.locator("path.line[d*='L']"), title).to_have_count(len(wanted) * (1 + margin))
            expect(card.locator("path.area[d*='L']"), title).to_have_count(len(wanted) * margin)


def test_images_show_dead_inputs_and_zeros_as_many_as_there_are(page, links, job):
    tab(page, links, "images")
    opened = page.locator("tf-category-paginated-view")
    expect(opened.locator(".category-name")).to_have_text(["weight_input_map", "weight_masks"])
    tags = ["weight_input_map/fc1.weight", *(f"weight_masks/{weight}" for weight in WEIGHTS)]
    cards = page.locator("tf-image-loader")
    expect(cards).to_have_count(len(tags) * len(RUNS))
    for tag in tags:
        for name in RUNS:
            card = cards.filter(has_text=tag).filter(has=page.get_by_text(name, exact=True))
            image = card.locator("img")
            image.scroll_into_view_if_needed()
            page.wait_for_function("e => e.complete && e.naturalWidth > 0", arg=image.element_handle())
            row = job.rows[name]
            if tag == tags[0]:
                assert share(drawn(image), LIGHT_GREY) == pytest.approx(1 - row.live_inputs, abs=0.02)
            elif tag == tags[-1]:  # 10 by 100, so that a weight is a dot
                assert share(drawn(image), 0) == pytest.approx(int(row.left[2].replace(",", "")) / 1000, abs=0.02)
    page.evaluate("scrollTo(0, 0)")


@pytest.mark.parametrize(("name", "path"), [("histograms", "path.outline"), ("distributions", "path.area")])
def test_each_weight_has_its_histogram_in_every_run(page, links, job, name, path):
    tab(page, links, name)
    cards = page.locator(f"tf-{name.removesuffix('s')}-loader")
    expect(cards).to_have_count(len(WEIGHTS) * len(RUNS))
    for weight in WEIGHTS:
        for run_name in RUNS:
            card = cards.filter(has_text=f"weight_nonzero/{weight}").filter(has=page.get_by_text(run_name, exact=True))
            logged = len(job.logs[run_name].Histograms(f"weight_nonzero/{weight}"))
            assert logged >= 2
            # One outline a histogram; a distribution has a band between each two of nine quantiles.
            expect(card.locator(f"{path}[d*='L']")).to_have_count(logged if name == "histograms" else 8)


def test_hparams_set_the_strengths_beside_what_they_led_to(page, links, job):
    tab(page, links, "hparams")
    table = page.locator("tf-hparams-table-view vaadin-grid-cell-content")
    expect(table.filter(has_text=" in runs")).to_have_count(len(RUNS))
    found = [text for text in cells(table) if text]
    columns = ["lambda_l1", "lambda_l2", "lr", "optimizer", "sparsity", "accuracy", "weights left"]
    header = ["Trial ID", "Show Metrics", *columns]
    assert found[: len(header)] == header
    rest = found[len(header) :]
    for i, name in enumerate(RUNS):
        trial, l1, l2, lr, optimizer, sparsity, accuracy, left = rest[8 * i : 8 * i + 8]
        row = job.rows[name]
        assert trial == f"{name} in runs"
        assert (float(l1), float(l2)) == (strength(name), 1e-5 if name == "prox_elastic_net" else 0)
        assert (float(lr), optimizer) == (2e-3, "ProxAdam" if name.startswith("prox") else "Adam")
        assert float(sparsity) == pytest.approx(row.sparsity, abs=6e-5)
        assert float(accuracy) == pytest.approx(row.accuracy, abs=6e-5)
        assert float(left) == pytest.approx(sum(int(weights.replace(",", "")) for weights in row.left), rel=1e-4)

    page.get_by_text("Scatter Plot Matrix View").click()
    plot = page.locator("tf-hparams-scatter-plot-matrix-plot")
    metrics = columns[4:]
    points = plot.locator("circle")
    expect(points).to_have_count(len(columns) * len(metrics) * len(RUNS))
    corner = (metrics.index("accuracy") * len(columns) + columns.index("sparsity")) * len(RUNS)
    across = points.evaluate_all("all => all.map(e => Number(e.getAttribute('cx')))")[corner : corner + len(RUNS)]
    assert across[:2] == [across[0]] * 2, "both runs without zeros stand at the left"
    assert across[2:] == pytest.approx([across[2]] * 2, abs=2)
    assert across[2] - across[0] > 50


def test_text_has_summary_strengths_and_glossary(page, links, job):
    tab(page, links, "text")
    texts = page.locator("tf-text-loader")
    expect(texts).to_have_count(3 * len(RUNS))
    for name in RUNS:
        mine = texts.filter(has=page.get_by_text(name, exact=True))
        expect(mine).to_have_count(3)
        summary, regularizer, glossary = mine.all()
        row = job.rows[name]
        expect(summary.locator("tr")).to_have_count(len(WEIGHTS) + 2)  # it comes in its own time
        table = [cells(line.locator("th, td")) for line in summary.locator("tr").all()]
        assert table[0] == ["weight", "shape", "left", "zeros", "dead inputs", "dead neurons"]
        assert [line[0] for line in table[1:]] == [*WEIGHTS, "total"]
        assert [line[2] for line in table[1:4]] == row.left
        assert float(table[4][3].removesuffix("%")) / 100 == pytest.approx(row.sparsity, abs=6e-5)
        penalty = "ElasticNet(l1=0.002, l2=1e-05)" if name == "prox_elastic_net" else f"L1(strength={strength(name)})"
        expect(regularizer.locator("pre")).to_contain_text([penalty, "fc1.bias"])
        meaning = glossary.locator("tr").filter(has_text="overview/sparsity")
        expect(meaning.locator("td")).to_have_text(["overview/sparsity", "share of the weights that are exactly 0"])
