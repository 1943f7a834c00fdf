"""Names meet maths here: which parameters, under which penalty, with which λ."""

from torchreg.binding.bindings import Binding, Term
from torchreg.binding.loss import LastLoss, RegularizedLoss
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import ParameterRef, select

__all__ = ["Binding", "LastLoss", "ParameterRef", "RegularizedLoss", "Regularizer", "Term", "select"]
