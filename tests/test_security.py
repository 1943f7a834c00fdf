"""Nothing that comes from outside, a file or a name, makes this library run code or write where it should not."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import torchreg as tr
from tests.test_architecture import sources

# ---------------------------------------------------------------------- what the library never calls

# What runs, unpickles or parses into objects what it is given.
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "dill.load",
    "dill.loads",
    "joblib.load",
    "marshal.load",
    "marshal.loads",
    "os.popen",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "cPickle.load",
    "shelve.open",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "yaml.load",
    "yaml.unsafe_load",
    "xml.etree.ElementTree.parse",
    "tempfile.mktemp",
    "numpy.load",
}


def forbidden(text: str) -> Iterator[str]:
    """Each call in a module's text that could run what a file says, with its line."""
    tree = ast.parse(text)
    names = origins(tree)
    for node in ast.walk(tree):
        # A function that is handed on is called all the same: any mention of one counts.
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = origin(node, names)
            if name in FORBIDDEN:
                yield f"line {node.lineno}: {name}"
        if isinstance(node, ast.Call):
            name = origin(node.func, names)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name == "torch.load" and not constant(given.get("weights_only"), True):
                yield f"line {node.lineno}: torch.load without weights_only=True"
            if "shell" in given and not constant(given["shell"], False):
                yield f"line {node.lineno}: {name} with a shell"


def constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def origins(tree: ast.AST) -> dict[str, str]:
    """What the names that a module imports stand for, and the builtins that it does not define anew."""
    found = {name: name for name in vars(builtins)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(
                {
                    a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0]
                    for a in node.names
                }
            )
        elif isinstance(node, ast.ImportFrom):
            found.update({a.asname or a.name: f"{node.module}.{a.name}" for a in node.names})
    return found


