"""Plain-text tables, as `explain()`, `sparsity()` and the command line print them."""

from __future__ import annotations

from collections.abc import Sequence


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A table with two spaces between its columns. The columns whose numbers are in `right` are aligned to the right.

    >>> print(render_table(["name", "count"], [["fc1.weight", "30"], ["fc2", "1200"]], right=[1]))
    name        count
    ----------  -----
    fc1.weight     30
    fc2          1200
    """
    # A parameter's name may contain characters that end the line or move a terminal's cursor.
    header, *rows = [[printable(cell, len(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def printable(text: str, longest: int = 120) -> str:
    """`text` for a terminal: control characters become escapes, and a long text is cut after `longest` characters.

    >>> print(printable("fc1\\x1b[31m.weight"))
    fc1\\x1b[31m.weight
    """
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shape_text(shape: Sequence[int]) -> str:
    """`(300, 784)` as `300×784`; a 0-d shape as `scalar`."""
    return "×".join(map(str, shape)) or "scalar"
