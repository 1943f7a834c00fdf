"""Inspection of a trained model: its exact zeros, and certificates that it is a solution."""

from torchreg.inspection.certificates import Stationarity, duality_gap, lambda_max, stationarity
from torchreg.inspection.zero_counts import LayerSparsity, Sparsity, sparsity

__all__ = ["LayerSparsity", "Sparsity", "Stationarity", "duality_gap", "lambda_max", "sparsity", "stationarity"]
