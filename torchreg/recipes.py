"""Recipes that won a comparison, to start from; each is printed and changed as any other."""

from __future__ import annotations

from torchreg import checks
from torchreg.penalties import L0, L1
from torchreg.schedules import Chain, Geometric
from torchreg.stages import Dense, Recipe, Refit, Regularize


def l1_then_l0(
    epoch: int, *, l1: float = 1e-4, l0: float = 1e-5, top: float = 4500.0
) -> tuple[tuple[L1, Recipe], tuple[L0, Recipe]]:
    """Very few weights: L1 takes the neurons, L0 then takes weights from those that are left, and a refit follows.

    Two penalties, each with the recipe of its part, for `ProxAdam` with lr = 2e-3:

        for penalty, recipe in tr.recipes.l1_then_l0(epoch=len(loader)):
            recipe.stages(tr.Regularizer(model, penalty)).run(fit)

    Adam's metric makes L0 drop a weight where w²·√v ≤ 2·lr·λ: where the loss would miss it least. λ rises fast where
    weights are cheap and slowly where each one counts. `benchmarks/frontier.py` goes this way with LeNet-300-100;
    benchmarks/FRONTIER.md has what comes of it, and what was worse.

    Args:
        epoch: optimizer steps of an epoch. The parts take 4 epochs (dense), 80 (L1), 80 (L0) and 30 (refit).
        l1: λ of L1, in units of loss per unit of |w|: the larger, the fewer neurons are left.
        l0: the λ that L0 begins with, in units of loss.
        top: the last λ of L0 over the first, more than 200: the larger, the fewer weights are left.
    Raises:
        TypeError: `epoch` is no whole number, or another no number.
        ValueError: `epoch` is less than 1, `l1` or `l0` negative, or `top` 200 or less.

    >>> for penalty, recipe in l1_then_l0(epoch=200):
    ...     print(type(penalty).__name__, [f"{type(stage).__name__} {stage.steps:,}" for stage in recipe])
    L1 ['Dense 800', 'Regularize 16,000']
    L0 ['Regularize 16,000', 'Refit 6,000']
    """
    epoch = checks.whole("epoch", epoch)
    top = checks.above("top", top, 200, "λ rises 200 times, then slowly; pass 4500, or more for fewer weights")
    rise = Chain(Geometric(1, 200, steps=16 * epoch), Geometric(200, top, steps=64 * epoch))
    first = Recipe(Dense(4 * epoch), Regularize(80 * epoch))
    return (L1(l1), first), (L0(l0), Recipe(Regularize(80 * epoch, rise), Refit(30 * epoch)))
