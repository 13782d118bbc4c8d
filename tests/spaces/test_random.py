"""Random search draws the same configurations as scikit-learn, numbers the trials, and never
repeats one.
"""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.base import BaseEstimator
from sklearn.model_selection import RandomizedSearchCV

from gputune.ground.types import DEFAULTS
from gputune.spaces.config import legal_keys
from gputune.spaces.distributions import EvenSteps, LogIntegers, log_int
from gputune.spaces.random import draw, first_candidates, notes, numbered, remarks, top_up
from gputune.spaces.space import check_space, default_space
from gputune.study.store import Candidate
from refused import refused

MLP = legal_keys("mlp", "adamw")
EXACT = legal_keys("logistic", "exact")
MODULE = legal_keys("module", "adamw")
MLP_DEFAULTS = {**DEFAULTS, "optimizer": "adamw"}

MIXED = {
    "lr": stats.loguniform(1e-4, 1e-1),
    "width": log_int(8, 64),
    "batch_size": [32, 64],
    "depth": 2,
}
LISTS = {"lr": [0.1, 0.01, 0.001], "width": [8, 16]}
ALTERNATIVES = [{"lr": stats.uniform(0, 1), "width": [8, 16]}, {"dropout": stats.uniform(0, 0.5)}]


def checked(space, keys=MLP, module=False):
    return check_space(space, keys=keys, module=module)


def search(space, n_trials=1, include=(), include_default=True, defaults=MLP_DEFAULTS):
    more = {"include": include, "include_default": include_default, "defaults": defaults}
    first = first_candidates(space, n_trials=n_trials, **more)
    return first + top_up(first, space, n_trials, 0)


def params(trials):
    return [trial.params for trial in trials]


class Constant:
    """A law of the user's own."""

    def __init__(self, value):
        self.value = value

    def rvs(self, random_state=None):
        return self.value


class Anything(BaseEstimator):
    def __init__(self, lr=None, width=None, batch_size=None, depth=None, dropout=None):
        self.lr = lr
        self.width = width
        self.batch_size = batch_size
        self.depth = depth
        self.dropout = dropout

    def fit(self, X, y):
        return self

    def score(self, X, y):
        return 0.0


@pytest.mark.parametrize("space", [MIXED | {"depth": [2]}, LISTS, ALTERNATIVES])
@pytest.mark.parametrize("seed", [0, 7])
def test_draws_are_those_of_scikit_learns_random_search(space, seed):
    peer = RandomizedSearchCV(Anything(), space, n_iter=5, random_state=seed, cv=2, refit=False)
    peer.fit(np.zeros((4, 1)), np.zeros(4))
    assert draw(checked(space), 5, seed) == peer.cv_results_["params"]


def test_draws_are_pythons_numbers_and_a_shorter_draw_is_the_beginning_of_a_longer_one():
    space = checked(MIXED)
    drawn = draw(space, 6, 0)
    assert [type(drawn[0][key]) for key in ("batch_size", "depth", "lr", "width")] == [
        int,
        int,
        float,
        int,
    ]
    assert draw(space, 3, 0) == drawn[:3] != draw(space, 3, 1)
    with refused(r"A draw of space\['width'\] must be an integer >= 1, got 17.3. Use a list"):
        draw(checked({"width": Constant(17.3)}), 3, 0)


def test_lists_with_too_few_points_give_all_of_them_without_a_warning():
    space = checked(LISTS)
    drawn = draw(space, 64, 0)
    assert sorted((c["lr"], c["width"]) for c in drawn) == [
        (a, b) for a in (0.001, 0.01, 0.1) for b in (8, 16)
    ]
    trials = search(space, 64, include_default=False)
    said = remarks(trials, space, n_trials=64, include_default=False)
    assert said == (
        "The space has 6 configurations, fewer than the 64 trials of this call. gputune runs all "
        "configurations.",
    )
    assert not remarks(trials, space, n_trials=6, include_default=False)
    for n_trials in (1, 4, 6, 64):  # the default one, held to the space, is one of its points
        assert len(search(space, n_trials)) == min(n_trials, 6)


