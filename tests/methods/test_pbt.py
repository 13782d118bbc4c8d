"""Population based training: the options, the choice of sources, and the perturbation of values."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.stats import loguniform

import gputune
from gputune.methods.lineages import Exchange, exchanges, generator
from gputune.methods.pbt import PopulationBased
from gputune.spaces.perturbation import Perturbation, movable_keys


def decide(means, *, epoch=5, shapes=None, seed=0, protected=None, **options):
    means = dict(enumerate(means)) if isinstance(means, list) else means
    shapes = dict.fromkeys(means) if shapes is None else shapes
    return exchanges(PopulationBased(**options), epoch, means, shapes, seed, protected)


def test_the_worst_quarter_copies_the_best_quarter():
    means = [0.5, 0.9, 0.1, 0.8, 0.2, 0.6, 0.7, 0.4]
    changes = decide(means)
    assert [change.number for change in changes] == [2, 4]
    assert {change.weights for change in changes} <= {1, 3}
    assert all(c.values == c.weights and c.is_perturbed for c in changes)
    sources = {decide(means, seed=seed)[0].weights for seed in range(20)}
    assert sources == {1, 3}
    assert not any(change.is_perturbed for change in decide(means, explore=False))


def test_no_fraction_and_no_comparison_change_nothing():
    assert decide([0.1, 0.9, 0.2, 0.3], fraction=0) == []
    assert decide([0.1, 0.9, 0.2, 0.3], epoch=4) == []
    assert decide([0.1, 0.9, 0.2, 0.3], epoch=5, burn_in=6) == []
    assert len(decide([0.1, 0.9, 0.2, 0.3], epoch=5, burn_in=5)) == 1


def test_the_draws_depend_only_on_the_trial():
    """A trial draws the same source, also if further trials are compared at the same time."""
    means = {number: number / 10 for number in range(8)}
    changes = decide(means)
    assert changes == decide(dict(reversed(means.items())))
    a = generator(0, "source", 5, 1).random_sample()
    assert a != generator(0, "source", 10, 1).random_sample()


def test_a_diverged_trial_copies_and_is_never_copied():
    changes = decide([math.nan, 0.3, math.nan, 0.2], fraction=0.5)
    assert [(c.number in (0, 2), c.weights in (1, 3)) for c in changes] == [(True, True)] * 2
    alone = decide([math.nan, 0.3], shapes={0: "a", 1: "b"}, fraction=0.5)
    assert alone == []


def test_a_protected_trial_is_not_replaced():
    means = [0.5, 0.9, 0.1, 0.8, 0.2, 0.6, 0.7, 0.4]
    assert [change.number for change in decide(means, protected=2)] == [4, 7]
    assert [change.number for change in decide(means, protected=1)] == [2, 4]
    # Only the source is left, which no trial replaces.
    assert decide([0.1, 0.9], protected=0) == []
    assert decide([0.1, 0.9], shapes={0: "a", 1: "b"}, protected=0) == []
    fast = {0: 0.5, 2: 0.4, 4: 0.3, 6: 0.1, 1: 0.9, 3: 0.8, 5: 0.2, 7: 0.0}
    changes = decide(fast, epoch=2, interval=[2, 6], protected=4)
    assert changes == [Exchange(2, 1, 1, True), Exchange(6, 0, 0, True)]


def test_another_architecture_is_not_copied():
    shapes = {0: "a", 1: "b", 2: "a", 3: "b"}
    assert decide([0.1, 0.9, 0.8, 0.7], shapes=shapes) == [Exchange(0, 0, 0, True)]
    assert decide([0.1, 0.9, 0.8, 0.7], shapes=shapes, explore=False) == []
    assert decide([0.1, 0.7, 0.9, 0.8], shapes=shapes)[0].weights == 2


def test_subpopulations_are_compared_at_their_own_intervals():
    # trials 0, 2, 4, 6 are compared every 2 epochs, trials 1, 3, 5, 7 every 6 epochs
    means = {0: 0.5, 2: 0.4, 4: 0.3, 6: 0.1, 1: 0.9, 3: 0.8, 5: 0.2, 7: 0.0}
    fast = decide(means, epoch=2, interval=[2, 6])
    # Trial 4 is just above the worst trial, and copies weights and values of the best slow trial.
    assert fast == [Exchange(4, 1, 1, True), Exchange(6, 0, 0, True)]
    only_copied = decide(means, epoch=2, interval=[2, 6], explore=False)
    assert only_copied == [Exchange(4, 1, 1, False), Exchange(6, 0, 0, False)]
    both = decide(means, epoch=6, interval=[2, 6])
    # A slow trial copies only the weights of a fast trial. The values are of the best slow trial.
    slow = [Exchange(5, 0, 1, True), Exchange(7, 1, 1, True)]
    assert both == [fast[0], slow[0], fast[1], slow[1]]
    assert decide(means, epoch=3, interval=[2, 6]) == []
    # No worse trial is copied.
    slow_lead = {n: (mean if n % 2 else mean - 1) for n, mean in means.items()}
    assert [c.number for c in decide(slow_lead, epoch=6, interval=[2, 6])] == [4, 6, 7]


def test_epochs_of_comparisons():
    assert PopulationBased(interval=3).stops(10) == [3, 6, 9]
    assert PopulationBased(interval=3, burn_in=4).stops(10) == [6, 9]
    assert PopulationBased(interval=[2, 3]).stops(7) == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "PopulationBased(interval=...) must be an integer of at least 1, got 0"),
        (
            {"interval": [2, 2]},
            "PopulationBased(interval=...) must be a number of epochs, or a list of different "
            "numbers of epochs, got [2, 2]. For example [2, 8].",
        ),
        (
            {"fraction": 0.6},
            "PopulationBased(fraction=...) must be a number from 0 to 0.5, got 0.6",
        ),
        (
            {"factors": (0.5, 0)},
            "PopulationBased(factors=...) must be a list of finite numbers > 0, got (0.5, 0). "
            "For example (0.8, 1.25).",
        ),
        ({"resample": 2}, "PopulationBased(resample=...) must be a number from 0 to 1, got 2"),
        ({"explore": 1}, "PopulationBased(explore=...) must be True or False, got 1"),
        ({"burn_in": -1}, "PopulationBased(burn_in=...) must be an integer of at least 0, got -1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(gputune.InputError) as error:
        PopulationBased(**options)
    assert message in str(error.value)


def test_too_few_epochs_are_refused():
    message = (
        r"PopulationBased\(interval=...\) must leave a comparison below max_epochs=5, got 5. "
        "Lower it, or train longer."
    )
    with pytest.raises(gputune.InputError, match=message):
        PopulationBased().stops(5)
    alone = r"interval=...\) must leave a comparison below max_epochs=1, got 1. Train longer."
    with pytest.raises(gputune.InputError, match=alone):
        PopulationBased(interval=1).stops(1)
    with pytest.raises(gputune.InputError, match=r"burn_in=...\) must leave a comparison"):
        PopulationBased(interval=2, burn_in=9).stops(10)


SPACE = [
    {
        "lr": loguniform(1e-4, 1e-1),
        "dropout": stats.uniform(0, 0.5),
        "momentum": [0.0, 0.5, 0.9],
        "weight_decay": [1e-3, 1e-5, 1e-4],
        "width": [8, 16],
        "loss__label_smoothing": [0.1],
    }
]
PARAMS = {
    "lr": 1e-3,
    "dropout": 0.2,
    "momentum": 0.5,
    "weight_decay": 1e-4,
    "width": 8,
    "loss__label_smoothing": 0.1,
}


def test_only_values_of_the_space_move_and_stay_within_it():
    assert movable_keys(PARAMS, SPACE) == ["lr", "dropout", "momentum", "weight_decay"]
    rng = np.random.RandomState(0)
    params = PARAMS
    seen = set()
    for _ in range(300):
        params = Perturbation((0.8, 1.25), 0.25).move(params, SPACE, rng)
        assert 1e-4 <= params["lr"] <= 1e-1 and 0 < params["dropout"] <= 0.5
        assert params["momentum"] in (0.5, 0.9)  # zero has other tensors
        assert params["weight_decay"] in SPACE[0]["weight_decay"]
        assert (params["width"], params["loss__label_smoothing"]) == (8, 0.1)
        assert type(params["lr"]) is float
        seen.add(params["lr"])
    assert len(seen) > 200


def test_factors_multiply_and_lists_move_to_a_neighbor():
    move = Perturbation((1.25,), 0).move
    moved = move(PARAMS, SPACE, np.random.RandomState(0))
    assert moved["lr"] == 1e-3 * 1.25 and moved["dropout"] == 0.2 * 1.25
    assert moved["momentum"] == 0.9
    again = move({**moved, "lr": 0.09}, SPACE, np.random.RandomState(0))
    assert again["momentum"] == 0.9 and again["lr"] == 0.1  # the bounds
    # An included value outside the space moves into it.
    assert move({**PARAMS, "lr": 3.0}, SPACE, np.random.RandomState(0))["lr"] == 0.1


def test_the_batch_size_of_a_built_in_model_moves():
    space = [{"batch_size": gputune.log_int(4, 64)}]
    params = {"batch_size": 9}
    rng = np.random.RandomState(0)
    assert Perturbation((1.25,), 0).move(params, space, rng) == params
    assert Perturbation((1.25,), 0, batch_size=True).move(params, space, rng) == {"batch_size": 11}
    assert Perturbation((0.1,), 0, batch_size=True).move(params, space, rng) == {"batch_size": 4}


def test_an_open_end_is_not_a_value():
    space = [{"dropout": stats.uniform(0, 1)}]
    params = {"dropout": 0.9}
    assert Perturbation((2.0,), 0).move(params, space, np.random.RandomState(0)) == params


def test_values_stay_within_their_part_of_the_space():
    space = [
        {"optimizer": ["sgd"], "lr": loguniform(1e-2, 1.0)},
        {"optimizer": ["adam"], "lr": loguniform(1e-4, 1e-2)},
        {"optimizer": ["adamwhd"], "lr": loguniform(1e-4, 1e-2)},
    ]
    move = Perturbation((100.0,), 0).move
    moved = move({"optimizer": "adam", "lr": 5e-3}, space, np.random.RandomState(0))
    assert moved["lr"] == 1e-2
    adapted = {"optimizer": "adamwhd", "lr": 5e-3}
    assert move(adapted, space, np.random.RandomState(0)) == adapted


def test_the_quadratic_of_the_paper():
    """Figure 2 of arXiv:1711.09846: two trials maximize 1.2 - a^2 - b^2 by surrogate gradients.

    Each surrogate nearly hides one of the two parameters, so a trial alone cannot reach 1.2.
    """
    space = [{"dropout": stats.uniform(0, 1), "weight_decay": stats.uniform(0, 1)}]
    start = [{"dropout": 1.0, "weight_decay": 1e-3}, {"dropout": 1e-3, "weight_decay": 1.0}]

    def final_score(fraction):
        method = PopulationBased(interval=5, fraction=fraction)
        values = list(start)
        theta = np.full((2, 2), 0.9)
        for epoch in range(1, 201):
            rates = np.array([list(params.values()) for params in values])
            theta = theta - 0.01 * 2 * rates * theta
            scores = dict(enumerate((1.2 - (theta**2).sum(1)).tolist()))
            for change in exchanges(method, epoch, scores, dict.fromkeys(scores), 0):
                theta[change.number] = theta[change.weights]
                rng = generator(0, "values", epoch, change.number)
                source = values[change.values]
                values[change.number] = method.perturbation.move(source, space, rng)
        return max(scores.values())

    assert final_score(0) < 0.41
    assert final_score(0.5) > 1.1
