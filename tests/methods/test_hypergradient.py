"""How one start of a descent moves: steps, flips, noise, chaos, bounds."""

import math

import numpy as np
import pytest

import gputune
from gputune.methods.descent import Slope, StartingPoint, slope_at
from gputune.methods.hypergradient import Hypergradient
from refused import refused


def slope(value, *, error=0.0, usable=True, loss=1.0, mode="exact", name="lr"):
    table = np.atleast_2d(np.asarray(value, dtype=float))
    return Slope(loss, {name: table}, {name: np.full(table.shape, error)}, usable, 1.0, mode)


def start(value=0.01, *, name="lr", bounds=None, **options):
    method = Hypergradient(hyperparameters=(name,), **options)
    return StartingPoint(method, (name,), {name: value, "width": 8}, bounds or {})


def places(path, *slopes, name="lr"):
    """The logarithms of where a start stands, at first and after each move."""
    found = [np.log(np.asarray(path.config[name]))]
    for each in slopes:
        assert not path.ended
        path.move(each)
        found.append(np.log(np.asarray(path.config[name])))
    return found


def test_a_step_goes_against_the_sign_and_halves_on_a_flip_and_the_first_depends_on_the_number_of_values():
    found = places(start(first_step=1.0), *map(slope, (-3.0, -0.1, 0.2, 5.0, -1.0)))
    # Of the fourth step half is taken, since the whole would lead back to the second place.
    np.testing.assert_allclose(np.diff(found), [1, 1, -0.5, -0.25, 0.125], rtol=1e-12)
    for value, first in ((1.0, 1.5), ([[1.0], [1.0]], 1.0)):
        before, after = places(start(), slope(value))
        np.testing.assert_allclose(before - after, first, rtol=1e-12)
    # A number becomes one for each segment and layer.
    path = start()
    assert places(path, slope([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]))[1].shape == (3, 2)
    assert path.config["width"] == 8
    assert places(start(), slope([[1.0], [-1.0]]))[1].shape == (2,)


def test_a_slope_within_its_standard_error_moves_nothing():
    path = start(first_step=1.0)
    before, after = places(path, slope([[1.0], [0.5]], error=0.7))
    np.testing.assert_allclose(after - before, [-1, 0], atol=1e-12)
    places(path, slope([[0.1], [0.5]], error=0.7))
    assert path.mode == "differences"  # nothing moves: the same point, looked at from afar
    places(path, slope([[0.1], [0.5]], error=0.7, mode="differences"))
    assert path.ended


def test_noise_may_give_way_to_a_trend_seen_from_afar_of_which_a_solution_has_none():
    found = places(
        start(first_step=1.0), slope(5.0, error=9.0), slope(5.0, error=1.0, mode="differences")
    )
    np.testing.assert_allclose(np.diff(found), [0, -1], atol=1e-12)
    path = start(1.0, name="C")
    path.move(slope(5.0, error=9.0, name="C"))
    assert path.ended and path.mode == "exact"


def test_a_descent_never_comes_back_ends_when_its_steps_are_short_and_finds_the_minimum_of_a_quadratic():
    path = start(first_step=1.0, smallest_step=0.01)
    # halved steps on a flip alone would lead back twice
    found = places(path, *map(slope, (1, -1, -1, 1, 1, -1)))
    assert len({round(float(place), 9) for place in found}) == len(found)
    path = start(first_step=1.0, smallest_step=0.2)
    places(path, *map(slope, (1, -1, 1, -1)))
    assert path.ended
    path = start(first_step=1.0, outer_steps=40)
    target = math.log(0.37)
    while not path.ended:
        path.move(slope(math.log(path.config["lr"]) - target))
    assert abs(math.log(path.config["lr"]) - target) < 0.1


def test_normalized_steps_have_one_length_and_shorten_when_the_loss_rises():
    path = start(step="normalized", first_step=1.0)
    found = places(path, *(slope([[3.0], [4.0]], loss=loss) for loss in (1.0, 2.0)))
    np.testing.assert_allclose(found[1] - found[0], [-0.6, -0.8], rtol=1e-12)
    np.testing.assert_allclose(found[2] - found[1], [-0.06, -0.08], rtol=1e-9)
    places(path, slope([[3.0], [4.0]], loss=3.0))
    assert path.ended  # a hundredth is shorter than the smallest step


def test_values_stay_in_the_range_of_their_law_and_momentum_in_its_own():
    path = start(0.9, name="momentum", first_step=3.0)
    for value in (-1.0, -1.0, -1.0, -1.0, -1.0, 1.0):
        path.move(slope(value, name="momentum"))  # in the logit
        assert 0.9 < path.config["momentum"] < 1
    path = start(0.01, bounds={"lr": (0.005, 0.02)}, first_step=2.0)
    found = places(path, slope(1.0), slope(1.0))
    np.testing.assert_allclose(np.exp(found[1:]), 0.005)
    assert path.ended  # it cannot go further that way
    path = start(0.05, bounds={"lr": (1e-4, 0.1)})
    path.move(slope(-1.0))
    assert path.config["lr"] == 0.1  # the bound itself, not its neighbour by rounding


