"""The house rules: who imports whom, what an import loads, which names are taken, and that names are explained."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import inspect
import re
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

import torchreg
from tests import public_api

PACKAGE = Path(torchreg.__file__).parent
REPOSITORY = Path(__file__).parents[1]

# A file imports only from files above it.
ORDER = [
    "_checks",
    "_tensors",
    "_distributed",
    "_tables",
    "penalties",
    "kernels",
    "binding",
    "inspection",
    "optim",
    "testing",
    "training",
    "views",
    "__main__",
]
# The same within a package, where it is settled; elsewhere it is enough that no circle closes.
INSIDE = {
    "penalties": ["coefficients", "functional", "groups", "base", "concave", "group_penalty"],
    "kernels": ["random_bits", "native", "cuda_kernels", "cuda", "backend", "weight_stats", "step_tables", "l1l2"],
    "binding": ["selection", "connectivity", "bindings", "evaluation", "regularizer", "loss"],
    "inspection": ["zero_counts", "certificates"],
    "optim": ["step_sizes", "attachment", "proximal", "fista"],
    "training": [
        *("session", "schedules", "refit", "target_sparsity", "path_points", "paths", "cross_validation"),
        *("stage", "stages", "recipes"),
    ],
    "views": ["tags", "reading", "measurement", "weight_maps", "plots", "report", "tensorboard"],
}
# Optional packages, by the only part of the house that may import them (by none of it, where there is no name).
ONLY_IN = {
    "tensorboard": "views",
    "google_crc32c": "views",
    "PIL": "views",
    "matplotlib": "views",
    "safetensors": "views",
    "triton": "kernels",
    "sklearn": None,
    "torchvision": None,
    "tqdm": None,
}

# ---------------------------------------------------------------------- who imports whom


def sources() -> dict[str, str]:
    """The text of every module of the library, by its dotted name; a package goes by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def imports(module: str, modules: Mapping[str, str]) -> set[str]:
    """What `module` imports, wherever in its text: modules of `modules` by their names, all else as it is written."""
    is_package = any(name.startswith(f"{module}.") for name in modules)
    found = set()
    for node in ast.walk(ast.parse(modules[module])):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                submodule = f"{origin}.{alias.name}"
                found.add(submodule if submodule in modules else origin)
    return found


def violations(modules: Mapping[str, str]) -> list[str]:
    """Every import that goes down the list, and every file that has no place in it."""
    found = []
    for module in modules:
        part, *rest = module.split(".")[1:] or [""]
        if part and part not in ORDER:
            found.append(f"{module} has no place in ORDER")
            continue
        for other in sorted(imports(module, modules)):
            if other.partition(".")[0] != "torchreg":
                continue
            target, *deeper = other.split(".")[1:] or [""]
            inside = INSIDE.get(part, [])
            if not part or target not in ["", *ORDER] or (target == part and not rest):
                continue  # the package itself may import anything of its own
            if not target and part == "__main__":
                continue  # below everything, it may import everything
            if not target:
                found.append(f"{module} imports torchreg itself, which imports everything")
            elif target and target != part:
                if ORDER.index(target) > ORDER.index(part):
                    found.append(f"{module} imports {other}, which stands below it")
            elif not deeper:
                found.append(f"{module} imports its own package, which imports it")
            elif deeper[0] in inside and rest[0] in inside and inside.index(deeper[0]) > inside.index(rest[0]):
                found.append(f"{module} imports {other}, which stands below it")
    return found


def everything_behind(module: str, modules: Mapping[str, str]) -> set[str]:
    """All that comes along when `module` is imported, the packages on the way apart."""
    seen, queue = set(), [module]
    while queue:
        for other in imports(queue.pop(), modules) - seen:
            seen.add(other)
            if other in modules:
                queue.append(other)
    return seen


def test_a_file_imports_only_from_files_above_it():
    assert not violations(sources())