def test_lists_of_very_many_points():
    many = [float(k) for k in range(1, 1001)]
    space = {"lr": many, "weight_decay": many, "width": many, "depth": many, "batch_size": many}
    assert len(draw(checked(space), 3, 0)) == 3
    space |= {"C": many, "module__k": many}
    with refused(
        r"space must have fewer than 2\*\*63 configurations .*got lists of \[\[1000, .*Use a distribution"
    ):
        draw(checked(space, (*MLP, "C"), True), 3, 0)


@pytest.mark.parametrize("model", ["mlp", "module", "logistic"])
@pytest.mark.parametrize(
    "optimizer", ["sgd", "nesterov", "adam", "adamw", "RAdam", "Rprop", "Adadelta"]
)
def test_default_spaces_are_legal_and_hold_the_default(model, optimizer):
    space = default_space(model, optimizer)
    (same,) = check_space(space, keys=legal_keys(model, optimizer), module=False)
    assert same == space
    keys = {"lr", "batch_size"} | ({"width"} if model == "mlp" else set())
    assert set(space) == keys | ({"weight_decay"} if optimizer != "Rprop" else set())
    low, high = space["lr"].support()
    plain = optimizer in ("sgd", "nesterov")
    lr = {"Rprop": 1e-2, "Adadelta": 1.0}.get(optimizer, 1e-3)
    assert (low, high) == ((1e-3, 1.0) if plain else (lr / 10, 30 * lr))
    assert low <= lr <= high and DEFAULTS["batch_size"] in space["batch_size"]


def test_default_space_of_the_solved_logistic_regression():
    space = default_space("logistic", "exact")
    assert set(space) == {"C", "l1_ratio"} and space["l1_ratio"] == [0.0, 0.5, 1.0]
    assert space["C"].support() == (1e-3, 1e3)
    assert len(draw(checked(space, EXACT), 4, 0)) == 4


def test_the_order_is_default_include_random():
    space = checked(MIXED)
    trials = search(space, 3, include=[{"lr": 0.5}, {"width": 9, "dropout": 0.1}])
    default = {"batch_size": 32, "depth": 2, "lr": 1e-3, "width": 64}
    assert [(t.number, t.origin) for t in trials] == [
        (0, "default"),
        (1, "include"),
        (2, "include"),
        (3, "random"),
        (4, "random"),
    ]
    assert params(trials[:3]) == [
        default,
        default | {"lr": 0.5},
        default | {"width": 9, "dropout": 0.1},
    ]
    assert params(trials[3:]) == draw(space, 2, 0)


@pytest.mark.parametrize(("n_trials", "listed"), [(1, 0), (2, 1), (9, 3)])
def test_a_portfolio_follows_the_default_as_far_as_there_is_room(n_trials, listed):
    portfolio = [{"lr": 0.5}, {"width": 9, "dropout": 0.1}, {"depth": 3}]
    more = {"include": [{"lr": 0.4}], "portfolio": portfolio, "defaults": MLP_DEFAULTS}
    first = first_candidates(checked(MIXED), n_trials=n_trials, include_default=True, **more)
    assert [trial.origin for trial in first] == ["default", *["portfolio"] * listed, "include"]
    assert params(first[1:-1]) == [first[0].params | config for config in portfolio[:listed]]
    assert len(first + top_up(first, checked(MIXED), n_trials, 0)) == n_trials + 1
    (only,) = first_candidates(checked(MIXED), n_trials=n_trials, include_default=False, **more)
    assert only.origin == "include"


def test_missing_keys_take_the_default_held_to_the_space():
    space = checked(
        {"lr": [0.1, 0.2], "depth": 5, "width": [64, 256], "activation": ["tanh", "gelu"]}
    )
    default = {"activation": "tanh", "depth": 5, "lr": 0.1, "width": 64}
    others = [{"lr": 0.2}, {"depth": 3, "dropout": 0.5}]
    assert params(search(space, include=others)) == [
        default,
        *(default | other for other in others),
    ]