def test_chaos_steps_the_rate_down_then_turns_to_finite_differences():
    path = start(1.0, first_step=1.0)
    found = places(path, slope(-50.0, usable=False))  # whatever the sign of noise says
    assert path.mode == "exact"
    found += places(path, slope(math.nan, usable=False))
    assert path.mode == "differences"
    found += places(path, slope(-1.0, mode="differences"))  # the sign has flipped
    np.testing.assert_allclose(found, [0, -1, -1, -2, -2, -1.5], atol=1e-12)
    assert path.mode == "differences"


@pytest.mark.parametrize(
    ("name", "value", "low"), [("lr", 9.0, 0.3), ("weight_decay", math.inf, 1e-9)]
)
def test_chaos_with_nowhere_to_step_down_to_looks_at_the_same_point_by_finite_differences(
    name, value, low
):
    """At the lower bound of the rate, and where the rate is not searched."""
    path = start(0.3, name=name, bounds={name: (low, 3.0)})
    before, after = places(path, slope(value, usable=False, name=name), name=name)
    assert path.mode == "differences" and after == pytest.approx(before)
    usable = name == "lr"
    places(
        path,
        slope(1.0 if usable else math.nan, usable=usable, name=name, mode="differences"),
        name=name,
    )
    assert path.ended


def test_slope_at_is_the_fold_mean_in_the_coordinate_with_its_standard_error():
    table = np.array([1.0, 2.0, 3.0])[:, None, None]  # (F, S, L)
    found = slope_at({"lr": 0.1}, np.array([1.0, 2.0, 6.0]), {"lr": table}, np.ones(3), "exact")
    assert found.loss == 3.0 and found.usable
    np.testing.assert_allclose(found.slopes["lr"], 0.2)
    np.testing.assert_allclose(found.errors["lr"], 0.1 / math.sqrt(3))
    found = slope_at({"momentum": 0.8}, np.ones(1), {"momentum": table[:1]}, np.ones(1), "exact")
    np.testing.assert_allclose(found.slopes["momentum"], 0.8 * 0.2)
    assert np.isnan(found.errors["momentum"]).all()


@pytest.mark.parametrize(
    ("losses", "gradient", "ratio", "mode", "usable"),
    [
        (1.0, 1.0, 1.0, "exact", True),
        (1.0, 1.0, 101.0, "exact", False),
        (1.0, 1.0, math.nan, "exact", False),
        (1.0, math.nan, 1.0, "exact", False),
        (math.inf, 1.0, 1.0, "exact", False),
        (1.0, 1.0, 1e9, "differences", True),
        (1.0, math.nan, 1.0, "differences", False),
    ],
)
def test_what_makes_a_slope_usable(losses, gradient, ratio, mode, usable):
    """One fold that is noise spoils the mean."""
    table = np.array([1.0, gradient])[:, None, None]
    found = slope_at(
        {"lr": 0.1}, np.array([1.0, losses]), {"lr": table}, np.array([1.0, ratio]), mode
    )
    assert found.usable is usable


def test_a_slope_survives_the_study():
    first = slope([[1.0, math.inf], [math.nan, -0.0]], error=0.3, usable=False, loss=math.nan)
    again = Slope.from_detail(first.to_detail())
    np.testing.assert_array_equal(again.slopes["lr"], first.slopes["lr"])
    np.testing.assert_array_equal(again.errors["lr"], first.errors["lr"])
    assert (again.usable, again.ratio, again.mode) == (False, 1.0, "exact") and math.isnan(
        again.loss
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hyperparameters": ()},
            r"some of lr, momentum, weight_decay, beta1, beta2, C, each once, got \(\)",
        ),
        ({"hyperparameters": ("lr", "lr")}, "each once"),
        ({"hyperparameters": "width"}, r"got \('width',\)"),
        ({"outer_steps": 0}, "outer_steps=...\\) must be an integer of at least 1, got 0"),
        ({"outer_steps": True}, "must be an integer of at least 1, got True"),
        ({"segments": 1.5}, "segments=...\\) must be an integer of at least 1, got 1.5"),
        ({"per_layer": "yes"}, "per_layer=...\\) must be True or False, got 'yes'"),
        (
            {"first_step": 0.1, "smallest_step": 0.2},
            "at most the first step, .* smallest_step=0.2 and a .* 0.1",
        ),
        ({"smallest_step": 1.6}, "and a first step of 1.5. For example"),
        (
            {"smallest_step": 1.2, "segments": 2},
            "smallest_step=1.2 and a first step of 1. For example",
        ),
        ({"step": "adam"}, "must be 'sign' or 'normalized', got 'adam'"),
        ({"first_step": 0}, "first_step=...\\) must be a finite number > 0, got 0"),
        ({"smallest_step": math.inf}, "smallest_step=...\\) must be a finite number > 0, got inf"),
    ],
)
def test_bad_options_are_named(options, message):
    with refused(message):
        gputune.Hypergradient(**options)
    # One name may stand alone.
    assert gputune.Hypergradient(hyperparameters="lr").hyperparameters == ("lr",)
