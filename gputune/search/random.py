"""Random search: the default spaces, and the trials of a search, drawn once by scikit-learn's ParameterSampler."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, Literal

import numpy as np
from scipy import stats
from sklearn.model_selection import ParameterSampler
from sklearn.utils import check_random_state

from gputune.errors import InputError
from gputune.report.text import count
from gputune.search.config import KEYS, check_config
from gputune.search.distributions import Distribution
from gputune.search.space import Space, check_include
from gputune.study.store import Candidate
from gputune.types import ONLINE, Config, default_momentum, default_weight_decay

__all__ = ["Candidate", "candidates", "default_space", "draw", "remarks", "top_up"]

RandomState = int | np.random.RandomState | None
"""As in scikit-learn: a seed, a generator that goes on from where it is, or None for numpy's global one."""

Origin = Literal["default", "include", "random"]

_TAKERS: Mapping[str, tuple[str, ...]] = {
    "momentum": ("sgd", "nesterov", "sgdhd", "nesterovhd"),
    "hypergrad_lr": ONLINE,
    "hypergrad_rule": ONLINE,
}
"""Keys that some optimizers take, and the others leave aside."""


def default_space(
    model: Literal["mlp", "logistic", "module"], optimizer: str
) -> dict[str, list[Any] | Distribution]:
    """Return the space of a search that was given none.

    The learning rate matters most, on a log scale; sgd, without Adam's scaling of each step, wants one or two
    powers of ten more. Batch size and width come from short lists of powers of two, so that many trials share one
    tensor shape and train as one population. Depth, activation and dropout stay at their defaults: each splits
    populations or adds little on tables. The solved logistic regression has its penalty only.
    """
    if model == "logistic" and optimizer == "exact":
        return {"C": stats.loguniform(1e-3, 1e3), "l1_ratio": [0.0, 0.5, 1.0]}
    plain = optimizer.removesuffix("hd") in ("sgd", "nesterov")
    space: dict[str, list[Any] | Distribution] = {
        "lr": stats.loguniform(1e-3, 1.0) if plain else stats.loguniform(1e-4, 3e-2),
        "batch_size": [32, 64, 128, 256],
        "weight_decay": stats.loguniform(1e-5, 1e-1),
    }
    if optimizer in ONLINE:
        space["hypergrad_lr"] = stats.loguniform(1e-3, 1e-1)
    return space | {"width": [32, 64, 128, 256]} if model == "mlp" else space


def draw(space: Space, n_trials: int, random_state: RandomState) -> list[Config]:
    """Return ``n_trials`` configurations of a checked space: ParameterSampler's own, so RandomizedSearchCV's too.

    A space of lists only is drawn without replacement; where it has too few points, all of them are returned,
    fewer than ``n_trials`` (``remarks`` says so). Raises InputError, for instance where a distribution of the
    user's own draws 17.3 for an integer key.
    """
    _check_n_trials(n_trials)
    try:
        rng = check_random_state(random_state)
    except ValueError:
        raise InputError(
            "random_state must be an integer in [0, 2**32), None or a numpy.random.RandomState, got "
            f"{random_state!r}. For example random_state=0."
        ) from None
    sampler = ParameterSampler(space, _n_draws(space, n_trials), random_state=rng)
    return [check_config(config, name="a draw of space") for config in sampler]


def candidates(
    space: Space,
    *,
    n_trials: int,
    include: Sequence[Mapping[str, Any]],
    include_default: bool,
    random_state: RandomState,
    defaults: Mapping[str, Any],
    asked: int = 0,
) -> tuple[Candidate, ...]:
    """Return all trials of a new search in the order of their numbers, each with its origin.

    First the default configuration ("default"), then ``include`` ("include"), then ``n_trials`` draws ("random").
    In the first two a key of the space that is missing takes its fixed value where the space has one, else its
    default. A configuration that is written like an earlier one (same keys, same values) is dropped, not redrawn.

    asked: how many more trials the search method itself proposes later; with some there may be none here.
    space: checked. include: may have keys that the space lacks; ``check_include`` refuses those of other models.
    defaults: a value for each key of the space, with ``optimizer``, which ``weight_decay`` and ``momentum`` follow
    where they are left out. Where another one is missing, as that of a module's required argument, no default
    configuration is run (``remarks`` says so). Raises InputError, also where nothing is left to run.
    """
    _check_n_trials(asked)
    fixed = _fixed(space)
    wanted: list[tuple[Config, Origin]] = []
    if include_default and not _missing(fixed, space, defaults):
        wanted.append((_fill(fixed, space, defaults), "default"))
    for i, config in enumerate(check_include(include, keys=KEYS, module=True)):
        missing = _missing(fixed | config, space, defaults)
        if missing:
            raise InputError(
                f"include[{i}] must have a value for {', '.join(missing)}, which has no default, got "
                f"{dict(include[i])!r}. Add it."
            )
        wanted.append((_fill(fixed | config, space, defaults), "include"))
    wanted += [(config, "random") for config in draw(space, n_trials, random_state)]
    if not wanted and not asked:
        raise InputError(
            f"n_trials must be >= 1 where nothing else is to run, got n_trials={n_trials} and no default or "
            "included configuration. For example n_trials=64."
        )
    return _number(wanted, ())


def top_up(
    old: Sequence[Candidate], space: Space, n_trials: int, random_state: RandomState
) -> tuple[Candidate, ...]:
    """Return the drawn trials that ``old`` lacks of ``n_trials``, numbered on from it.

    ``n_trials`` configurations are drawn anew and those in ``old`` dropped, so that the same seed with a larger
    ``n_trials`` continues a search, and with the same ``n_trials`` adds nothing. There are never more than
    ``n_trials`` random ones in all: lists alone, drawn without replacement, give another selection for a larger
    ``n_trials``.
    """
    new = _number([(config, "random") for config in draw(space, n_trials, random_state)], old)
    return new[: max(0, n_trials - _n_random(old))]


