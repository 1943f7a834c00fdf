"""Tags: the names under which numbers are logged, `metric/<parameter or term>`."""

from __future__ import annotations

import re
from collections.abc import Iterable

_UNSAFE = re.compile(r"[^\w./-]", re.ASCII)


def safe(text: str) -> str:
    """`text` in letters, digits and `_ . / -` alone: parentheses blank a custom chart, and some loggers refuse more.

    >>> safe("re:enc[0-3]")
    're_enc_0-3_'
    """
    return _UNSAFE.sub("_", text).strip("/") or "_"


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