def origin(node: ast.expr, names: Mapping[str, str]) -> str:
    """`node` as a dotted name, or ""."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        before = origin(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def test_nothing_in_the_library_runs_or_unpickles_what_it_is_given():
    found = {module: [*forbidden(text)] for module, text in sources().items()}
    assert not {module: calls for module, calls in found.items() if calls}
    assert any("torch.load(" in text for text in sources().values())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import pickle\npickle.load(file)", "line 2: pickle.load"),
        ("from pickle import loads as read\nread(data)", "line 2: pickle.loads"),
        ("import torch\ntorch.load(path)", "line 2: torch.load without weights_only=True"),
        ("from torch import load\nload(path, weights_only=flag)", "line 2: torch.load without weights_only=True"),
        ("import torch as t\nt.load(path, weights_only=False)", "line 2: torch.load without weights_only=True"),
        ("def f():\n    return eval(text)", "line 2: eval"),
        ("run = exec", "line 1: exec"),
        ("import os\nos.system('ls')", "line 2: os.system"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "line 2: subprocess.run with a shell"),
        ("import numpy as np\nnp.load(path)", "line 2: numpy.load"),
        ("import yaml\nyaml.load(file)", "line 2: yaml.load"),
    ],
)
def test_a_call_that_could_is_seen(text, complaint):
    assert complaint in [*forbidden(text)]


@pytest.mark.parametrize(
    "text", ["import torch\ntorch.load(path, weights_only=True)", "model.eval()", "import re\nre.compile(x)"]
)
def test_a_call_that_only_looks_like_one_is_not(text):
    assert not [*forbidden(text)]


# ---------------------------------------------------------------------- names

HOSTILE = [
    "..",
    "",
    " ",
    "_",
    "../../etc/passwd",
    "/etc/passwd",
    "a\\..\\b",
    "CON",
    "a\nb\r\n# c",
    "a\0b",
    "\x1b]0;title\x07\x1b[2J",
    "\u202egnp.exe\u200b",
    "\ud800",
    "<script>alert(1)</script>",
    "`<script>alert(1)</script>",
    "`![picture](http://192.0.2.1/seen.png)",
    "`[link](javascript:alert(1))",
    "| a | b |",
    "```",
    "$x^2$",
    r"$\frac{$",
    "%s{0}${HOME}",
    "λ weight",
    "x" * 10_000,
    "x" * 10_000 + "y",
]


@pytest.fixture
def reg() -> tr.Regularizer:
    """A model whose parameters have hostile names; some are the keys of terms, too."""
    model = nn.Module()
    # In a state dict of someone else's any text is a name; register_parameter refuses the empty one and dots.
    model._parameters.update({name: nn.Parameter(torch.full((3, 4), 1.0 + i)) for i, name in enumerate(HOSTILE)})
    rules = {name: tr.L1(1e-3) for name in HOSTILE[8:16]} | {"*": tr.L2(1e-3)}
    return tr.Regularizer(model, rules)


@pytest.mark.parametrize("tell", [tr.Regularizer.explain, tr.sparsity, repr])
def test_a_hostile_name_is_plain_text_in_every_table(reg, tell):
    lines = str(tell(reg)).split("\n")
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 300
    if tell is not repr:
        assert len(lines) in (len(HOSTILE) + 2, len(HOSTILE) + 3)  # the header, its rule and a total: one line a name


def test_a_hostile_name_is_a_plain_tag_and_no_two_are_one(reg):
    found = tr.measure(reg)
    assert all(re.fullmatch(r"[\w./-]{1,300}", tag, re.ASCII) for tag in found)
    assert not [tag for tag in found for part in tag.split("/") if not part.strip(".")]
    assert len([tag for tag in found if tag.startswith("sparsity/")]) == len(HOSTILE)


@pytest.mark.filterwarnings("ignore:html5lib")  # TensorBoard's own
def test_hostile_names_and_files_leave_the_log_in_its_folder_and_readable(reg, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.write_bytes(b"as it was")
    for name in ("", "²", "9" * 200, "0000000001.host.1.x"):
        (folder / f"events.out.tfevents.{name}").write_bytes(b"\xff" * 100)
    (folder / "events.out.tfevents.0000000002.link").symlink_to(outside)
    hparams = {"name": "<script>", "$": "\x1b[2J"}
    with tr.TensorBoardMonitor(folder, reg, budget=None, hparams=hparams) as monitor:
        monitor.log(2, **{name: 1.0 for name in HOSTILE if name})
    assert outside.read_bytes() == b"as it was"
    assert {path.name for path in tmp_path.rglob("*")} - {path.name for path in folder.iterdir()} == {
        "logs",
        "run",
        "outside",
    }
    [written] = folder.glob("*.torchreg")
    log = EventAccumulator(str(written), {"scalars": 0, "tensors": 0}).Reload()
    assert len(log.Tags()["scalars"]) > 10 * len(HOSTILE)
    for tag in ("about/1_summary", "about/2_regularizer", "about/3_glossary"):
        [text] = log.Tensors(f"{tag}/text_summary")
        page = markdown_to_safe_html(text.tensor_proto.string_val[0])
        assert not re.search(r"<(script|img|a)\b", page)
        assert "<table>" in page or "<pre>" in page
        assert page.replace("\n", "").isprintable()


def test_a_hostile_name_in_a_figure_is_no_formula(reg):
    from matplotlib import cbook
    from matplotlib.text import Text

    measured = [{f"sparsity/{name}": 0.5 for name in names} for names in (HOSTILE, [*HOSTILE[18:21], HOSTILE[9]])]
    figures = [tr.plots.masks(reg, most=6), *(tr.plots.sparsity_over_time([0], [m]) for m in measured)]
    figures += [tr.plots.input_map(reg.model, name=name) for name in ("$x^2$", r"$\frac{$", "\ud800", "a\nb\r\n# c")]
    for figure in figures:
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert not [text for text in texts if cbook.is_math_text(text)]
        assert all(line.isprintable() and len(line) < 120 for text in texts for line in text.split("\n"))
        figure.draw_without_rendering()


def test_a_hostile_name_in_an_error_is_plain_text(reg):
    with pytest.raises(ValueError, match="matches no parameter") as error:
        tr.select(reg.model, "\x1b]0;titel\x07\x1b[2J")
    assert str(error.value).isprintable()


# ---------------------------------------------------------------------- the dashboard


def test_a_tensorboard_in_the_current_directory_is_not_run(tmp_path):
    (tmp_path / "tensorboard.py").write_text("raise SystemExit('was run')")
    environment = os.environ | {"PYTHONPATH": str(Path(tr.__file__).parents[1])}
    command = [sys.executable, "-m", "torchreg", "dashboard", "."]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout.readline().startswith("no event files yet")
        finally:
            process.terminate()
