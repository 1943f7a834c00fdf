"""architecture.png: the way of one training step through the library, and the rooms as layers.

    .venv/bin/python docs/images/architecture.py

Needs the extra `examples`. A test compares the rooms with those of tests/test_architecture.py.
"""

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image

FILE = Path(__file__).with_suffix(".png")

GREY, INK, PALE = "#EDEDED", "#222222", "#777777"
COLOURS = {"binding": "#CFE3F5", "penalties": "#FBE3B5", "optim": "#D5EBD0", "kernels": "#F5D3CC", "views": "#E6DCF2"}

STEP = [
    ("model", "your nn.Module", ""),
    ("binding", "a parameter, its\npenalty and carrier", "binding"),
    ("penalty", "value and prox;\nknows no model", "penalties"),
    ("step size", "s, from the state\nof the optimizer", "optim"),
    ("executor", "stock step, then\nw ← prox(w, s)", "optim"),
    ("kernel", "C or Triton, in\none pass", "kernels"),
]

ROOMS = [  # from the top: a room imports from rooms below it
    ("__main__.py", "the command line: torchreg report, torchreg dashboard"),
    ("views/", "measure, plots, TensorBoard, report: they only read"),
    ("training/", "schedules, target sparsity, refit, path, stages, cross-validation"),
    ("testing.py", "certificates for penalties and step sizes of your own"),
    ("optim/", "step sizes, attach, swap-ins, FISTA; executors/ take the step"),
    ("inspection/", "sparsity, stationarity, duality gap, λ_max"),
    ("binding/", "select, Regularizer, explain, RegularizedLoss: names meet maths"),
    ("kernels/", "C and Triton for the maths, and which of them serves"),
    ("penalties/", "one penalty per file: the value beside its prox"),
    ("private helpers", "_tables, _tensors, _checks, _distributed"),
]


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    shape = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=INK, lw=0.8))


def draw_step(axes: Axes) -> None:
    """Six boxes from left to right, and the views below them, which read each."""
    axes.text(
        0, 3.15, "One training step: data flow once, from left to right", fontsize=12, fontweight="bold", color=INK
    )
    width, gap = 1.72, 0.336
    for i, (title, text, room) in enumerate(STEP):
        x = i * (width + gap)
        box(axes, x, 1.5, width, 1.3, COLOURS.get(room, GREY))
        axes.text(x + width / 2, 2.52, title, ha="center", va="center", fontsize=11, fontweight="bold", color=INK)
        axes.text(x + width / 2, 1.97, text, ha="center", va="center", fontsize=9, color=INK)
        if i:
            axes.annotate("", (x, 2.15), (x - gap, 2.15), arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.4})
        read = {"arrowstyle": "-|>", "color": PALE, "lw": 1, "linestyle": (0, (4, 3))}
        if i < 4:
            axes.annotate("", (x + width / 2, 0.95), (x + width / 2, 1.5), arrowprops=read)
    right = 3 * (width + gap) + width
    box(axes, 0, 0.45, right, 0.5, COLOURS["views"])
    axes.text(right / 2, 0.7, "views only read", ha="center", va="center", fontsize=10, color=INK)


def draw_rooms(axes: Axes) -> None:
    """The rooms as layers, each on those that it may import from."""
    top, height = 6.0, 0.56
    axes.text(0, top + 0.25, "The rooms: imports point down only", fontsize=12, fontweight="bold", color=INK)
    for i, (name, text) in enumerate(ROOMS):
        y = top - (i + 1) * height
        box(axes, 0.45, y + 0.04, 11.55, height - 0.08, COLOURS.get(name.rstrip("/"), GREY))
        axes.text(0.65, y + height / 2, name, va="center", fontsize=10.5, fontweight="bold", color=INK)
        axes.text(2.75, y + height / 2, text, va="center", fontsize=10, color=INK)
    arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.4}
    axes.annotate("", (0.15, top - len(ROOMS) * height + 0.04), (0.15, top - 0.04), arrowprops=arrow)


def main() -> None:
    figure = Figure(figsize=(9.6, 7.6), dpi=150, facecolor="white", layout="none")
    FigureCanvasAgg(figure)
    for draw, place, height in (
        (draw_step, (0.02, 0.66, 0.96, 0.33), 3.5),
        (draw_rooms, (0.02, 0.01, 0.96, 0.64), 6.6),
    ):
        axes = figure.add_axes(place)
        axes.set(xlim=(-0.05, 12.05), ylim=(0.3, height))
        axes.axis("off")
        draw(axes)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
