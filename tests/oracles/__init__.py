"""Answers found another way: exact fractions, bisection and other people's solvers. Nothing here imports torchreg."""

from tests.oracles.diabetes import diabetes as diabetes
from tests.oracles.groups import Grouped as Grouped
from tests.oracles.separable import Separable as Separable
from tests.oracles.separable import elastic_net as elastic_net
from tests.oracles.separable import l1 as l1
from tests.oracles.separable import l2 as l2
from tests.oracles.separable import to_numpy as to_numpy