def test_no_circle_closes():
    modules = sources()
    graph = {
        module: {other for other in imports(module, modules) if other in modules and other != module}
        for module in modules
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("module", "text", "complaint"),
    [
        (
            "penalties.l1",
            "from torchreg.binding import selection",
            "imports torchreg.binding.selection, which stands below",
        ),
        ("penalties.l1", "def f():\n    import torchreg.optim.attachment", "which stands below it"),
        (
            "penalties.l1",
            "from ..binding.regularizer import Regularizer",
            "imports torchreg.binding.regularizer, which",
        ),
        ("penalties.l1", "from torchreg import L2", "imports torchreg itself"),
        ("optim.step_sizes", "from torchreg.optim.attachment import attach", "which stands below it"),
        ("optim.proximal", "from torchreg import optim", "imports its own package"),
        ("novelty", "", "has no place in ORDER"),
    ],
)
def test_an_import_that_breaks_the_rule_is_seen(module, text, complaint):
    broken = {**sources(), f"torchreg.{module}": text}
    [violation] = violations(broken)
    assert violation.startswith(f"torchreg.{module} ")
    assert complaint in violation


@pytest.mark.parametrize(
    ("who", "never"),
    [
        ("penalties", ["kernels", "binding", "optim", "views"]),
        ("binding", ["optim", "training", "views"]),
        ("optim", ["training", "views"]),
    ],
)
def test_nothing_comes_along_that_one_must_not_see(who, never):
    modules = sources()
    names = [name for name in modules if name.split(".")[1:2] == [who]]
    assert names
    for name in names:
        seen = {other.split(".")[1] for other in everything_behind(name, modules) if other.startswith("torchreg.")}
        assert not seen & set(never), f"{name} brings in {seen & set(never)}"


def test_the_walk_sees_the_imports_that_are_there():
    modules = sources()
    assert "torchreg.penalties.l1" in imports("torchreg.penalties.elastic_net", modules)
    assert {"torchreg._checks", "torchreg.binding.selection", "torch"} <= imports(
        "torchreg.binding.regularizer", modules
    )
    assert "torchreg.penalties.functional" in everything_behind("torchreg.binding.regularizer", modules)


@pytest.mark.parametrize("package", ONLY_IN)
def test_an_optional_package_is_imported_in_its_own_part_alone(package):
    modules = sources()
    for module in modules:
        part = (module.split(".")[1:] or [""])[0]
        if part != ONLY_IN[package]:
            users = [other for other in imports(module, modules) if package == other.partition(".")[0]]
            assert not users, f"{module} imports {users}"


def test_penalties_know_nothing_of_processes_but_how_a_weight_lies_over_them():
    modules = sources()
    users = [name for name in modules if "torchreg._distributed" in imports(name, modules)]
    assert [name for name in users if name.startswith("torchreg.penalties")] == ["torchreg.penalties.base"]
    assert "from torchreg._distributed import layout_of\n" in modules["torchreg.penalties.base"]


