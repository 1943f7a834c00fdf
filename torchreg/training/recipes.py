"""Recipes to start from, each measured by a benchmark; they are printed and changed as any other."""

from __future__ import annotations

from torchreg._checks import greater_than, whole_number
from torchreg.training.schedules import Chain, Geometric, Steps
from torchreg.training.stage import Pretrain, Refit, Regularize
from torchreg.training.stages import Recipe


def l1_then_l0(epoch: int, top: float = 4000.0) -> tuple[Recipe, Steps]:
    """Very few weights: L1 takes the neurons, L0 the weights of those that are left, and a refit follows.

    The recipe is for an L0 by the prox, the curve for an L1 in the loss: whole while neurons go, 0.3 of that beside L0,
    which alone would fit the noise with the few weights left, and none in the refit. The model comes from a few epochs
    without either.

        recipe, curve = tr.recipes.l1_then_l0(epoch=len(loader))
        l1, l0 = tr.Regularizer(model, tr.L1(1e-4)), tr.Regularizer(model, tr.L0(1e-5))
        schedule = tr.Schedule(l1, curve)
        recipe.stages(l0).run(fit)

    where `fit(model, reg, stage)` adds `l1()` to the loss, steps with `ProxAdam(..., lr=2e-3, regularizer=reg)`, and
    calls `schedule.step()` after each step. Adam's metric makes L0 drop a weight where w²·√v ≤ 2·lr·λ: where the loss
    would miss it least. `benchmarks/frontier.py` goes this way with LeNet-300-100; benchmarks/FRONTIER.md has what
    comes of it, and what else was tried.

    Args:
        epoch: optimizer steps of an epoch. The stages take 80, 100 and 30 epochs.
        top: λ of L0 in the end over that in the beginning: the larger, the fewer weights are left. λ rises to the
            100-fold in 24 epochs, and slowly from there on: the last weights are the hardest to choose.
    Returns:
        The recipe, and the curve of L1's factor over all of its steps.
    Raises:
        TypeError: `epoch` is not a whole number, or `top` not a number.
        ValueError: `epoch` is less than 1, or `top` 100 or less.
    Source: Hazimeh and Mazumder, 2020, for L1 beside L0.

    >>> recipe, curve = l1_then_l0(epoch=100)
    >>> [f"{type(stage).__name__}: {stage.steps:,} steps" for stage in recipe]
    ['Pretrain: 8,000 steps', 'Regularize: 10,000 steps', 'Refit: 3,000 steps']
    >>> [curve(step) for step in (0, 8000, 18000)]
    [1.0, 0.3, 0.0]
    """
    epoch = whole_number("epoch", epoch)
    top = greater_than("top", top, 100, "λ of L0 rises so many times; pass 4000, or more for fewer weights")
    rise = Chain(Geometric(1, 100, steps=24 * epoch), Geometric(100, top, steps=76 * epoch))
    recipe = Recipe(Pretrain(80 * epoch), Regularize(100 * epoch, rise), Refit(30 * epoch))
    return recipe, Steps(1, {80 * epoch: 0.3, 180 * epoch: 0})