@pytest.mark.parametrize(
    ("choices", "default", "held"),
    [
        ([16, 32], 128, 32),
        ([256, 64, 192], 128, 64),  # the first of two that are equally near
        ([16, 128], 128, 128),
        (["b", "c"], "a", "b"),
        ([None, 0.5], 0.2, None),
        ([(8,), (8, 8)], 4, (8,)),
        ([(8, 8), 32, 64], 128, 64),
        ([[4], [8]], (8,), [8]),  # a list in place of a tuple
        (stats.loguniform(0.1, 1.0), 1e-3, 0.1),
        (stats.loguniform(1e-5, 1e-4), 1e-3, 1e-4),
        (stats.loguniform(1e-4, 1.0), 1e-3, 1e-3),
        (stats.norm(), 7.5, 7.5),
        # none there, and nobody knows the nearest
        (stats.randint(16, 65), 128, 64),
        (stats.randint(1, 5), 2.5, 1),
        (stats.uniform(1, 2), None, 1.0976270078546495 + 1),
        (log_int(8, 64), 128, 64),
        (LogIntegers(2, 8), 2.6, 3),
        (EvenSteps(16, 96, 16), 60, 64),
        (EvenSteps(0.0, 0.5, 0.2), 0.45, 0.4),
        (Constant(5.5), 1.0, 5.5),
    ],
)
def test_a_default_is_held_to_what_the_space_names(choices, default, held):
    space = checked({"module__k": choices}, MODULE, True)
    (trial,) = search(space, defaults=MLP_DEFAULTS | {"module__k": default})
    assert trial.params == {"module__k": held}
    (said,) = notes(
        [trial], space, include_default=True, defaults=MLP_DEFAULTS | {"module__k": default}
    ) or ("",)
    moved = (
        ""
        if held == default or held == [8]
        else "Trial 0 is the default configuration, moved into the space: module__k="
    )
    assert said.startswith(moved) and bool(said) == bool(moved)


def test_alternatives_hold_the_default_where_the_fewest_values_are_others():
    space = checked(
        [
            {"depth": 5, "width": 9, "lr": [0.1]},
            {"depth": 5, "width": [8, 16], "dropout": [0.0, 0.2]},
        ]
    )
    assert search(space)[0].params == {"depth": 5, "dropout": 0.0, "lr": 1e-3, "width": 16}
    space = checked(
        [{"optimizer": ["sgd"], "lr": [0.5]}, {"optimizer": ["adam"], "lr": [0.1, 0.2]}]
    )
    adam = {"optimizer": "adam"}
    assert params(search(space, include=[adam])) == [
        {"lr": 0.5, "optimizer": "sgd"},
        {"lr": 0.1, **adam},
    ]
    # Layers of unlike widths have no depth beside them.
    space = checked([{"width": [64], "depth": [1, 3]}, {"width": [(8, 4, 2)]}])
    trials = search(space, 1, include=[{"width": (9, 5, 3)}, {"width": (9, 5), "depth": 2}])
    assert params(trials) == [
        {"width": (8, 4, 2)},
        {"width": (9, 5, 3)},
        {"depth": 2, "width": (9, 5)},
    ]


@pytest.mark.parametrize(
    "optimizer, decay, momentum", [("sgd", 0.0, 0.0), ("nesterov", 0.0, 0.9), ("adamw", 0.01, 0.0)]
)
def test_weight_decay_and_momentum_follow_the_optimizer(optimizer, decay, momentum):
    decays = stats.uniform(0, 1)
    momenta = stats.uniform(0, 1)
    space = checked({"optimizer": ["sgd", "adamw"], "weight_decay": decays, "momentum": momenta})
    (trial,) = search(space, 0, include=[{"optimizer": optimizer}])
    assert trial.params == {"optimizer": optimizer, "weight_decay": decay, "momentum": momentum}
    (trial,) = search(space, defaults=MLP_DEFAULTS | {"weight_decay": 0.3})
    assert trial.params == {"optimizer": "adamw", "weight_decay": 0.3, "momentum": 0.0}
    (trial,) = search(checked({"optimizer": ["nesterov", "sgd"], "momentum": momenta}))
    assert trial.params == {"optimizer": "nesterov", "momentum": 0.9}


