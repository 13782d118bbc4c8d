"""Members with an ``init_seed``: each starts from the weights of its own seed, in every backend."""

import numpy as np
import pytest
import torch
from torch import nn

import gputune
from gputune.modules.looped import LoopedModule
from gputune.modules.merged import MergedModule
from gputune.modules.module import StackedModule
from problems import Net, fill, largest_difference, make_data, module_loop, shape_of, train_modules
from reference import stream_seed
from refused import refused

EPOCHS = 3
CONFIGS = fill(
    {"lr": 1e-2, "batch_size": 8, "init_seed": 5},
    {"lr": 1e-2, "batch_size": 8},
    {"lr": 3e-2, "batch_size": 8, "init_seed": 0},
    {"lr": 3e-2, "batch_size": 8, "init_seed": 7},
)
ROWS, LABELS = make_data(n=80).inputs[0][0].numpy(), make_data(n=80).y.numpy()


class Fitted(Net):
    """A module that fits its first bias to the training rows, and draws its last one."""

    def start_from(self, x, y):
        self.body[0].bias.copy_(x.mean(0).mean().expand(6))
        self.body[2].bias.copy_(torch.rand(3))


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("kind", [StackedModule, LoopedModule, MergedModule])
def test_a_member_begins_with_the_weights_of_its_seed(kind, coded):
    data = make_data()
    trained = train_modules(kind, Net, CONFIGS, data, EPOCHS, coded=coded)
    for fold in range(2):
        for trial, config in enumerate(CONFIGS):
            alone = module_loop(Net, data, fold, config, EPOCHS)
            assert largest_difference(trained.member(fold, trial), alone) <= 1e-10


def test_the_seed_of_the_search_as_init_seed_changes_nothing():
    data = make_data()
    trained = train_modules(StackedModule, Net, CONFIGS, data, EPOCHS)
    same = fill({"lr": 1e-2, "batch_size": 8}, {"lr": 3e-2, "batch_size": 8})
    others = train_modules(StackedModule, Net, same, data, EPOCHS)
    for mine, other in ((1, 0), (2, 1)):
        assert largest_difference(trained.member(0, mine), others.member(0, other)) == 0


@pytest.mark.parametrize("kind", [StackedModule, LoopedModule])
def test_a_module_that_fits_its_start_to_the_rows_draws_with_its_seed(kind):
    data = make_data()
    network = kind(Fitted, CONFIGS, shape_of(data), seed=0)
    params = network.blocks.views(network.start())
    for fold in range(2):
        for trial, config in enumerate(CONFIGS):
            seed = config.get("init_seed", 0)
            with torch.random.fork_rng():
                torch.manual_seed(stream_seed(seed, "module"))
                plain = Net(5, 3).double()
                torch.manual_seed(stream_seed(seed, "start_from"))
                last = torch.rand(3)
            x, _ = data.training_rows(fold)
            with torch.no_grad():
                plain.body[0].bias.fill_(x[0].mean(0).mean())
                plain.body[2].bias.copy_(last)
            assert largest_difference(network.member(params, fold, trial), plain) <= 1e-12


def test_a_lora_draws_its_first_matrix_with_the_seed():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    study = gputune.tune(
        gputune.lora(base, targets=["0"], modules_to_save=["2"]),
        ROWS.astype(np.float32),
        LABELS,
        space={"lr": 0.1, "rank": 2, "init_seed": [0, 1, 2]},
        scoring="neg_log_loss",
        n_trials=3,
        include_default=False,
        max_epochs=2,
        verbose=0,
    )
    assert len({trial.score for trial in study.trials}) == 3


def test_a_search_over_seeds_shows_their_spread_and_refits_the_best():
    study = gputune.tune(
        Net,
        ROWS.astype(np.float32),
        LABELS,
        space={"lr": 0.03, "init_seed": [0, 1, 2]},
        n_trials=3,
        include_default=False,
        max_epochs=2,
        cv=2,
        scoring="neg_log_loss",
        verbose=0,
    )
    assert len({trial.score for trial in study.trials}) == 3
    first, second = (study.best_model(trial=number).module for number in (0, 1))
    assert largest_difference(first, second) > 0.01


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with refused("an integer >= 0, the seed of the initial weights"):
        gputune.tune(Net, ROWS, LABELS, space={"init_seed": [seed]}, verbose=0)


def test_a_built_in_mlp_has_no_seed_of_its_own():
    with refused("init_seed"):
        gputune.tune("mlp", ROWS, LABELS, space={"init_seed": [1]})
