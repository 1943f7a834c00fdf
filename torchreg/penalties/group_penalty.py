"""The base of penalties of group norms: which entries form a group, and how much each group counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchreg._tensors import Layout, Step
from torchreg.penalties.base import Penalty
from torchreg.penalties.groups import Groups, GroupWeights

if TYPE_CHECKING:
    from typing_extensions import Self


class GroupPenalty(Penalty):
    """A penalty of the norms of groups, each with a weight: its fields `groups` and `group_weights`."""

    groups: Groups
    group_weights: Sequence[float] | Tensor | None

    convex = True
    separable = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, Groups):
            raise TypeError(f"expected groups=Rows() or groups=Columns(), got groups={self.groups!r}")
        if self.group_weights is not None and not isinstance(self.group_weights, GroupWeights):
            object.__setattr__(self, "group_weights", GroupWeights(self.group_weights))

    def check(self, w: Tensor) -> None:
        """Raises a ValueError if `w` has fewer than two dimensions, or another number of groups than of weights."""
        self.weight_of_groups(w)

    def weight_of_groups(self, w: Tensor) -> Step:
        """weight_g: a number, or a tensor that broadcasts against the norms of `w`'s groups."""
        if isinstance(self.group_weights, GroupWeights):
            return self.group_weights.on(w, self.groups)
        return math.sqrt(self.groups.size(w))

    def on_part(self, layout: Layout) -> Self:
        new = object.__new__(type(self))  # unchecked: the strengths of a compiled graph are tensors
        new.__dict__.update(self.__dict__, groups=self.groups.on_part(layout))
        return new


def normalized(w: Tensor, groups: Groups) -> Tensor:
    """w_g/‖w_g‖₂, and 0 if a group is zero."""
    norms = groups.norms(w)
    return w / torch.where(norms == 0, 1.0, norms)