def test_penalty_in_a_search():
    defaults = {"C": 1.0, "l1_ratio": 0.0}
    space = checked({"penalty": ["l1", "l2", None], "C": [0.1, 10.0]}, EXACT)
    trials = search(space, 6, include=[{"penalty": "l1"}], defaults=defaults)
    assert params(trials[:2]) == [{"C": 0.1, "l1_ratio": 0.0}, {"C": 0.1, "l1_ratio": 1.0}]
    # C has no meaning where there is no penalty, so one trial is left of two.
    assert {(c["C"], c["l1_ratio"]) for c in params(trials[2:])} == {
        (10.0, 0.0),
        (10.0, 1.0),
        (math.inf, 0.0),
    }
    assert len(trials) == 5
    for penalty, ends in (
        (["l1"], {"C": 1.0, "l1_ratio": 1.0}),
        ([None], {"C": math.inf, "l1_ratio": 0.0}),
    ):
        one = search(checked({"penalty": penalty}, EXACT), defaults=defaults)[0].params
        assert one == {key: ends[key] for key in one} and "l1_ratio" in one


def test_duplicates_are_dropped_not_redrawn():
    space = checked({"lr": [0.001, 0.1], "width": [128, 8]})
    trials = search(space, 4, include=[{"lr": 0.1}, {"lr": 0.1, "width": 128}, {}])
    assert [t.origin for t in trials] == ["default", "include", "random", "random"]
    assert [t.number for t in trials] == [0, 1, 2, 3]
    assert len({tuple(p.items()) for p in params(trials)}) == 4
    said = remarks(trials, space, n_trials=4, include_default=True)
    assert said == ("1 of 4 configurations repeat another one and are not run again.",)
    said = remarks(trials, space, n_trials=2, include_default=False)
    assert said == (
        "Trial 0 is the default configuration, which an earlier call asked for. It stays in the "
        "study.",
        "The study holds 3 configurations, more than the 2 trials of this call. The study keeps "
        "all of them.",
    )


def test_a_key_that_no_optimizer_of_the_trials_takes_is_said():
    def said_of(space, n_trials):
        trials = search(checked(space), n_trials, include_default=False)
        return notes(trials, checked(space), include_default=False, defaults=MLP_DEFAULTS)

    assert said_of({"momentum": [0.1, 0.9]}, 2) == (
        "'momentum' has no effect, because adamw does not use it. Leave this key out, or use "
        "sgd, nesterov, rmsprop, muon, sgdhd or nesterovhd.",
    )
    (said,) = said_of({"momentum": [0.1, 0.9], "optimizer": ["adam", "adamw"]}, 4)
    assert said.startswith("'momentum' has no effect, because adam and adamw do not use it.")
    assert not said_of({"momentum": [0.5], "optimizer": ["adam", "sgd"]}, 2)


def test_values_without_a_hash_are_compared_too():
    space = checked({"module__sizes": [[8], [8, 8]], "module__d": [{"a": 1}]}, MODULE, True)
    trials = search(space, 2, include=[{"module__sizes": (8,)}], include_default=False)
    assert [t.params["module__sizes"] for t in trials] == [(8,), [8, 8]]


def test_n_trials_is_a_count_and_nothing_to_run_is_an_error():
    space = checked(MIXED)
    assert [t.origin for t in search(space, 1)] == ["default"]
    assert [t.origin for t in search(space, 0, include=[{}])] == ["include"]
    message = r"n_trials must be at least 1 without included configurations, got 0. .* n_trials=1 for only the default"
    with refused(message):
        search(space, 0)
    for n_trials in (-1, 2.0, "3", None, True):
        with refused(f"n_trials must be an integer of at least 0, got {n_trials!r}. For example"):
            search(space, n_trials)


def test_a_required_argument_of_a_module_has_no_default():
    space = checked({"module__k": [1, 2], "lr": [0.1]}, MODULE, True)
    trials = search(space, 2, include=[{"module__k": 3}])
    assert [t.origin for t in trials] == ["include", "random", "random"]
    assert trials[0].params == {"lr": 0.1, "module__k": 3}
    said = notes(trials, space, include_default=True, defaults=MLP_DEFAULTS)
    assert said == (
        "gputune runs no default configuration, because module__k has no default value.",
    )
    with refused(r"include\[0\] must have a value for module__k, which has no default, got \{"):
        search(space, 2, include=[{"lr": 0.2}])
    with_default = MLP_DEFAULTS | {"module__k": 7}
    assert search(space, defaults=with_default)[0].params == {"lr": 0.1, "module__k": 2}
    fixed = checked({"module__k": [1], "lr": [0.1]}, MODULE, True)
    assert params(search(fixed)) == [{"lr": 0.1, "module__k": 1}]
    # fixed values are known
    assert notes(search(fixed), fixed, include_default=True, defaults=MLP_DEFAULTS) == ()


