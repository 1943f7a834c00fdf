"""Stages: what holds in each, zeros through refits, rewinding, and going on after a crash as if there had been none."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW

import torchreg as tr
from tests.models import Halved, batch, mlp, same, snapshot
from torchreg import Pretrain, Recipe, Refit, Regularize, Sparsify
from torchreg.training.schedules import Linear

OPTIMIZERS = {
    "ProxAdam": lambda model, reg: tr.optim.ProxAdam(model.parameters(), lr=0.03, regularizer=reg),
    "ProxSGD with momentum": lambda model, reg: tr.optim.ProxSGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01, regularizer=reg
    ),
    "AdamW with decay, attached": lambda model, reg: attached(
        AdamW(model.parameters(), lr=0.03, weight_decay=0.1), reg
    ),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def attached(optimizer, reg):
    tr.optim.attach(optimizer, reg)
    return optimizer


def regularized(strength=0.1, **kwargs):
    return tr.Regularizer(mlp(), tr.L1(strength), **kwargs)


def make_fit(make=OPTIMIZERS["ProxAdam"], crash_in=None, log=None):
    """A user's training function: noise from torch's generator in each step, and a crash in the middle of a stage."""
    x, y = batch()
    crashes = iter([crash_in])

    def fit(model, reg, stage):
        optimizer = make(model, reg)
        crash = None
        with stage.on(reg, optimizer):
            for step in range(stage.steps):
                optimizer.zero_grad()
                F.mse_loss(model(x + 0.1 * torch.randn_like(x)), y).backward()
                optimizer.step()
                if log is not None:
                    log(stage, step)
                if step == stage.steps // 2 and crash is None:
                    crash = next(crashes, None) if stage is crash_in else None
                    if crash is not None:
                        raise KeyboardInterrupt

    return fit


def run(stages, fit):
    """The loop over the stages that a user writes."""
    for stage in stages:
        fit(stages.regularizer.model, stages.regularizer, stage)


def zeros(model):
    return {name: w == 0 for name, w in snapshot(model).items() if name in ("fc1.weight", "fc2.weight")}


def trained(recipe, make=OPTIMIZERS["ProxAdam"]):
    reg = regularized()
    run(recipe.stages(reg), make_fit(make))
    return reg.model


# ---------------------------------------------------------------------- what holds


def test_in_each_stage_holds_what_it_says():
    reg = regularized()
    penalty, count = [], []

    def log(stage, step):
        penalty.append(reg().item() > 0)
        count.append(tr.sparsity(reg).zeros)

    run(Recipe(Pretrain(5), Regularize(30), Refit(10), Pretrain(5)).stages(reg), make_fit(log=log))
    assert penalty == 5 * [False] + 30 * [True] + 15 * [False]
    assert count[:5] == 5 * [0]
    assert 0 < count[34] < 45
    assert count[35:45] == 10 * [count[34]]
    assert count[-1] == 0, "a dense stage lets all weights move"


@every_optimizer
def test_the_stages_are_the_training_that_is_written_out(make):
    reg = regularized()
    torch.manual_seed(2)
    run(Recipe(Pretrain(4), Regularize(20, Linear(0.5, 1, steps=10)), Refit(6)).stages(reg), make_fit(make))

    other = regularized()
    model, (x, y) = other.model, batch()

    def train(optimizer, steps, after=lambda: None):
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(model(x + 0.1 * torch.randn_like(x)), y).backward()
            optimizer.step()
            after()

    torch.manual_seed(2)
    optimizer = make(model, other)
    with other.disabled():
        train(optimizer, 4)
    optimizer = make(model, other)
    train(optimizer, 20, tr.Schedule(other, Linear(0.5, 1, steps=10)).step)
    optimizer = make(model, other)
    with other.disabled(), tr.freeze_zeros(other, optimizer):
        train(optimizer, 6)
    assert tr.sparsity(reg).zeros > 0
    assert same(snapshot(reg.model), snapshot(model))


def test_lambda_moves_with_each_step_of_the_optimizer_and_comes_back():
    reg = regularized()
    reg["l1"].factor = 0.7
    factors = []
    fit = make_fit(log=lambda stage, step: factors.append(reg["l1"].factor))
    run(Recipe(Regularize(4, Linear(0, 1, steps=4)), Regularize(2)).stages(reg), fit)
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert reg["l1"].factor == 0.7


def test_a_dict_moves_one_term_and_leaves_the_other():
    reg = tr.Regularizer(mlp(), {"fc1.*": tr.L1(0.1), "fc2.*": tr.L1(0.1)})
    reg["fc2.*"].factor = 0.3
    seen = []
    stages = Recipe(Regularize(2, {"fc1.*": Linear(0, 1, steps=2)})).stages(reg)
    run(stages, make_fit(log=lambda *_: seen.append([term.factor for term in reg.terms.values()])))
    assert seen == [[0.5, 0.3], [1.0, 0.3]]


def test_a_target_is_met_to_the_weight_and_kept_by_the_refit():
    recipe = Recipe(Pretrain(5), Sparsify(100, 0.6), Refit(10))
    assert tr.sparsity(trained(recipe)).zeros == 27  # of 45


def test_what_was_found_is_handed_over():
    reg = regularized()
    optimizer = OPTIMIZERS["ProxAdam"](reg.model, reg)
    with pytest.warns(UserWarning, match="after 0 steps"), Sparsify(60, 0.6).on(reg, optimizer) as found:
        assert (found.factor, reg["l1"].factor) == (0.01, 0.01)
    assert reg["l1"].factor == 1


@every_optimizer
def test_zeros_stay_through_a_refit_and_the_rest_trains_on(make):
    reg = regularized()
    at_start = {}

    def log(stage, step):
        if isinstance(stage, Refit):
            assert all(torch.equal(zero, at_start[name][1]) for name, zero in zeros(reg.model).items())
        else:
            at_start.update(
                {name: (reg.model.get_parameter(name).detach().clone(), z) for name, z in zeros(reg.model).items()}
            )

    run(Recipe(Regularize(40), Refit(20)).stages(reg), make_fit(make, log=log))
    for name, (w, zero) in at_start.items():
        assert zero.any()
        assert (reg.model.get_parameter(name)[~zero] != w[~zero]).all()


def test_after_an_error_in_a_stage_everything_but_the_weights_is_as_before():
    for stage in (Pretrain(4), Regularize(4, Linear(0, 1, steps=4)), Sparsify(50, 0.5), Refit(4)):
        reg = regularized()
        nn.init.zeros_(reg.model.fc1.weight)
        optimizer = OPTIMIZERS["ProxAdam"](reg.model, reg)
        with pytest.raises(KeyboardInterrupt), stage.on(reg, optimizer):
            raise KeyboardInterrupt
        assert reg.enabled
        assert reg["l1"].factor == 1
        assert not optimizer._optimizer_step_post_hooks


# ---------------------------------------------------------------------- rewinding


@pytest.mark.parametrize("rewind", [0, 1])
@every_optimizer
def test_rewinding_restores_the_values_and_leaves_the_zeros(rewind, make):
    reg = regularized()
    nn.init.normal_(reg.model.norm.bias)
    stages = Recipe(Pretrain(3), Regularize(30), Refit(3, rewind=rewind)).stages(reg)
    early, fit = [snapshot(reg.model)], make_fit(make)
    for number, stage in enumerate(stages):
        if number == 2:
            break
        fit(reg.model, reg, stage)
        early.append(snapshot(reg.model))
    assert tr.sparsity(reg).zeros > 0
    for name, w in reg.model.named_parameters():
        dead = early[2][name] == 0 if name in ("fc1.weight", "fc2.weight") else torch.zeros_like(w).bool()
        assert torch.equal(w, early[rewind][name].masked_fill(dead, 0)), name
        assert dead.all() or not torch.equal(w, early[2][name])


def test_toward_an_anchor_rewinding_leaves_what_is_at_the_anchor():
    anchor = mlp(5).state_dict()
    reg = regularized(toward=anchor)
    before, at = snapshot(reg.model), None
    fit = make_fit()
    for stage in Recipe(Pretrain(1), Regularize(40), Refit(2, rewind=0)).stages(reg):
        if isinstance(stage, Refit):
            break
        fit(reg.model, reg, stage)
        at = {name: w == anchor[name] for name, w in snapshot(reg.model).items()}
    for name in ("fc1.weight", "fc2.weight"):
        assert 0 < at[name].sum() < at[name].numel()
        expected = torch.where(at[name], anchor[name], before[name])
        assert torch.equal(reg.model.get_parameter(name), expected)


def test_buffers_rewind_too():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    reg = tr.Regularizer(model, tr.L1(1e-3))
    for stage in Recipe(Pretrain(1), Pretrain(1), Pretrain(1, rewind=0)).stages(reg):
        if stage.rewind == 0:
            assert model[1].num_batches_tracked == 0
        else:
            model(torch.randn(5, 6))


# ---------------------------------------------------------------------- going on

LONG = Recipe(
    Pretrain(4), Regularize(20, Linear(0, 1, steps=10)), Refit(4, rewind=1), Sparsify(50, 0.7), Refit(4, rewind=1)
)


def through(recipe, reg, state=None):
    torch.manual_seed(3)
    stages = recipe.stages(reg)
    if state is not None:
        stages.load_state_dict(state)
    return stages


@pytest.fixture(scope="module")
def uninterrupted():
    reg = regularized()
    run(through(LONG, reg), make_fit())
    return snapshot(reg.model), torch.get_rng_state()


@pytest.mark.parametrize("number", range(5))
def test_run_again_after_an_error_it_ends_as_if_there_had_been_none(number, uninterrupted):
    reg = regularized()
    stages, fit = through(LONG, reg), make_fit(crash_in=LONG[number])
    with pytest.raises(KeyboardInterrupt) as error:  # whose traceback holds the optimizer
        run(stages, fit)
    assert stages.done == number
    assert reg.enabled
    run(stages, fit)
    assert error.type is KeyboardInterrupt
    assert stages.done == 5
    assert same(snapshot(reg.model), uninterrupted[0])
    assert torch.equal(torch.get_rng_state(), uninterrupted[1])


@pytest.mark.parametrize("when", ["begins", "breaks off"])
@pytest.mark.parametrize("number", range(5))
def test_from_a_checkpoint_in_a_new_process_it_ends_the_same(number, when, uninterrupted, tmp_path):
    reg = regularized()
    stages, fit = through(LONG, reg), make_fit(crash_in=LONG[number])

    def loop():
        for stage in stages:
            if when == "begins":
                torch.save(stages.state_dict(), tmp_path / "stages.pt")
            fit(reg.model, reg, stage)

    with pytest.raises(KeyboardInterrupt):
        loop()
    if when == "breaks off":
        torch.save(stages.state_dict(), tmp_path / "stages.pt")

    new = tr.Regularizer(mlp(7), tr.L1(0.9))
    torch.manual_seed(99)
    again = LONG.stages(new)
    again.load_state_dict(torch.load(tmp_path / "stages.pt", weights_only=True))
    assert (again.done, new["l1"].strength) == (number, 0.1)
    run(again, make_fit())
    assert same(snapshot(new.model), uninterrupted[0])


def test_strengths_that_the_loop_changes_are_changed_once():
    reg = regularized()
    stages = Recipe(Regularize(2), Regularize(2)).stages(reg)
    for _ in stages:
        reg["l1"].strength *= 2
        if stages.done == 1:
            break
    assert reg["l1"].strength == pytest.approx(0.4)
    for _ in stages:
        reg["l1"].strength *= 2
    assert reg["l1"].strength == pytest.approx(0.4)


def test_the_optimizer_of_the_last_stage_is_the_carrier():
    reg, made = regularized(), []

    def make(model, reg):
        made.append(OPTIMIZERS["ProxAdam"](model, reg))
        return made[-1]

    run(Recipe(Pretrain(2), Sparsify(50, 0.5), Refit(2)).stages(reg), make_fit(make))
    assert {binding.carrier for binding in reg.bindings()} == {made[-1].attachment}


def test_a_recipe_that_is_through_is_left_alone():
    reg = regularized()
    stages = Recipe(Pretrain(2)).stages(reg)
    run(stages, make_fit())
    nn.init.ones_(reg.model.fc1.weight)
    assert list(stages) == []
    assert (reg.model.fc1.weight == 1).all()


def test_a_longer_recipe_goes_on_from_a_shorter_one():
    reg = regularized()
    short = Recipe(Pretrain(2), Regularize(4)).stages(reg)
    run(short, make_fit())
    longer = Recipe(Pretrain(2), Regularize(4), Refit(3)).stages(reg)
    longer.load_state_dict(short.state_dict())
    assert list(longer) == [Refit(3)]


def test_only_what_is_still_needed_is_kept():
    reg = regularized()
    stages = Recipe(Pretrain(1), Pretrain(1), Pretrain(1, rewind=1), Pretrain(1, rewind=0), Pretrain(1)).stages(reg)
    assert [sorted(stages.state_dict()["kept"]) for _ in stages] == [[0], [0, 1], [0, 1], [0], []]


def foreign(**changes):
    """A state of `Recipe(Pretrain(1), Pretrain(1))`, one stage done."""
    reg = regularized()
    stages = Recipe(Pretrain(1), Pretrain(1)).stages(reg)
    for _ in stages:
        if stages.done == 1:
            break
    state = copy.deepcopy(stages.state_dict())
    state.update(changes)
    return state


@pytest.mark.parametrize(
    ("recipe", "state", "error", "match"),
    [
        (Recipe(Pretrain(1)), lambda: {"done": 1}, TypeError, "expected a state with done, start, kept"),
        (Recipe(Pretrain(1)), lambda: foreign(done=2), ValueError, "2 stages done, and the recipe has 1"),
        (Recipe(Pretrain(1)), lambda: foreign(done=-1), ValueError, "done=-1"),
        (Recipe(Pretrain(1)), lambda: foreign(start={}), TypeError, "model, strengths, rng"),
        (
            Recipe(Pretrain(1), Pretrain(1), Pretrain(1, rewind=0)),
            foreign,
            ValueError,
            "has not kept the weights after stage 0",
        ),
        (
            Recipe(Pretrain(1), Pretrain(1)),
            lambda: foreign(start={**foreign()["start"], "model": nn.Linear(2, 2).state_dict()}),
            ValueError,
            r"another model: it has weight in shape \(2, 2\), here it is in None",
        ),
        (
            Recipe(Pretrain(1), Pretrain(1)),
            lambda: foreign(start={**foreign()["start"], "strengths": {"l2": {"strength": 1.0, "factor": 1.0}}}),
            ValueError,
            "other terms",
        ),
    ],
    ids=["no state", "too many done", "negative", "no start", "not kept", "another model", "other terms"],
)
def test_a_state_of_something_else_is_refused_and_changes_nothing(recipe, state, error, match):
    reg = tr.Regularizer(mlp(4), tr.L1(0.3))
    stages, before = recipe.stages(reg), snapshot(reg.model)
    with pytest.raises(error, match=match):
        stages.load_state_dict(state())
    assert (stages.done, reg["l1"].strength) == (0, 0.3)
    assert same(snapshot(reg.model), before)


# ---------------------------------------------------------------------- recipes


def test_a_recipe_is_a_tuple_of_stages():
    recipe = Recipe(Pretrain(1), Regularize(2), Refit(3))
    assert recipe == (Pretrain(1), Regularize(2), Refit(3))
    assert Recipe(*recipe[:2], dataclasses.replace(recipe[2], steps=9)) == (Pretrain(1), Regularize(2), Refit(9))
    assert list(recipe.stages(regularized())) == list(recipe)
    for twin in (copy.deepcopy(recipe), copy.copy(recipe), pickle.loads(pickle.dumps(recipe)), eval(repr(recipe))):
        assert type(twin) is Recipe
        assert twin == recipe


def test_repeated_it_goes_round_and_rewinds_to_the_same_point():
    recipe = Recipe(Pretrain(2), *Recipe(Regularize(20), Refit(2)).repeat(3))
    assert recipe == (Pretrain(2), *3 * (Regularize(20), Refit(2)))
    assert Recipe(Regularize(1)).repeat(1) == (Regularize(1),)
    tickets = Recipe(Pretrain(2), Regularize(20), Refit(4, rewind=1)).repeat(2)
    reg = regularized()
    stages, fit, first = tickets.stages(reg), make_fit(), None
    for stage in stages:
        if stage.rewind is not None:
            assert all(torch.equal(w[~dead], first[name][~dead]) for name, (w, dead) in live(reg.model).items())
        fit(reg.model, reg, stage)
        first = snapshot(reg.model) if stages.done == 0 else first
    assert tr.sparsity(reg).zeros > 0


def live(model):
    return {name: (model.get_parameter(name), zero) for name, zero in zeros(model).items()}


def test_it_prints_as_a_table():
    recipe = Recipe(
        Pretrain(1500),
        Regularize(20, {"l1": Linear(0, 1, steps=3)}),
        Sparsify(60, 0.95),
        Refit(3, rewind=0),
        Sparsify(60, Linear(0.5, 0.9, steps=50)),
    )
    rows = [line.split("  ") for line in str(recipe).splitlines()]
    assert [row[-1] for row in rows[2:-1]] == [
        "penalty off",
        "penalty on, λ times {'l1': Linear(start=0.0, end=1.0, steps=3)}",
        "penalty on, λ moves to 95.00% zeros",
        "penalty off, zeros kept; from the weights of the beginning",
        "penalty on, λ moves to Linear(start=0.5, end=0.9, steps=50)",
    ]
    assert rows[-1][-1] == "1,643"
    assert repr(recipe[:2]) == f"(Pretrain(steps=1500), {recipe[1]!r})"
    assert repr(Refit(3, rewind=0)) == "Refit(steps=3, rewind=0)"


class Shrink(Regularize):
    """A stage of one's own: zeros that have come do not revive."""

    @contextlib.contextmanager
    def on(self, reg, optimizer):
        with super().on(reg, optimizer) as schedule, tr.freeze_zeros(reg, optimizer):
            yield schedule


