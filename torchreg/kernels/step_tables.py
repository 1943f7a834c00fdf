"""The tables that a step in one pass takes: a row of addresses and a row of numbers for each weight."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchreg.kernels.native import Library


class AdamNumbers(NamedTuple):
    """w ← prox(w − lr·m̂/(√v̂ + eps)), as `torch.optim.Adam` and `AdamW` have it.

    Attributes:
        unit: the mean of a constant gradient 1, before its bias is corrected.
        decay: weight decay: of the weight itself if `decoupled` is not 0, else in the gradient.
        sign: −1 to maximize.
        key: of the random bits that bfloat16 is rounded with; −1 to round to nearest.
        strength1, strength2: λ₁ and λ₂ of λ₁Σ|w| + λ₂Σw².
    """

    unit: float
    lr: float
    decay: float
    decoupled: float
    sign: float
    beta1: float
    beta2: float
    eps: float
    key: float
    strength1: float
    strength2: float


class SGDNumbers(NamedTuple):
    """w ← prox(w − lr·b), b ← momentum·b + gain·g; with `ahead`, Nesterov's momentum, prox(w − lr·(g + ahead·b)).

    Attributes:
        unit: how far a constant gradient 1 moves a weight at lr 1.
        decay, sign, key, strength1, strength2: as for Adam, with the decay in the gradient.
    """

    unit: float
    lr: float
    decay: float
    sign: float
    momentum: float
    gain: float
    ahead: float
    key: float
    strength1: float
    strength2: float


FILLED_IN = {AdamNumbers: 8, SGDNumbers: 3}
"""How many numbers of a row the library fills in itself."""


@dataclass
class Tables:
    """Rows of addresses and numbers, one a weight, for `Library.adam` or `Library.sgd`.

    The addresses are those of w, its gradient, its buffers (adam: m, v, amsgrad's maximum; sgd: b) and its anchor, 0
    for none; the address and the dtype of the count of steps, 0 for none; then the number of weights and their dtype.
    The memory of a row must have one order, and stay until the call has come back.
    """

    addresses: array[int] = field(default_factory=lambda: array("q"))
    numbers: array[float] = field(default_factory=lambda: array("d"))
    rows: int = 0
    address_width: int = 0
    number_width: int = 0
    filled_in: int = 0

    def add(self, addresses: Sequence[int]) -> None:
        """Adds a weight, its numbers still to come."""
        self.addresses.extend(addresses)
        self.address_width = len(addresses)
        self.rows += 1

    def number(self, rows: Sequence[AdamNumbers | SGDNumbers]) -> None:
        """Sets the numbers of all weights."""
        self.numbers = array("d")
        for row in rows:
            self.numbers.extend((*row, *(0.0 for _ in range(FILLED_IN[type(row)]))))
        self.number_width = len(self.numbers) // len(rows)
        self.filled_in = FILLED_IN[type(rows[0])]
        self._room = array("q", bytes(8 * self.rows))

    def run(self, step: Any, library: Library) -> None:
        """One step of all weights, in torch's threads."""
        a, b, room = (table.buffer_info()[0] for table in (self.addresses, self.numbers, self._room))
        step(a, b, self.rows, room, library.team, library.threads)
