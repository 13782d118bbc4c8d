"""Random search: scikit-learn's ParameterSampler samples all configurations once, at the start of a
search.

This module also makes the remarks for the user about these trials.
"""

import math
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import repeat

from sklearn.model_selection import ParameterSampler

from gputune.ground.errors import InputError, Verbatim, check_count, option
from gputune.ground.text import count
from gputune.ground.types import DECAY_FACTOR, LR_FACTOR, Config, fixed_depth
from gputune.optimizers.classes import optimizer_defaults
from gputune.spaces.config import KEYS, OPTIMIZERS_WITH, ConfigCheck, check_config
from gputune.spaces.distributions import (
    CheckedSpace,
    Choices,
    EvenSteps,
    OwnDistribution,
    can_draw,
    is_fixed,
)
from gputune.spaces.space import check_include
from gputune.study.store import Candidate
from gputune.study.study import Trial

NO_DEFAULT = "gputune runs no default configuration"
"""The beginning of the note of a search without a trial of the default configuration."""


def draw(
    space: CheckedSpace,
    n_trials: int,
    seed: int,
    check: ConfigCheck = check_config,
    *,
    seconds: float | None = None,
    n_known: int = 0,
) -> list[Config]:
    """Sample ``n_trials`` random configurations from a checked search space.

    scikit-learn's ParameterSampler, and therefore RandomizedSearchCV, samples the same
    configurations. A space that has only lists is sampled without replacement. If the space has
    fewer than ``n_trials`` points, the function returns all points, and ``remarks`` tells the user.

    Args:
        space: The checked space.
        n_trials: The number of configurations.
        seed: The random seed.
        check: Checks each configuration.
        seconds: After this time the function returns the configurations sampled so far, including
            at least one new configuration. None means no limit.
        n_known: The number of configurations that an earlier call has sampled. The time to sample
            them again does not count.

    Raises:
        InputError: A sampled configuration is invalid, for example if a custom distribution returns
            17.3 for an integer key.
    """
    sampler = ParameterSampler(space, _n_draws(space, n_trials), random_state=seed)
    end = math.inf
    configs: list[Config] = []
    for config in sampler:
        if seconds is not None and len(configs) == n_known:
            end = time.monotonic() + seconds
        try:
            configs.append(check(config, name="space"))
        except InputError as error:
            raise InputError(None, f"A draw of {error.message}") from error
        if time.monotonic() > end:
            break
    return configs


