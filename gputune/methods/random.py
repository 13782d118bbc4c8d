"""Random search: scikit-learn's ParameterSampler draws the trials of a search once.

This module also makes the remarks about these trials.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy import stats
from sklearn.model_selection import ParameterSampler

from gputune.errors import InputError, check_count
from gputune.methods.config import KEYS, TAKERS, ConfigCheck, check_config
from gputune.methods.distributions import (
    CheckedSpace,
    Choices,
    EvenSteps,
    OwnDistribution,
    holds,
    is_fixed,
)
from gputune.methods.space import check_include
from gputune.optimizers.classes import optimizer_defaults
from gputune.study.store import Candidate
from gputune.text import count
from gputune.types import Config


def draw(
    space: CheckedSpace,
    n_trials: int,
    seed: int | np.random.RandomState,
    check: ConfigCheck = check_config,
    *,
    seconds: float | None = None,
) -> list[Config]:
    """Draw ``n_trials`` configurations of a checked space.

    The draws are those of ParameterSampler, and so of RandomizedSearchCV. A space that has only
    lists is drawn without replacement. If it has fewer than ``n_trials`` points, all of them are
    returned, and ``remarks`` tells the user.

    Args:
        space: The checked space.
        n_trials: The number of configurations.
        seed: The random seed or generator.
        check: Checks each configuration.
        seconds: After this time the function returns the configurations drawn so far, at least one.
            None means no limit.

    Raises:
        InputError: A draw is invalid, for example if a custom distribution draws 17.3 for an
            integer key.
    """
    sampler = ParameterSampler(space, _n_draws(space, n_trials), random_state=seed)
    end = math.inf if seconds is None else time.monotonic() + seconds
    configs: list[Config] = []
    for config in sampler:
        configs.append(check(config, name="a draw of space"))
        if time.monotonic() > end:
            break
    return configs


def _draw_on(
    known: Sequence[Config],
    space: CheckedSpace,
    n_trials: int,
    seed: int,
    check: ConfigCheck,
    seconds: float | None,
) -> list[Config]:
    """Return the configurations of ``draw`` that come after the ``known`` ones.

    If the first draws are ``known``, the generator skips them in a fraction of the time. ``known``
    has no configuration twice. So the first draws are ``known`` if the next draw equals its last
    configuration. Otherwise all draws are returned.
    """
    laws = [[part[key] for key in sorted(part)] for part in space]
    if known and not all(isinstance(law, list) for part in laws for law in part):
        generator = np.random.RandomState(bits := np.random.MT19937())
        generator.seed(seed)
        draws = [[_pass_over(law, generator, bits) for law in part] for part in laws]
        for _ in range(len(known) - 1):
            for draw_one in draws[generator.randint(len(laws))] if len(laws) > 1 else draws[0]:
                draw_one()
        last, *new = draw(space, n_trials - len(known) + 1, generator, check, seconds=seconds)
        if last == known[-1]:
            return new
    return draw(space, n_trials, seed, check, seconds=seconds)


def _pass_over(
    law: Choices, generator: np.random.RandomState, bits: np.random.MT19937
) -> Callable[[], object]:
    """Return a function that advances a generator by one draw from a distribution.

    The generator uses the bit generator ``bits``.
    """
    if isinstance(getattr(law, "dist", None), stats.rv_continuous):
        # Most continuous distributions use one uniform number per draw, and ``rvs`` is slow.
        return generator.random_sample
    if not isinstance(law, list):
        return partial(law.rvs, random_state=generator)
    last = len(law) - 1
    word = bits.random_raw
    # NumPy draws an integer by rejection: a masked word above ``last`` is drawn again.
    mask = (1 << last.bit_length()) - 1

    def pass_over_choice() -> None:
        """Consume the random words of ``randint(last + 1)``.

        It is 10x faster, because ``randint`` checks its arguments.
        """
        while last and word() & mask > last:
            pass

    return pass_over_choice


def first_candidates(
    space: CheckedSpace,
    *,
    n_trials: int,
    include: Sequence[Mapping[str, object]],
    include_default: bool,
    defaults: Mapping[str, object],
    portfolio: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Return the first trials of a new search.

    They are the default configuration, with it a ``portfolio``, and then the configurations of
    ``include``. A missing key takes its default value, moved into the space if the space has the
    key. A configuration equal to an earlier one is dropped.

    Args:
        space: The checked space.
        n_trials: The number of trials. It limits the length of the portfolio.
        include: Configurations that the user wants to run.
        include_default: If True, the default configuration is run.
        defaults: The default values. They include the ``optimizer``. If they lack a key of the
            space, no default configuration is run, and ``notes`` tells the user.
        portfolio: Good configurations to begin with.

    Raises:
        InputError: A configuration is invalid, or there is nothing to run.
    """
    check_count(n_trials, "n_trials", least=0, remedy=" For example n_trials=64.")
    configs: list[tuple[Config, str]] = []
    if include_default and n_trials:
        default, missing = _filled({}, space, defaults)
        if not missing:
            configs.append((default, "default"))
            configs += [
                (_filled(config, space, defaults)[0], "portfolio")
                for config in portfolio[: n_trials - 1]
            ]
    for i, config in enumerate(check_include(include, keys=KEYS, module=True)):
        full, missing = _filled(config, space, defaults)
        if missing:
            raise InputError(
                f"include[{i}] must have a value for {', '.join(missing)}, which has no default, "
                f"got {dict(include[i])!r}. Add it."
            )
        configs.append((full, "include"))
    if not configs and not n_trials:
        raise InputError(
            f"n_trials must be >= 1 where nothing else is to run, got n_trials={n_trials} and no "
            "included configuration. For example n_trials=64, or n_trials=1 for the default "
            "configuration alone."
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
    """Return the drawn trials that are missing from ``old``, with the next free numbers.

    ``n_trials`` configurations are drawn again, and those already in ``old`` are dropped. So the
    same seed continues a search. There are at most ``n_trials`` trials, including the default trial
    but not the included trials. A space of only lists is drawn without replacement, so a larger
    ``n_trials`` gives a different selection.

    Args:
        old: The trials so far.
        space: The checked space.
        n_trials: The number of trials.
        seed: The random seed.
        check: Checks each configuration.
        earlier: Configurations that other searches have tried. They are dropped too, and others are
            drawn instead, if the space has enough of them.
        seconds: After this time the drawing ends with fewer trials. None means no limit.
    """
    new: tuple[Candidate, ...] = ()
    lacking = n_trials - n_counted(old)
    known = [trial.params for trial in old if trial.origin == "random"]
    # At most 8 times as many draws: a space of few integers may have no new configuration.
    for times in (1, 2, 4, 8) if earlier else (1,):
        if len(new) < lacking:
            drawn = _draw_on(known, space, times * (n_trials + len(earlier)), seed, check, seconds)
            new = numbered([(config, "random") for config in drawn], old, earlier)[:lacking]
    return new


def n_counted(trials: Sequence[Candidate]) -> int:
    """Return the number of trials that count toward ``n_trials``. Included trials do not count."""
    return sum(trial.origin in ("default", "portfolio", "random") for trial in trials)


def notes(
    trials: Sequence[Candidate],
    space: CheckedSpace,
    *,
    include_default: bool,
    defaults: Mapping[str, object],
) -> tuple[str, ...]:
    """Return the remarks about the trials of a call, one sentence each."""
    sentences = []
    if include_default and (missing := _filled({}, space, defaults)[1]):
        sentences.append(
            f"No default configuration is run, because {', '.join(missing)} has no default value."
        )
    # A fixed value in the space needs no remark.
    fixed = {key for part in space for key, choices in part.items() if is_fixed(choices)}
    for trial in (trial for trial in trials if trial.origin == "default"):
        plain = _complete({k: v for k, v in trial.params.items() if k == "optimizer"}, defaults)
        others = {
            k: v for k, v in trial.params.items() if k not in fixed and k in plain and plain[k] != v
        }
        if moved := ", ".join(
            f"{key}={value!r} in place of {plain[key]!r}" for key, value in others.items()
        ):
            sentences.append(
                f"Trial {trial.number} is the default configuration, held to the space: {moved}."
            )
    for key, takers in TAKERS.items():
        used = {
            t.params.get("optimizer", str(defaults["optimizer"])) for t in trials if key in t.params
        }
        if used and used.isdisjoint(takers):
            sentences.append(
                f"{key!r} has no effect: {' and '.join(sorted(used))} "
                f"{'has' if len(used) == 1 else 'have'} none; leave it out, or use "
                f"{', '.join(takers[:-1])} or {takers[-1]}."
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
    """Return a remark if the number of ``trials`` is not ``n_trials``, or if an earlier default
    stays."""
    default = [
        trial.number for trial in trials if trial.origin == "default" and not include_default
    ]
    stays = "is the default configuration, which an earlier call asked for: it stays."
    sentences = [f"Trial {number} {stays}" for number in default]
    n_draws = _n_draws(space, n_trials)
    counted = n_counted(trials)
    if n_draws < n_trials:
        sentences.append(
            f"The space has {count(n_draws, 'configuration')}, fewer than n_trials={n_trials}: "
            "all of them are run."
        )
    elif counted < n_trials and timeout is not None:
        sentences.append(
            f"{counted} of {n_trials} configurations were drawn: the others repeat one of them, "
            f"or there was no time to draw them (timeout={timeout:g})."
        )
    elif counted < n_trials:
        sentences.append(
            f"{n_trials - counted} of {n_trials} configurations repeat another one and are not "
            "run again."
        )
    elif counted > n_trials:
        sentences.append(
            f"The study holds {counted} configurations, more than n_trials={n_trials}: all stay "
            "in it."
        )
    return tuple(sentences)


def _n_draws(space: CheckedSpace, n_trials: int) -> int:
    """Return the number of draws that are possible, at most ``n_trials``."""
    # At most the number of points of a space of lists. scikit-learn would warn about more draws.
    try:
        return len(ParameterSampler(space, n_trials))
    except OverflowError:
        lengths = [[len(value) for value in d.values() if isinstance(value, list)] for d in space]
        raise InputError(
            "space must have fewer than 2**63 configurations where it has lists only, got lists "
            f"of {lengths}. Use a distribution for one key, for example scipy.stats.randint(1, "
            "1001)."
        ) from None


def numbered(
    wanted: Iterable[tuple[Config, str]],
    old: Sequence[Candidate] = (),
    earlier: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Number new configurations, beginning after the numbers of ``old``.

    Configurations that are already in ``old`` or ``earlier`` are left out.
    """
    seen = {_identity(config) for config in (*earlier, *(trial.params for trial in old))}
    number = 1 + max((trial.number for trial in old), default=-1)
    new: list[Candidate] = []
    for config, origin in wanted:
        if (identity := _identity(config)) not in seen:
            seen.add(identity)
            new.append(Candidate(number + len(new), config, origin))
    return tuple(new)


def _filled(
    config: Config, space: CheckedSpace, defaults: Mapping[str, object]
) -> tuple[Config, list[str]]:
    """Return a configuration with default values for its missing keys, and the keys without a
    default."""
    full = _with_defaults(config, space, defaults)
    keys = {"l1_ratio" if key == "penalty" else key for part in space for key in part}
    # A width that is a tuple has the number of layers already.
    without = {"depth"} - config.keys() if isinstance(full.get("width"), tuple) else set()
    wanted = sorted((keys | config.keys()) - without)
    return {key: full[key] for key in wanted if key in full}, sorted(keys - full.keys())


def _with_defaults(config: Config, space: CheckedSpace, defaults: Mapping[str, object]) -> Config:
    """Return a configuration with all default values, moved into the space if the space has the
    key.

    If the space has alternatives, the first one counts that excludes the fewest of the default
    values. A key without a default takes its fixed value.
    """
    plain = _complete(config, defaults)
    part = min(
        space,
        key=lambda part: sum(not holds(part[key], plain[key]) for key in part if key in plain),
    )
    values: Config = {}
    # The optimizer comes first: the defaults of lr, weight_decay and momentum depend on it.
    for key in sorted(part, key=lambda key: key != "optimizer"):
        full = {"penalty": "l2", **_complete({**config, **values}, defaults)}
        known = key in config or (key == "penalty" and "l1_ratio" in config)
        if not known and (key in full or is_fixed(part[key])):
            values[key] = _nearest(key, part[key], full.get(key))
    if isinstance({**values, **config}.get("width"), tuple):
        values.pop("depth", None)
    return _complete(check_config({**values, **config}, name="space"), defaults)


def _nearest(key: str, choices: Choices, value: object) -> object:
    """Return the value of ``choices`` that is nearest to a value.

    This is the value itself if ``choices`` has it. Otherwise it is the nearest number, the first
    entry of a list, or a draw.
    """
    if isinstance(choices, list):
        if value in choices:
            return value
        numbers = [choice for choice in choices if isinstance(choice, int | float)]
        others = len(numbers) < len([choice for choice in choices if not isinstance(choice, tuple)])
        if others or not numbers or not isinstance(value, int | float):
            return choices[0]
        return min(numbers, key=lambda choice: abs(choice - value))
    if isinstance(value, int | float) and hasattr(choices, "support"):
        low, high = choices.support()
        inside = min(max(value, low), high)
        step = (
            choices.step if isinstance(choices, EvenSteps) else isinstance(choices, OwnDistribution)
        )
        inside = min(low + round((inside - low) / step) * step, high) if step else inside
        if not hasattr(choices, "pmf") or choices.pmf(inside) > 0:
            return inside
    return draw([{key: choices}], 1, 0)[0][key]


def _complete(config: Config, defaults: Mapping[str, object]) -> Config:
    """Return a configuration with all default values. Some of them depend on the optimizer."""
    word = config.get("optimizer", defaults.get("optimizer"))
    return {**({} if word is None else optimizer_defaults(str(word))), **defaults, **config}


def _identity(config: Mapping[str, object]) -> frozenset[tuple[str, Hashable]]:
    """Return a hashable value that is equal for equal configurations."""
    try:
        return frozenset(config.items())
    except TypeError:  # a value has no hash
        return frozenset((key, _hashable(value)) for key, value in config.items())


def _hashable(value: object) -> Hashable:
    """Return the value, or a hashable value that represents it.

    A list and a tuple of equal entries give the same result.
    """
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
