"""The tests: a folder per package of the library, and what belongs to all of it beside them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
