"""The named recipes: they do what they are for, on a small problem."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchreg as tr


def test_l1_then_l0_leaves_few_weights_that_know_all():
    torch.manual_seed(0)
    labels = torch.arange(512) % 10
    images = torch.rand(10, 100)[labels] + 0.1 * torch.randn(512, 100)
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    recipe, curve = tr.recipes.l1_then_l0(epoch=8)
    l1, l0 = tr.Regularizer(model, tr.L1(1e-3)), tr.Regularizer(model, tr.L0(1e-5))
    schedule = tr.Schedule(l1, curve)
    zeros, small, seen = [], [], []

    def fit(model, reg, stage):
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=2e-3, regularizer=reg)
        with stage.on(reg, optimizer):
            for _ in range(stage.steps):
                batch = torch.randint(512, (64,))
                seen.append(l1["l1"].factor)
                optimizer.zero_grad()
                (F.cross_entropy(model(images[batch]), labels[batch]) + l1()).backward()
                optimizer.step()
                schedule.step()
        zeros.append(tr.sparsity(reg).zeros)
        small.append(int((model[0].weight.norm(dim=1) < 0.1).sum()))

    for stage in recipe.stages(l0):
        fit(l0.model, l0, stage)
    assert seen == [1.0] * 640 + [0.3] * 800 + [0.0] * 240
    assert zeros[0] == 0 < zeros[1] == zeros[2]
    assert zeros[2] > 0.9 * 5500
    assert small[0] >= 5  # of 50 neurons
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epoch": 0}, ValueError, "epoch=0 must be at least 1"),
        ({"epoch": 100.0}, TypeError, "epoch=100.0 is a float"),
        ({"epoch": 100, "top": 100}, ValueError, "top=100 must be more than 100"),
        ({"epoch": 100, "top": "high"}, TypeError, "pass 4000"),
    ],
    ids=["no steps", "half a step", "no rise", "no number"],
)
def test_what_no_recipe_can_be_made_of_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tr.recipes.l1_then_l0(**arguments)
