"""Every public name with its signature, as text: what `tests/public_api.txt` holds and test_public_api.py compares.

`python -m tests.public_api > tests/public_api.txt` writes it anew.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import types
from collections.abc import Iterator, Mapping

import torchreg
from torchreg.__main__ import argument_parser

# Of the modules that a user reads, `__all__` of torchreg says which there are.
MODULES = {
    "torchreg": torchreg,
    **{f"torchreg.{name}": module for name in torchreg.__all__ if inspect.ismodule(module := getattr(torchreg, name))},
}
# What the syntax of Python calls in this library.
OPERATORS = {"__call__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}


def public(module: types.ModuleType) -> dict[str, object]:
    """The names that a user reads in `module`: its `__all__`, or what it defines itself; modules apart."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    names = getattr(module, "__all__", [name for name in own if not name.startswith("_")])
    return {name: getattr(module, name) for name in names if not inspect.ismodule(getattr(module, name))}


NAMES = {
    f"{prefix}.{name}": value for prefix, module in MODULES.items() for name, value in sorted(public(module).items())
}
CLASSES = {value for value in NAMES.values() if inspect.isclass(value)}


def listing() -> str:
    """The whole public API, a name a line; what a class adds to its public bases stands below it."""
    lines = [line for name, value in NAMES.items() for line in described(name, value)]
    return "\n".join([*lines, *commands(argument_parser())]) + "\n"


def described(name: str, value: object) -> Iterator[str]:
    """The lines of a function, a class or a constant."""
    if inspect.isclass(value):
        above = ", ".join(base.__qualname__ for base in bases(value))
        inherited = {line for base in value.__mro__[1:] if base in CLASSES for line in members(base)}
        yield f"class {name}({above})" if above else f"class {name}"
        yield from (f"    {line}" for line in sorted({*members(value)} - inherited))
    elif callable(value):
        yield f"def {name}{signature(value)}"
    else:
        yield f"{name}: {type(value).__qualname__}"


def bases(kind: type) -> Iterator[type]:
    """The bases of a class that have a public name; for one that has none, those that it has."""
    for base in kind.__bases__:
        if base.__module__.startswith("torchreg") and base not in CLASSES:
            yield from bases(base)
        elif base.__module__ not in ("abc", "builtins", "typing"):
            yield base


def members(kind: type) -> Iterator[str]:
    """What this library defines in `kind` and its bases: of torch's classes and of Python's nothing is listed."""
    seen: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("torchreg"):
            continue
        annotations = inspect.get_annotations(base)
        for name in {*vars(base), *annotations} - seen:
            if name.startswith("_") and name not in OPERATORS | {"__init__", "__new__"}:
                continue
            seen.add(name)
            value = inspect.getattr_static(base, name, None)
            if isinstance(value, property):
                settable = " (settable)" if value.fset else ""
                yield f"{name}: {inspect.get_annotations(value.fget)['return']}{settable}"
            elif isinstance(value, (staticmethod, classmethod)):
                yield f"{type(value).__name__} {name}{signature(value.__func__)}"
            elif inspect.isfunction(value):
                # Protocols have an __init__ that Python writes, and which no one calls.
                if not (name == "__init__" and getattr(base, "_is_protocol", False)):
                    yield f"{name}{signature(value)}"
            elif name in annotations:
                yield f"{name}: {annotations[name]}"


def signature(function: object) -> str:
    """Parameters and result as they are written: the annotations are text, which no version of Python rewrites."""
    found = inspect.signature(inspect.unwrap(function))
    parts, starred = [], False
    for name, parameter in found.parameters.items():
        text = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "") + name
        if parameter.kind == parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred |= parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY)
        if parameter.annotation is not parameter.empty:
            text += f": {parameter.annotation}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        parts.append(text)
    positional = [i for i, p in enumerate(found.parameters.values()) if p.kind == p.POSITIONAL_ONLY]
    if positional:
        parts.insert(positional[-1] + 1, "/")
    result = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return f"({', '.join(parts)}){result}"


def default(value: object) -> str:
    """A default as it would be written: a function's by its name."""
    return value.__qualname__ if inspect.isfunction(value) else repr(value)


def commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The command line: each command with its arguments."""
    subparsers: Mapping[str, argparse.ArgumentParser] = next(
        action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    for name, command in sorted(subparsers.items()):
        arguments = [
            action.option_strings[-1] if action.option_strings else action.metavar for action in command._actions
        ]
        yield f"$ {parser.prog} {name} " + " ".join(str(argument) for argument in arguments if argument != "--help")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    print(listing(), end="")