def test_a_stage_of_ones_own_takes_part():
    reg = regularized()
    before = {}
    fit = make_fit()
    for stage in Recipe(Regularize(20), Shrink(20), Refit(5)).stages(reg):
        before[type(stage)] = zeros(reg.model)
        fit(reg.model, reg, stage)
    for name, zero in before[Shrink].items():
        assert zero.any()
        assert (before[Refit][name] | ~zero).all()
    assert repr(Shrink(20)) == "Shrink(steps=20)"


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Recipe(), ValueError, "no stages trains nothing"),
        (lambda: Recipe(Refit(3)), ValueError, "stage 1, Refit.* has no zeros to keep, as nothing comes before it"),
        (lambda: Recipe(Pretrain(1), Refit(3)), ValueError, r"as Pretrain\(steps=1\) comes before it"),
        (lambda: Recipe(Regularize(1), Pretrain(1), Refit(3)), ValueError, "stage 3, Refit.* has no zeros to keep"),
        (lambda: Recipe(Pretrain(1), "refit"), TypeError, "stage 2 is 'refit', which is not a stage"),
        (lambda: Recipe(Pretrain(1), Recipe(Pretrain(1))), TypeError, r"\*recipe"),
        (lambda: Recipe(Pretrain(1, rewind=0)), ValueError, "rewinds to no earlier point"),
        (lambda: Recipe(Regularize(1), Refit(1, rewind=1)), ValueError, "it starts after stage 1"),
        (lambda: Recipe(Pretrain(1)).repeat(0), ValueError, "times=0"),
        (lambda: Pretrain(0), ValueError, "steps=0"),
        (lambda: Pretrain(1.5), TypeError, "steps=1.5"),
        (lambda: Refit(-3), ValueError, "steps=-3"),
        (lambda: Refit(3, rewind=-1), ValueError, "rewind=-1"),
        (lambda: Regularize(3, 0.5), TypeError, "0.5 is not a curve"),
        (lambda: Regularize(3, {"l1": None}), TypeError, "None is not a curve"),
        (lambda: Sparsify(49, 0.5), ValueError, "steps=49 must be at least 50"),
        (lambda: Sparsify(60, 1.0), ValueError, "must be below 1"),
        (lambda: Sparsify(60, 0), ValueError, "target=0"),
        (lambda: Recipe(Regularize(3, {"l2": Linear(0, 1, 3)})).stages(regularized()), ValueError, "no term 'l2'"),
        (lambda: Recipe(Sparsify(60, 0.5, term="l2")).stages(regularized()), ValueError, "no term 'l2' to move"),
        (lambda: Recipe(Regularize(3, lambda step: -1.0)).stages(regularized()), ValueError, "-1.0"),
        (lambda: Recipe(Pretrain(3)).stages(mlp()), TypeError, "build one first"),
    ],
)
def test_nonsense_is_refused_at_construction(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_regularizer_that_is_disabled_is_refused_and_left_disabled():
    reg = regularized()
    optimizer = OPTIMIZERS["ProxAdam"](reg.model, reg)
    reg.disable()
    with pytest.raises(ValueError, match="regularizer is disabled"):
        Recipe(Pretrain(3)).stages(reg)
    for stage in (Regularize(3), Sparsify(60, 0.5)):
        with pytest.raises(ValueError, match="regularizer is disabled"), stage.on(reg, optimizer):
            pass
    assert not reg.enabled


def test_weights_in_which_no_zeros_can_be_kept_are_refused():
    model = mlp()
    reg = tr.Regularizer(model, tr.L1(0.1))
    nn.utils.parametrize.register_parametrization(model.fc1, "weight", Halved())
    with pytest.raises(ValueError, match=r"fc1\.weight is computed by a parametrization"):
        Recipe(Regularize(3)).stages(reg)


@pytest.mark.parametrize("stage", [Regularize(3), Refit(3)])
def test_what_is_no_optimizer_is_refused(stage):
    reg = regularized()
    nn.init.zeros_(reg.model.fc1.weight)
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got MLP"), stage.on(reg, reg.model):
        pass


def test_too_few_steps_of_the_optimizer_are_told():
    reg = regularized()
    stages = Recipe(Regularize(30, Linear(0, 1, 30))).stages(reg)
    with pytest.warns(UserWarning, match="ended after 0 steps of ProxAdam") as told:
        run(stages, lambda model, reg, stage: enter(stage, reg, OPTIMIZERS["ProxAdam"](model, reg)))
    assert told[0].filename == __file__


def enter(stage, reg, optimizer):
    with stage.on(reg, optimizer):
        pass


def test_a_refit_without_zeros_is_told():
    reg = regularized()
    with pytest.warns(UserWarning, match=r"keeps no zeros, as no weight of .* is zero; a penalty in the loss") as told:
        enter(Refit(3), reg, SGD(reg.model.parameters(), lr=0.1))
    assert told[0].filename == __file__


class Fragile(nn.Linear):
    """A model whose weights cannot be copied once, between two stages."""

    fails = False

    def get_extra_state(self):
        if self.fails:
            self.fails = False
            raise MemoryError("no memory for a copy of the weights")
        return 0

    def set_extra_state(self, state):
        pass


def test_after_an_error_between_two_stages_the_stage_that_ended_is_trained_anew():
    def through_all(breaks):
        torch.manual_seed(0)
        model = Fragile(6, 3)
        reg, begun = tr.Regularizer(model, tr.L1(0.1)), []
        stages, fit = Recipe(Pretrain(5), Regularize(5)).stages(reg), make_fit()
        for attempt in range(2 if breaks else 1):
            try:
                for stage in stages:
                    begun.append((type(stage), model.weight.abs().sum().item()))
                    fit(model, reg, stage)
                    model.fails = breaks and attempt == 0
            except MemoryError:
                assert stages.done == 0
        return begun, snapshot(model)

    (straight, expected), (again, weights) = through_all(False), through_all(True)
    assert again == [straight[0], *straight]
    assert same(weights, expected)
