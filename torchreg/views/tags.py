"""Tags: the names under which numbers are logged, `metric/<parameter or term>`."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 250  # what a file's name may have
_DOTS = re.compile(r"^\.+$")
_UNSAFE = re.compile(r"[^\w./-]", re.ASCII)


def safe(text: str) -> str:
    """`text` in letters, digits and `_ . / -` alone: parentheses blank a custom chart, and some loggers refuse more.

    No part of it is `..`, which another logger may take for a folder; and its middle goes where it is too long for one.

    >>> safe("re:enc[0-3]")
    're_enc_0-3_'
    """
    name = "/".join(_DOTS.sub("_", part) for part in _UNSAFE.sub("_", text).split("/") if part) or "_"
    return name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}...{name[3 - LONGEST // 2 :]}"


def unique(texts: Iterable[str]) -> dict[str, str]:
    """A safe name for each text, none twice or "total", and without a slash, which would open a group of its own.

    >>> unique(["fc*", "fc?", "fc"])
    {'fc*': 'fc_', 'fc?': 'fc__2', 'fc': 'fc'}
    """
    found: dict[str, str] = {}
    taken = {"total"}  # stands for all of them
    for text in texts:
        name = base = safe(text).replace("/", "_")
        repeats = 1
        while name in taken:
            repeats += 1
            name = f"{base}_{repeats}"
        taken.add(name)
        found[text] = name
    return found