def _holds(choices: list[Any] | Distribution, value: Any) -> bool:
    if isinstance(choices, list):
        return value in choices
    if not hasattr(choices, "support") or not isinstance(value, int | float):
        return True  # nobody knows
    low, high = choices.support()
    return bool(low <= value <= high)


def remarks(
    trials: Sequence[Candidate],
    space: Space,
    *,
    n_trials: int,
    include_default: bool,
    defaults: Mapping[str, Any],
) -> tuple[str, ...]:
    """Return the sentences, if any, that tell the user once what of the call the ``trials`` do not do."""
    said = []
    missing = _missing(_fixed(space), space, defaults)
    if include_default and missing:
        said.append(f"No default configuration is run, because {', '.join(missing)} has no default value.")
    outside = [trial for trial in trials if trial.origin == "default"]
    for key, value in (outside[0].params if outside else {}).items():
        if not any(_holds(alternative[key], value) for alternative in space if key in alternative):
            said.append(
                f"Trial {outside[0].number} is the default configuration, whose {key}={value!r} is not in the space."
            )
    if outside and not include_default:
        said.append(
            f"Trial {outside[0].number} is the default configuration, which an earlier call asked for: it stays."
        )
    said += _without_effect(trials, str(defaults["optimizer"]))
    n_draws, n_random = _n_draws(space, n_trials), _n_random(trials)
    if n_draws < n_trials:
        said.append(
            f"The space has {count(n_draws, 'configuration')}, fewer than n_trials={n_trials}: all of them are run."
        )
    elif n_random < n_trials:
        said.append(
            f"{n_trials - n_random} of {n_trials} drawn configurations repeat another one and are not run again."
        )
    elif n_random > n_trials:
        said.append(
            f"The study holds {n_random} drawn configurations, more than n_trials={n_trials}: all stay in it."
        )
    return tuple(said)


def _without_effect(trials: Sequence[Candidate], optimizer: str) -> list[str]:
    """Return what to say of keys that trials have, and no optimizer of theirs."""
    said = []
    for key, takers in _TAKERS.items():
        used = {t.params.get("optimizer", optimizer) for t in trials if key in t.params}
        if used and used.isdisjoint(takers):
            said.append(
                f"{key!r} has no effect: {' and '.join(sorted(used))} {'has' if len(used) == 1 else 'have'} none; "
                f"leave it out, or use {', '.join(takers[:-1])} or {takers[-1]}."
            )
    return said


def _check_n_trials(n_trials: object) -> None:
    try:
        valid = not isinstance(n_trials, bool) and index(n_trials) >= 0  # type: ignore[arg-type]
    except TypeError:
        valid = False
    if not valid:
        raise InputError(f"n_trials must be an integer >= 0, got {n_trials!r}. For example n_trials=64.")


def _n_draws(space: Space, n_trials: int) -> int:
    # At most the number of points where all are lists; asking for no more keeps scikit-learn from warning.
    try:
        return len(ParameterSampler(space, n_trials))
    except OverflowError:
        lengths = [[len(value) for value in d.values() if isinstance(value, list)] for d in space]
        raise InputError(
            f"space must have fewer than 2**63 configurations where it has lists only, got lists of {lengths}. "
            "Use a distribution for one key, for example scipy.stats.randint(1, 1001)."
        ) from None


def _n_random(trials: Sequence[Candidate]) -> int:
    return sum(trial.origin == "random" for trial in trials)


def _number(wanted: Iterable[tuple[Config, Origin]], old: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Number the configurations on from ``old``, leaving out those that are there already."""
    seen = {_identity(trial.params) for trial in old}
    number = 1 + max((trial.number for trial in old), default=-1)
    new: list[Candidate] = []
    for config, origin in wanted:
        identity = _identity(config)
        if identity not in seen:
            seen.add(identity)
            new.append(Candidate(number + len(new), config, origin))
    return tuple(new)


def _fixed(space: Space) -> Config:
    """Return the keys that have one and the same single value in all alternatives of the space."""
    singles = [{k: v[0] for k, v in d.items() if isinstance(v, list) and len(v) == 1} for d in space]
    shared = set.intersection(*({(k, _hashable(v)) for k, v in single.items()} for single in singles))
    return check_config({key: singles[0][key] for key, _ in shared}, name="space")


def _keys(space: Space) -> set[str]:
    """Return the keys of the configurations that are drawn from the space."""
    keys = {key for alternative in space for key in alternative}
    return keys - {"penalty"} | ({"l1_ratio"} if "penalty" in keys else set())


def _missing(config: Config, space: Space, defaults: Mapping[str, Any]) -> list[str]:
    return sorted(_keys(space) - _complete(config, defaults).keys())


def _fill(config: Config, space: Space, defaults: Mapping[str, Any]) -> Config:
    full = _complete(config, defaults)
    return {key: full[key] for key in sorted(_keys(space) | config.keys())}


def _complete(config: Config, defaults: Mapping[str, Any]) -> Config:
    full = {**defaults, **config}
    if "optimizer" in full:
        full.setdefault("weight_decay", default_weight_decay(full["optimizer"]))
        full.setdefault("momentum", default_momentum(full["optimizer"]))
    return full


def _identity(config: Mapping[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset((key, _hashable(value)) for key, value in config.items())


def _hashable(value: Any) -> Any:
    """Return the value, or what stands for it where it has no hash; a list and a tuple of equals are equal."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
