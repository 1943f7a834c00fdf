"""State that a fit may change, and that comes back after it: weights, strengths, modes, carriers, random generators."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.binding.regularizer import Regularizer

Fit = Callable[[nn.Module, Regularizer], object]
"""Trains the model from the weights that it has, under the penalties of the regularizer; what it returns is ignored."""


def check_regularizer(regularizer: object) -> None:
    """Raises unless it is one."""
    if not isinstance(regularizer, Regularizer):
        raise TypeError(f"regularizer is a {type(regularizer).__name__}; build one first: Regularizer(model, L1(1e-4))")


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy on the CPU: `state_dict()` aliases the live weights."""
    return {
        key: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
        for key, value in state.items()
    }


@contextlib.contextmanager
def put_back(regularizer: Regularizer) -> Iterator[None]:
    """After the block, model and strengths are what they were before it."""
    state, strengths = copied(regularizer.model.state_dict()), regularizer.state_dict()
    try:
        yield
    finally:
        regularizer.model.load_state_dict(state)
        regularizer.load_state_dict(strengths)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; after the block every module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def fitting(regularizer: Regularizer) -> Iterator[None]:
    """After the block the optimizers that a fit has made for itself carry nothing: the next one brings its own."""
    before = [binding.carrier for binding in regularizer.resolution.current()]
    try:
        yield
    finally:
        for binding, carrier in zip(regularizer.resolution.current(), before, strict=True):
            if binding.carrier is not None and binding.carrier is not carrier:
                binding.carrier.remove()


def rng_states(model: nn.Module) -> dict[str, Tensor]:
    """The states of torch's random generators, of the CPU and where the model is."""
    cuda = {str(w.device): torch.cuda.get_rng_state(w.device) for w in model.parameters() if w.is_cuda}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_rng(states: Mapping[str, Tensor]) -> None:
    states = {device: state.cpu() for device, state in states.items()}  # `map_location` may have moved them
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state, device)