def first_candidates(
    space: CheckedSpace,
    *,
    n_trials: int,
    include: Sequence[Mapping[str, object]],
    include_default: bool,
    defaults: Mapping[str, object],
    portfolio: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Return the first trials of a new search: the default configuration and the user's
    configurations.

    The order is: the default configuration, a ``portfolio`` if the default configuration is run,
    and the configurations of ``include``. A missing key has its default value, moved into the space
    if the space has the key. The function drops a configuration that is equal to an earlier
    configuration.

    Args:
        space: The checked space.
        n_trials: The number of trials. It limits the length of the portfolio.
        include: Configurations that the user wants to run.
        include_default: If True, the search runs the default configuration.
        defaults: The default values. They include the ``optimizer``. If they lack a key of the
            space, the search runs no default configuration, and ``notes`` tells the user.
        portfolio: Good configurations to begin with.

    Raises:
        InputError: A configuration is invalid, or no trial remains to run.
    """
    check_count(n_trials, "n_trials", least=0, remedy=f"For example {option('n_trials', 64)}.")
    configs: list[tuple[Config, str]] = []
    if include_default and n_trials:
        default, missing = _fill_for_space({}, space, defaults)
        if not missing:
            configs.append((default, "default"))
            for config in portfolio[: n_trials - 1]:
                configs.append((_fill_for_space(config, space, defaults)[0], "portfolio"))
    for i, config in enumerate(check_include(include, keys=KEYS, module=True)):
        full, missing = _fill_for_space(config, space, defaults)
        if missing:
            raise InputError(
                f"include[{i}]",
                f"must have a value for {', '.join(missing)}, which has no default",
                got=dict(include[i]),
                remedy="Add it.",
            )
        configs.append((full, "include"))
    if not configs and not n_trials:
        raise InputError(
            "n_trials",
            "must be at least 1 without included configurations",
            got=n_trials,
            remedy=f"For example {option('n_trials', 64)}, or {option('n_trials', 1)} for only the "
            "default configuration.",
        )
    return numbered(configs)


def top_up(
    old: Sequence[Candidate],
    space: CheckedSpace,
    n_trials: int,
    seed: int,
    check: ConfigCheck = check_config,
    earlier: Sequence[Config] = (),
    seconds: float | None = None,
) -> tuple[Candidate, ...]:
    """Return new random trials for a resumed search, so that it has ``n_trials`` trials in total.

    The function samples ``n_trials`` configurations again, and drops the configurations that are
    already in ``old``. The same seed therefore continues a search. The new trials have the next
    free trial numbers. The total of ``n_trials`` includes the default trial, but not the included
    trials. A space of only lists is sampled without replacement, so a larger ``n_trials`` gives a
    different selection.

    Args:
        old: The trials so far.
        space: The checked space.
        n_trials: The number of trials.
        seed: The random seed.
        check: Checks each configuration.
        earlier: Configurations that other searches have tried. The function replaces these
            configurations by other sampled configurations if the space has enough.
        seconds: After this time the sampling ends with fewer trials. None means no limit.
    """
    new: tuple[Candidate, ...] = ()
    lacking = n_trials - n_counted(old)
    n_known = sum(trial.origin == "random" for trial in old)
    # At most 8 times as many draws: a space of few integers may have no new configuration.
    for times in (1, 2, 4, 8) if earlier else (1,):
        if len(new) < lacking:
            n_draws = times * (n_trials + len(earlier))
            # The known trials are drawn again. Skipping them in NumPy's generator would save 0.9 s
            # of a call that adds to 10,000 trials.
            drawn = draw(space, n_draws, seed, check, seconds=seconds, n_known=n_known)
            new = numbered(zip(drawn, repeat("random")), old, earlier)[:lacking]
    return new


def n_counted(trials: Sequence[Candidate | Trial]) -> int:
    """Return the number of trials that count toward ``n_trials``. Included trials do not count."""
    return sum(trial.origin in ("default", "portfolio", "random") for trial in trials)


def notes(
    trials: Sequence[Candidate],
    space: CheckedSpace,
    *,
    include_default: bool,
    defaults: Mapping[str, object],
) -> tuple[str, ...]:
    """Return remarks for the user about default values and unused hyperparameters, one sentence
    each."""
    sentences = []
    defaults = _with_factors(space, defaults)
    if include_default and (missing := _fill_for_space({}, space, defaults)[1]):
        sentences.append(f"{NO_DEFAULT}, because {', '.join(missing)} has no default value.")
    # A fixed value in the space needs no remark.
    fixed = {key for part in space for key, choices in part.items() if is_fixed(choices)}
    for trial in trials:
        if trial.origin != "default":
            continue
        optimizer = trial.params.get("optimizer", defaults.get("optimizer"))
        plain = _with_plain_defaults({"optimizer": optimizer}, defaults)
        moved = []
        for key, value in trial.params.items():
            if key in plain and key not in fixed and _hashable(plain[key]) != _hashable(value):
                moved.append(f"{key}={value!r} in place of {plain[key]!r}")
        if moved:
            sentences.append(
                f"Trial {trial.number} is the default configuration, moved into the space: "
                f"{', '.join(moved)}."
            )
    default = str(defaults["optimizer"])
    for key, optimizers in OPTIMIZERS_WITH.items():
        used = {t.params.get("optimizer", default) for t in trials if key in t.params}
        if used and used.isdisjoint(optimizers):
            verb = "does" if len(used) == 1 else "do"
            sentences.append(
                f"{key!r} has no effect, because {' and '.join(sorted(used))} {verb} not use it. "
                f"Leave this key out, or use {', '.join(optimizers[:-1])} or {optimizers[-1]}."
            )
    return tuple(sentences)


def remarks(
    trials: Sequence[Candidate],
    space: CheckedSpace,
    *,
    n_trials: int,
    include_default: bool,
    timeout: float | None = None,
) -> tuple[str, ...]:
    """Return remarks for the user on differences between a study's trials and the requested trials.

    The study may have more or fewer trials than requested. It may also have a trial of the default
    configuration that only an earlier call requested.
    """
    sentences = []
    for trial in trials:
        if trial.origin == "default" and not include_default:
            sentences.append(
                f"Trial {trial.number} is the default configuration, which an earlier call asked "
                "for. It stays in the study."
            )
    n_draws = _n_draws(space, n_trials)
    counted = n_counted(trials)
    if n_draws < n_trials:
        sentences.append(
            f"The space has {count(n_draws, 'configuration')}, fewer than the {n_trials} trials of "
            "this call. gputune runs all configurations."
        )
    elif counted < n_trials and timeout is not None:
        sentences.append(
            f"{counted} of {n_trials} configurations were drawn. The others repeat one of these, "
            f"or there was no time to draw more (a timeout of {timeout:g} s)."
        )
    elif counted < n_trials:
        sentences.append(
            f"{n_trials - counted} of {n_trials} configurations repeat another one and are not "
            "run again."
        )
    elif counted > n_trials:
        sentences.append(
            f"The study holds {counted} configurations, more than the {n_trials} trials of this "
            "call. The study keeps all of them."
        )
    return tuple(sentences)


def _n_draws(space: CheckedSpace, n_trials: int) -> int:
    """Return the number of different configurations to sample from a space: ``n_trials``, or fewer
    in a small space of lists."""
    # At most the number of points of a space of lists. scikit-learn would warn about more draws.
    try:
        return len(ParameterSampler(space, n_trials))
    except OverflowError:
        lengths = []
        for part in space:
            lengths.append([len(value) for value in part.values() if isinstance(value, list)])
        raise InputError(
            "space",
            "must have fewer than 2**63 configurations if it has only lists",
            got=Verbatim(f"lists of {lengths}"),
            remedy="Use a distribution for one key, for example scipy.stats.randint(1, 1001).",
        ) from None


def numbered(
    wanted: Iterable[tuple[Config, str]],
    old: Sequence[Candidate] = (),
    earlier: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Make trials from new configurations, with trial numbers that begin after the numbers of the
    trials ``old``.

    The function leaves out configurations that are already in ``old`` or ``earlier``.
    """
    seen = set(map(_identity, earlier))
    number = 0
    for trial in old:
        seen.add(_identity(trial.params))
        number = max(number, trial.number + 1)
    new: list[Candidate] = []
    for config, origin in wanted:
        if (identity := _identity(config)) not in seen:
            seen.add(identity)
            new.append(Candidate(number + len(new), config, origin))
    return tuple(new)


def _fill_for_space(
    config: Config, space: CheckedSpace, defaults: Mapping[str, object]
) -> tuple[Config, list[str]]:
    """Add default values for the missing keys of a configuration. Returns the configuration and the
    keys without a default."""
    defaults = _with_factors(space, defaults)
    full = _with_defaults_in_space(config, space, defaults)
    keys = set().union(*space)
    if "penalty" in keys:
        keys = keys - {"penalty"} | {"l1_ratio"}
    wanted = keys | config.keys()
    # A tuple with a value for each layer sets the number of layers already.
    if fixed_depth(full) is not None and "depth" not in config:
        wanted = wanted - {"depth"}
    return {key: full[key] for key in sorted(wanted) if key in full}, sorted(keys - full.keys())


def _with_defaults_in_space(
    config: Config, space: CheckedSpace, defaults: Mapping[str, object]
) -> Config:
    """Add all default values to a configuration, moved into the space if the space has the key.

    If the space has alternative dicts, gputune uses the first dict that excludes the fewest default
    values. A key without a default has its fixed value from the space.
    """
    plain = _with_plain_defaults(config, defaults)

    def n_excluded(part: Mapping[str, Choices]) -> int:
        return sum(not can_draw(part[key], plain[key]) for key in part if key in plain)

    part = min(space, key=n_excluded)
    values: Config = {}
    # The optimizer comes first: the defaults of lr, weight_decay and momentum depend on it.
    for key in sorted(part, key=lambda key: key != "optimizer"):
        full = {"penalty": "l2", **_with_plain_defaults({**config, **values}, defaults)}
        is_set = key in config or (key == "penalty" and "l1_ratio" in config)
        if not is_set and (key in full or is_fixed(part[key])):
            values[key] = _nearest(key, part[key], full.get(key))
    values |= config
    if fixed_depth(values) is not None and "depth" not in config:
        values.pop("depth", None)
    return _with_plain_defaults(check_config(values, name="space"), defaults)


def _nearest(key: str, choices: Choices, value: object) -> object:
    """Return the value of a list or distribution that is nearest to a default value.

    The result is the default value itself if ``choices`` contains it. Otherwise, the result is the
    nearest numeric value, the first entry of a list, or a random sample.
    """
    if isinstance(choices, list):
        if value in choices:
            return value
        for choice in choices:
            if _hashable(choice) == _hashable(value):  # a list instead of a tuple
                return choice
        numbers = [choice for choice in choices if isinstance(choice, int | float)]
        # Tuples are widths of several layers, which are not compared with a number.
        has_words = any(not isinstance(choice, int | float | tuple) for choice in choices)
        if has_words or not numbers or not isinstance(value, int | float):
            return choices[0]
        return min(numbers, key=lambda choice: abs(choice - value))
    if isinstance(value, int | float) and hasattr(choices, "support"):
        low, high = choices.support()
        inside = min(max(value, low), high)
        step = (
            choices.step if isinstance(choices, EvenSteps) else isinstance(choices, OwnDistribution)
        )
        if step:
            inside = min(low + round((inside - low) / step) * step, high)
        if not hasattr(choices, "pmf") or choices.pmf(inside) > 0:
            return inside
    return draw([{key: choices}], 1, 0)[0][key]


def _with_factors(space: CheckedSpace, defaults: Mapping[str, object]) -> Mapping[str, object]:
    """Add the default value 1 of the factors on learning rates and weight decays in a space."""
    factors = {}
    for part in space:
        for key in part:
            if key.startswith((LR_FACTOR, DECAY_FACTOR)):
                factors[key] = 1.0
    return {**factors, **defaults}


def _with_plain_defaults(config: Config, defaults: Mapping[str, object]) -> Config:
    """Add all default values to a configuration. Some default values depend on the optimizer."""
    optimizer = config.get("optimizer", defaults.get("optimizer"))
    of_optimizer = {} if optimizer is None else optimizer_defaults(str(optimizer))
    return {**of_optimizer, **defaults, **config}


def _identity(config: Mapping[str, object]) -> frozenset[tuple[str, Hashable]]:
    """Return a hashable value for a configuration, to find equal configurations."""
    try:
        return frozenset(config.items())
    except TypeError:  # a value has no hash
        return frozenset(zip(config, map(_hashable, config.values())))


def _hashable(value: object) -> Hashable:
    """Return a hyperparameter value, or a hashable value that represents it.

    The result is the same for a list and a tuple with equal entries.
    """
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
