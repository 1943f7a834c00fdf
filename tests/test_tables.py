"""Plain-text tables."""

import pytest

from torchreg._tables import render_table, shape_text


def test_columns_are_aligned_and_numbers_flush_right():
    assert render_table(["name", "count", "note"], [["fc1", "30", "x"], ["output", "1200", ""]], right=[1]).split(
        "\n"
    ) == [
        "name    count  note",
        "------  -----  ----",
        "fc1        30  x",
        "output   1200",
    ]


def test_no_line_ends_in_spaces():
    lines = render_table(["a", "note"], [["1", ""], ["2", "long note"]]).split("\n")
    assert lines == [line.rstrip() for line in lines]


def test_a_table_without_rows_is_its_header():
    assert render_table(["name", "count"], []) == "name  count\n----  -----"


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        render_table(["name", "count"], [["a", "1", "extra"]])


@pytest.mark.parametrize(
    ("shape", "text"),
    [((), "scalar"), ((7,), "7"), ((300, 784), "300×784"), ((0, 2), "0×2"), ((8, 3, 5, 5), "8×3×5×5")],
)
def test_a_shape_is_written_with_crosses(shape, text):
    assert shape_text(shape) == text


def test_a_cell_with_control_characters_is_one_line():
    lines = render_table(["name", "note"], [["fc1\r\n\x1b[2J", "ties\u202e"], ["fc2", ""]]).split("\n")
    assert lines[2].split() == [r"fc1\r\n\x1b[2J", r"ties\u202e"]
    assert len(lines) == 4
