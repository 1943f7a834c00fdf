"""The benchmark of the frontier: what is left computes what the network did, and every way comes down to the counts."""

import importlib.util
import sys

import pytest
import torch

from tests import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def frontier():
    spec = importlib.util.spec_from_file_location("frontier", BENCHMARKS / "frontier.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture
def data():
    """Ten noisy patterns that a network can tell apart."""
    torch.manual_seed(0)
    labels = torch.arange(512) % 10
    return (torch.rand(10, 784)[labels] + 0.1 * torch.randn(512, 784)).clamp(0, 1), labels


def test_without_its_dead_units_a_network_is_the_same_function(frontier):
    torch.manual_seed(0)
    model = frontier.lenet_300_100()
    for layer in frontier.layers_of(model):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.01
    images = torch.rand(50, 784)
    small, pixels = frontier.compacted(model)
    first, second, third = frontier.layers_of(small)
    assert first.in_features == int(pixels.sum()) < 784
    assert second.in_features < 300
    assert third.in_features < 100
    torch.testing.assert_close(small(images[:, pixels]), model(images))
    assert frontier.left(small) < frontier.left(model)  # weights that lead nowhere are gone
    assert all(layer.weight.any(0).all() for layer in (first, second, third))


@pytest.mark.parametrize(
    ("way", "name"),
    [
        ("L0, ProxAdam", "LeNet-300-100"),
        ("L1, then L0", "LeNet-300-100"),
        ("magnitude", "LeNet-300-100"),
        ("L1 in the loss, cut", "LeNet-300-100"),
        ("magnitude", "LeNet-5"),
    ],
)
def test_a_way_comes_down_to_every_count_and_a_refit_keeps_its_zeros(frontier, data, way, name, monkeypatch):
    monkeypatch.setattr(frontier, "BATCH", 64)
    counts = (30_000, 3_000) if name == "LeNet-300-100" else (6_000, 3_000)
    course = frontier.COURSES[name]._replace(counts=counts, down=40 if name == "LeNet-300-100" else 15, refit=2)
    torch.manual_seed(0)
    model = course.network()
    found = list(frontier.WAYS[way](model, data, course))
    assert [count for count, _ in found] == list(counts)
    for count, network in found:
        assert 0 < frontier.left(network) <= count
        row = frontier.refitted(network, data, data, course)
        assert row["left"] <= frontier.left(network)
        assert row["error"] < 5


def test_the_networks_have_the_weights_that_the_papers_count(frontier):
    assert frontier.size(frontier.lenet_300_100()) == 266_200
    assert frontier.size(frontier.lenet_5()) == 61_470  # LeCun et al., 1998, with all maps connected


def test_the_table_has_the_mean_of_the_seeds_and_the_most_weights_of_any(frontier):
    same = {"way": "L0, ProxAdam", "count": 2662, "shape": "360-170-80"}
    record = [{**same, "seed": seed, "left": 2600 + seed, "error": 2.0 + seed} for seed in range(3)]
    assert "| L0, ProxAdam | 2,602 | 102 | 3.00 ± 1.00 | 2.00, 4.00 | 360-170-80 | 3 |" in frontier.table(
        record, 266_200
    )
