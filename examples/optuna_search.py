"""λ and the learning rate together, by Optuna: each trial is a learning rate, and walks a whole path of λ with it.

    pip install '.[optuna]'
    python examples/optuna_search.py             # some half a minute

A path costs little more than its first fit, as every λ starts from the weights of the last. So λ needs no place in the
search space: a trial is worth its path's best score. The path's `stop`, which is asked after each λ, is where a trial
reports, and where Optuna ends one that falls behind. Few rows of scikit-learn's digits, so that both matter.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

import torchreg as tr

try:
    import optuna
except ImportError as error:
    raise SystemExit(
        "this example searches with Optuna, which is missing; in the checkout: pip install '.[optuna]'"
    ) from error

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--trials", type=int, default=12, help="learning rates to try (default: %(default)s)")
parser.add_argument("--points", type=int, default=8, help="λ on each path (default: %(default)s)")
parser.add_argument("--steps", type=int, default=200, help="optimizer steps at each λ (default: %(default)s)")
args = parser.parse_args()

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
train, validation, test = slice(300), slice(300, 900), slice(900, None)
lambdas = [1e-4 * 2**i for i in range(args.points)]  # up from the dense network: dead neurons do not come back


@torch.no_grad()
def accuracy(model, rows):
    return (model(images[rows]).argmax(1) == labels[rows]).float().mean().item()


def walk(lr, stop=None):
    """A path of λ at this learning rate, and the regularizer that it was walked with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    reg = tr.Regularizer(model, tr.L1(1.0))  # any number: the path moves it

    def fit(model, reg):
        optimizer = tr.optim.ProxAdam(model.parameters(), lr=lr, regularizer=reg)
        for _ in range(args.steps):
            batch = torch.randint(300, (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
            optimizer.step()

    with reg.disabled():
        fit(model, reg)
    return tr.path(reg, fit, lambdas=lambdas, score=lambda model: accuracy(model, validation), stop=stop), reg


def objective(trial):
    def stop(path):
        trial.report(path.best().score, step=len(path))
        return trial.should_prune()

    path, _ = walk(trial.suggest_float("lr", 1e-4, 1e-1, log=True), stop)
    best = path.best()
    trial.set_user_attr("best", f"accuracy {best.score:.2%} at λ={best.strength:.1e}, {best.left:,} weights left")
    if len(path) < len(lambdas):
        raise optuna.TrialPruned
    return best.score


optuna.logging.set_verbosity(optuna.logging.WARNING)
sampler = optuna.samplers.TPESampler(seed=0, n_startup_trials=5)
pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=2)
study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
study.optimize(objective, n_trials=args.trials)
for trial in study.trials:
    pruned = trial.state == optuna.trial.TrialState.PRUNED
    ended = f"; ended after {len(trial.intermediate_values)} λ" if pruned else ""
    print(f"lr {trial.params['lr']:.1e}: validation {trial.user_attrs['best']}{ended}")

path, reg = walk(study.best_params["lr"])
print(f"\nthe path at lr {study.best_params['lr']:.1e}\n\n{path}")
path.best().load_into(reg)
print(f"\nits best on images that nothing has seen: {accuracy(reg.model, test):.2%}")
