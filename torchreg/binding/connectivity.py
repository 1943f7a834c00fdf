"""Units: what in a weight is an input, and what a neuron."""

from __future__ import annotations

from torch import Tensor, nn

from torchreg._distributed import unsharded
from torchreg.binding.selection import ParameterRef

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def masked(entry: ParameterRef) -> bool:
    """torch.nn.utils.prune masks this parameter: the model computes with another."""
    mask = getattr(entry.owner, entry.attribute.removesuffix("_orig") + "_mask", None)
    return entry.attribute.endswith("_orig") and isinstance(mask, Tensor)


def weights(entry: ParameterRef) -> Tensor:
    """The weights that the model computes with: 0 where torch.nn.utils.prune masks, whole where they are sharded."""
    w = entry.parameter.detach()
    if masked(entry):
        w = w.masked_fill(getattr(entry.owner, entry.attribute.removesuffix("_orig") + "_mask") == 0, 0)
    return unsharded(w)


def nonzero(entry: ParameterRef) -> Tensor:
    """A mask of the weights that are not 0."""
    return weights(entry) != 0


def in_plain_order(owner: nn.Module) -> bool:
    """Its weight is (neurons, inputs, ...): no transposed convolution, and no grouped one."""
    return not isinstance(owner, _TRANSPOSED) and getattr(owner, "groups", 1) == 1


def by_input(w: Tensor, owner: nn.Module | None) -> Tensor:
    """A weight of `owner` with neurons and inputs always in the same place.

    Returns:
        (groups, neurons of a group, inputs of a group, kernel ...): in a grouped convolution each group reads inputs of
        its own. The entries of a vector are neurons that read one input.
    """
    groups = owner.groups if isinstance(owner, nn.modules.conv._ConvNd) else 1
    if w.dim() < 2:
        return w.reshape(1, -1, 1)
    w = w.unflatten(0, (groups, -1))
    # Where others have (neurons, inputs, ...), a transposed convolution has (inputs, neurons, ...).
    return w.transpose(1, 2) if isinstance(owner, _TRANSPOSED) else w


def connections(alive: Tensor, owner: nn.Module | None = None) -> Tensor:
    """A mask of (groups, neurons, inputs): the neuron reads the input of `owner` by a weight that is `alive`.

    Without its owner, a weight counts as that of a linear layer or a plain convolution: (neurons, inputs, ...).
    """
    alive = by_input(alive, owner)
    return alive.flatten(3).any(3) if alive.dim() > 3 else alive


def alive_units(alive: Tensor, owner: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """Masks of the inputs and of the neurons that have a weight that is `alive`; a vector has neurons only."""
    reads = connections(alive, owner)
    neurons = reads.any(2)
    return reads.any(1) if alive.dim() > 1 else neurons[:, :0], neurons


def dead_under_relu(entry: ParameterRef) -> tuple[int, int]:
    """(neurons that neither a weight nor a positive bias feeds, all neurons) of a linear layer or convolution.

    Under a ReLU such a neuron is 0 for every input, and neither its weights nor its bias get a gradient.
    """
    fed = connections(nonzero(entry), entry.owner).any(2).flatten()
    bias = getattr(entry.owner, "bias", None)
    if isinstance(bias, Tensor):
        fed = fed | (bias.detach() > 0)
    return int((~fed).sum()), fed.numel()
