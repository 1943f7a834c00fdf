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
    zeros, neurons = {}, {}

    def fit(model, reg, stage):
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=2e-3, regularizer=reg)
        with stage.on(reg, optimizer):
            for _ in range(stage.steps):
                batch = torch.randint(512, (64,))
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        key = (*reg.terms, type(stage).__name__)
        zeros[key] = tr.sparsity(reg).zeros
        neurons[key] = int(model[0].weight.any(1).sum())

    for penalty, recipe in tr.recipes.l1_then_l0(epoch=8, l1=1e-3):
        recipe.stages(tr.Regularizer(model, penalty)).run(fit)
    assert list(zeros) == [("l1", "Dense"), ("l1", "Regularize"), ("l0", "Regularize"), ("l0", "Refit")]
    dense, regularized, *last = zeros.values()
    assert dense == 0 < regularized < last[0] == last[1]
    assert last[0] > 0.9 * 5500
    assert neurons["l1", "Regularize"] < 50 == neurons["l1", "Dense"]
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epoch": 0}, ValueError, "epoch=0 must be at least 1"),
        ({"epoch": 100.0}, TypeError, "epoch=100.0 is a float"),
        ({"epoch": 100, "top": 200}, ValueError, "top=200 must be more than 200"),
        ({"epoch": 100, "top": "high"}, TypeError, "pass 4500"),
        ({"epoch": 100, "l1": -1.0}, ValueError, "-1.0"),
        ({"epoch": 100, "l0": float("nan")}, ValueError, "nan"),
    ],
    ids=["no steps", "half a step", "no rise", "no number", "negative", "NaN"],
)
def test_what_no_recipe_can_be_made_of_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tr.recipes.l1_then_l0(**arguments)