# ---------------------------------------------------------------------- who reads private names


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_definitions(text: str) -> set[str]:
    """The private names that a file defines: functions, classes, methods, variables and attributes."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if private(name)}


def private_reads(module: str, modules: Mapping[str, str]) -> list[str]:
    """The private names of other files that `module` imports, or reads as an attribute of whatever object.

    Private modules such as `_checks` are helpers of the whole library; private names of torch are its own affair.
    """
    own = private_definitions(modules[module])
    others = set().union(*(private_definitions(text) for name, text in modules.items() if name != module)) - own
    found = []
    for node in ast.walk(ast.parse(modules[module])):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("torchreg")):
            names = [alias.name for alias in node.names if f"{node.module}.{alias.name}" not in modules]
            found += [name for name in names if private(name)]
        elif isinstance(node, ast.Attribute) and node.attr in others:
            found.append(node.attr)
    return [f"{module} reads {name}, which is private to another file" for name in found]


def test_no_file_reads_a_private_name_of_another_file():
    modules = sources()
    assert not [reading for name in modules for reading in private_reads(name, modules)]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("from torchreg.penalties.elastic_net import _ratio", "_ratio"),
        ("from .elastic_net import _ratio", "_ratio"),
        ("from torchreg.penalties import elastic_net\nelastic_net._ratio(0.5)", "_ratio"),
        ("def f(penalty, w):\n    return penalty._at(w)", "_at"),
        ("class Own:\n    def f(self, w):\n        return self._at(w)", "_at"),
    ],
)
def test_a_private_name_that_is_read_is_seen(text, name):
    broken = {**sources(), "torchreg.penalties.l1": text}
    assert private_reads("torchreg.penalties.l1", broken) == [
        f"torchreg.penalties.l1 reads {name}, which is private to another file"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from torchreg import _checks\nfrom torchreg._checks import nonnegative",
        "class Own:\n    def _at(self):\n        pass\n    def f(self):\n        return self._at()",
        "import torch\ntorch._C._are_functorch_transforms_active()",
    ],
)
def test_what_is_private_to_the_file_itself_or_to_torch_may_be_read(text):
    assert not private_reads("torchreg.penalties.l1", {**sources(), "torchreg.penalties.l1": text})


# ---------------------------------------------------------------------- that the map is true

MAP = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = MAP.partition("|---|---|---|\n")[2].partition("\n\n")[0]
# The rooms of the table, from the top: the name, and what it may import.
ROOMS = {
    re.sub(r"[` /]|\.py", "", name): allowed
    for _, name, _, allowed, _ in (row.split("|") for row in TABLE.splitlines())
}


def room(part: str) -> str:
    return "helpers" if re.match(r"_[a-z]", part) else part


def test_the_map_has_every_room_with_those_that_it_imports_from_below_it():
    assert list(ROOMS) == list(dict.fromkeys(room(part) for part in reversed(ORDER)))


@pytest.mark.parametrize("name", ROOMS)
def test_the_map_names_what_a_room_imports_and_nothing_above_it(name):
    modules = sources()
    allowed = set(re.findall(r"\w+", ROOMS[name])) | {name}
    assert allowed <= {*list(ROOMS)[list(ROOMS).index(name) :]}
    for module in modules:
        part = module.split(".")[1:2]
        if part and room(part[0]) == name:
            found = {other.split(".")[1] for other in imports(module, modules) if other.startswith("torchreg.")}
            assert {room(other) for other in found} <= allowed, f"docs/architecture.md does not say so of {module}"


def test_the_figure_has_the_rooms_of_the_map():
    tree = ast.parse((REPOSITORY / "docs" / "images" / "architecture.py").read_text(encoding="utf-8"))
    [drawn] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    ]
    assert [re.sub(r"private |/$|\.py$", "", name) for name, _ in drawn] == list(ROOMS)


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_file_that_the_map_names_exists(page):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    named = re.findall(r"(?:benchmarks|docs|tests|torchreg)/[\w/.-]*\w", text)
    assert named
    assert not [name for name in named if not (REPOSITORY / name).exists()]


# ---------------------------------------------------------------------- who says what


def calls(text: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("module", sources())
def test_a_warning_points_at_a_line_and_there_is_one_logger(module):
    for call in calls(sources()[module]):
        name = ast.unparse(call.func)
        if name == "warnings.warn":
            assert "stacklevel" in {keyword.arg for keyword in call.keywords}, ast.unparse(call)
        if name.endswith("getLogger"):
            assert [ast.unparse(argument) for argument in call.args] == ["'torchreg'"]


def test_only_the_command_line_prints():
    printing = {
        module for module, text in sources().items() if any(ast.unparse(call.func) == "print" for call in calls(text))
    }
    assert printing == {"torchreg.__main__", "torchreg.views.tensorboard.server"}


# ---------------------------------------------------------------------- what is loaded


def test_import_torchreg_loads_torch_and_nothing_heavier():
    # What torch itself brings along is torch's affair, and differs between its versions.
    code = (
        "import sys, warnings, torch; before = set(sys.modules); warnings.simplefilter('error'); import torchreg; "
        "print(*(name for name in sys.modules if name not in before))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    heavy = {*ONLY_IN, "torch.utils.tensorboard", "torch._dynamo", "numpy", "scipy", "pandas"}
    assert "torchreg.binding.regularizer" in loaded
    assert not heavy & loaded


# ---------------------------------------------------------------------- what names are taken


PUBLIC = public_api.NAMES


def test_the_public_names_are_found():
    assert {"torchreg.L1", "torchreg.sparsity", "torchreg.optim.attach", "torchreg.functional.soft_threshold"} <= {
        *PUBLIC
    }


def test_no_module_bears_the_name_of_a_public_function():
    functions = {name.rpartition(".")[2] for name, value in PUBLIC.items() if inspect.isfunction(value)}
    assert not functions & {module.rpartition(".")[2] for module in sources()}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_no_script_bears_the_name_of_a_standard_module(folder):
    # A script's folder comes first on the path: statistics.py in it would shadow the standard one.
    names = {path.stem for path in (REPOSITORY / folder).rglob("*.py")} - {"__init__", "__main__"}
    assert not names & set(sys.stdlib_module_names)


def test_every_package_is_shipped():
    shipped = re.search(
        r"^packages = (\[.*?\])", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    packages = {module for module in sources() if any(other.startswith(f"{module}.") for other in sources())}
    assert set(ast.literal_eval(shipped[1])) == packages


# ---------------------------------------------------------------------- that names are explained

# Public names whose docstring needs no example, with the reason.
NO_EXAMPLE = {
    "torchreg.Penalty": "abstract; each penalty shows its own",
    "torchreg.Concave": "abstract; each concave penalty shows its own",
    "torchreg.Binding": "made by Regularizer, whose bindings() shows it",
    "torchreg.ParameterRef": "made by select(), which shows it",
    "torchreg.Sparsity": "made by sparsity(), which shows it",
    "torchreg.LayerSparsity": "a row of Sparsity",
    "torchreg.Stationarity": "made by stationarity(), which shows it",
    "torchreg.PathPoint": "made by path(), which shows it",
    "torchreg.CrossValidation": "made by cross_validate(), which shows it",
    "torchreg.Stage": "abstract; each stage shows its own",
    "torchreg.Backend": "made by backends(), which shows it",
    "torchreg.Backends": "made by backends(), which shows it",
    "torchreg.FrozenZeros": "made by freeze_zeros(), which shows it",
    "torchreg.optim.Attachment": "made by attach(), which shows it",
    "torchreg.optim.learning_rate": "an argument of attach()",
}


def docstring(value: object) -> str:
    """What stands in the source itself: not what a dataclass writes by itself, nor what is inherited."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    return "" if not text or text.startswith(f"{getattr(value, '__name__', '')}(") else text


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name):
    assert docstring(PUBLIC[name]).strip()


@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in NO_EXAMPLE])
def test_a_public_name_has_an_example(name):
    assert ">>>" in docstring(PUBLIC[name]), f"{name} needs an example, or a reason in NO_EXAMPLE"


def test_the_exemptions_are_still_needed():
    assert not [name for name in NO_EXAMPLE if name not in PUBLIC or ">>>" in docstring(PUBLIC[name])]


@pytest.mark.parametrize("name", [name for name, value in PUBLIC.items() if inspect.isclass(value)])
def test_a_public_class_has_no_method_without_a_docstring(name):
    members = {key: value for key, value in inspect.getmembers(PUBLIC[name]) if not key.startswith("_")}
    own = {key: value for key, value in members.items() if is_ours(PUBLIC[name], key)}
    bare = [key for key, value in own.items() if not inspect.getdoc(value)]
    assert not bare, f"{', '.join(bare)}: a public method or property says what it gives"


def is_ours(kind: type, key: str) -> bool:
    """`key` is a method or property that a class of this library defines."""
    owner = next(base for base in kind.__mro__ if key in vars(base))
    value = vars(owner)[key]
    return owner.__module__.startswith("torchreg") and isinstance(
        value, (types.FunctionType, classmethod, staticmethod, property)
    )