LAWS = {"lr": stats.loguniform(1e-4, 1e-1), "dropout": stats.uniform(0, 0.5), "width": [8, 16, 32]}
WHOLE = {"depth": stats.randint(1, 90), "width": log_int(8, 64), "batch_size": EvenSteps(8, 800, 8)}


@pytest.mark.parametrize(
    "space", [MIXED, ALTERNATIVES, LAWS, WHOLE, {"weight_decay": stats.expon(), **LAWS}]
)
@pytest.mark.parametrize("include", [(), [{"lr": 0.1}]])
def test_a_larger_number_continues_the_search(space, include):
    space = checked(space)
    old = search(space, 30, include)
    longer = search(space, 34, include)
    assert top_up(old, space, 30, 0) == top_up(old, space, 2, 0) == ()
    assert old + top_up(old, space, 34, 0) == longer
    assert numbered([(config, "random") for config in params(longer)], old) == longer[len(old) :]


def test_the_time_for_drawing_known_trials_again_does_not_count():
    space = checked(LAWS)
    drawn = draw(space, 100, 0, seconds=-1.0, n_known=30)
    assert drawn == draw(space, 31, 0)
    assert draw(space, 100, 0, seconds=-1.0) == drawn[:1]


def test_a_larger_number_of_lists_draws_what_is_missing():
    space = checked({"lr": [0.1, 0.2, 0.3, 0.4, 0.5], "width": [8, 16, 32, 64]})
    old = search(space, 6)
    assert top_up(old, space, 6, 0) == ()
    new = top_up(old, space, 10, 0)
    assert [t.number for t in new] == [6, 7, 8, 9] and {t.origin for t in new} == {"random"}
    assert not any(p in params(old) for p in params(new))
    assert all(p in draw(space, 10, 0) for p in params(new))
    assert len(old + new + top_up(old + new, space, 99, 0)) == 20


def test_what_an_older_study_holds_is_counted_and_numbered_on():
    """One from before the default counted; one of other draws; one with a gap in its numbers."""
    space = checked(MIXED)
    drawn = [Candidate(1 + i, config, "random") for i, config in enumerate(draw(space, 4, 0))]
    old = (
        Candidate(0, {"batch_size": 32, "depth": 2, "lr": 1e-3, "width": 128}, "default"),
        *drawn,
    )
    assert top_up(old, space, 4, 0) == ()
    (said,) = remarks(old, space, n_trials=4, include_default=True)
    assert (
        said == "The study holds 5 configurations, more than the 4 trials of this call. The study "
        "keeps all of them."
    )
    space = checked(LAWS)
    other = [Candidate(i, config, "random") for i, config in enumerate(draw(space, 3, 1))]
    assert params(top_up(other, space, 5, 0)) == draw(space, 5, 0)[:2]
    old = (Candidate(5, {"lr": 0.3}, "include"), Candidate(2, {"lr": 0.1}, "random"))
    assert top_up(old, checked({"lr": [0.1, 0.2]}), 2, 0) == (Candidate(6, {"lr": 0.2}, "random"),)


def test_a_factor_on_the_learning_rate_or_weight_decay_is_1_by_default():
    space = checked({"lr_factor__B": [4, 1], "weight_decay_factor__bias": [0.0, 1.0]}, MODULE, True)
    (trial,) = search(space)
    assert trial.origin == "default"
    assert trial.params == {"lr_factor__B": 1, "weight_decay_factor__bias": 1}
    assert notes([trial], space, include_default=True, defaults=MLP_DEFAULTS) == ()
    # moved into the space
    space = checked({"lr_factor__B": [4, 2]}, MODULE, True)
    (trial,) = search(space)
    assert trial.params == {"lr_factor__B": 2}
    (said,) = notes([trial], space, include_default=True, defaults=MLP_DEFAULTS)
    assert "lr_factor__B=2.0 in place of 1.0" in said
    # the default of a recipe
    recipe = MLP_DEFAULTS | {"lr_factor__B": 4.0}
    assert search(space, defaults=recipe)[0].params == {"lr_factor__B": 4}
