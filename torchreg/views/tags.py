"""Tags: the names under which numbers are logged, `metric/<parameter or term>`."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_LENGTH = 250  # the limit of file names
_DOTS = re.compile(r"^\.+$")
_UNSAFE = re.compile(r"[^\w./-]", re.ASCII)


def safe(text: str) -> str:
    """`text` reduced to letters, digits and `_ . / -`: parentheses break a custom chart, and some loggers refuse more.

    No part of the result is `..`, which a logger may take for a folder. The middle of a text that is too long is cut.

    >>> safe("re:enc[0-3]")
    're_enc_0-3_'
    """
    name = "/".join(_DOTS.sub("_", part) for part in _UNSAFE.sub("_", text).split("/") if part) or "_"
    return name if len(name) <= MAX_LENGTH else f"{name[: MAX_LENGTH // 2]}...{name[3 - MAX_LENGTH // 2 :]}"


def unique(texts: Iterable[str]) -> dict[str, str]:
    """A safe name for each text. All names differ, none is "total", and none has a slash, which would start a group.

    >>> unique(["fc*", "fc?", "fc"])
    {'fc*': 'fc_', 'fc?': 'fc__2', 'fc': 'fc'}
    """
    names: dict[str, str] = {}
    reserved = {"total"}  # the name for all weights or terms together
    for text in texts:
        name = base = safe(text).replace("/", "_")
        repeats = 1
        while name in reserved:
            repeats += 1
            name = f"{base}_{repeats}"
        reserved.add(name)
        names[text] = name
    return names
