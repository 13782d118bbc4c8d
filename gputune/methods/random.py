"""Random search: the trials of a search, drawn once by scikit-learn's ParameterSampler, and what is
said of them."""

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy import stats
from sklearn.model_selection import ParameterSampler

from gputune.errors import InputError, check_count
from gputune.methods.config import KEYS, TAKERS, ConfigCheck, check_config
from gputune.methods.distributions import Choices, OwnDistribution, Space, Steps, holds, is_fixed
from gputune.methods.space import check_include
from gputune.optimizers.classes import optimizer_defaults
from gputune.study.store import Candidate
from gputune.text import count
from gputune.types import Config


def draw(
    space: Space,
    n_trials: int,
    seed: int | np.random.RandomState,
    check: ConfigCheck = check_config,
    *,
    seconds: float | None = None,
) -> list[Config]:
    """Return ``n_trials`` configurations of a checked space: ParameterSampler's own, so
    RandomizedSearchCV's too.

    A space of lists only is drawn without replacement; where it has too few points, all of them are
    returned, fewer than ``n_trials`` (``remarks`` says so). Raises InputError, for instance where a
    distribution of the user's own draws 17.3 for an integer key.

    After so many ``seconds`` it returns those that it has drawn, at least one.
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
    space: Space,
    n_trials: int,
    seed: int,
    check: ConfigCheck,
    seconds: float | None,
) -> list[Config]:
    """Return what ``draw`` does, without the first draws where ``known`` are these.

    The generator passes them over in a fraction of the time. Since ``known`` has no configuration
    twice, they are the first where the last of them is what is drawn next.
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
    """Return what moves a generator, which is over the ``bits``, on by a draw of a law."""
    if isinstance(getattr(law, "dist", None), stats.rv_continuous):
        return generator.random_sample  # most take the quantile of one, and ``rvs`` takes its time
    if not isinstance(law, list):
        return partial(law.rvs, random_state=generator)
    last = len(law) - 1
    word = bits.random_raw
    mask = (1 << last.bit_length()) - 1

    def pass_over_choice() -> None:
        """Take the words of ``randint(last + 1)``, which takes ten times as long for its checks."""
        while last and word() & mask > last:
            pass

    return pass_over_choice


def first_candidates(
    space: Space,
    *,
    n_trials: int,
    include: Sequence[Mapping[str, object]],
    include_default: bool,
    defaults: Mapping[str, object],
    portfolio: Sequence[Config] = (),
) -> tuple[Candidate, ...]:
    """Return what a new search begins with: the default configuration, with it a ``portfolio``,
    then ``include``.

    A key that is missing takes its default, held to the space where that names it. A configuration
    that is written like an earlier one is dropped, and the portfolio goes as far as ``n_trials``
    has room. Where ``defaults``, which has the
    ``optimizer``, lacks a key of the space, no default configuration is run (``notes`` says so).
    Raises InputError, also where nothing is left to run.
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
    space: Space,
    n_trials: int,
    seed: int,
    check: ConfigCheck = check_config,
    earlier: Sequence[Config] = (),
    seconds: float | None = None,
) -> tuple[Candidate, ...]:
    """Return the drawn trials that ``old`` lacks of ``n_trials``, numbered on from it.

    ``n_trials`` configurations are drawn anew and those in ``old`` dropped, so that the same seed
    continues a search. There are never more than ``n_trials`` in all, the default one among them
    and included ones not: lists alone, drawn without replacement, give another selection for a
    larger ``n_trials``.

    earlier: what other searches have tried is dropped too, and more is drawn in its place, as far
        as the space has it.
    seconds: after which drawing ends with fewer trials; None for no limit.
    """
    new: tuple[Candidate, ...] = ()
    lacking = n_trials - n_counted(old)
    known = [trial.params for trial in old if trial.origin == "random"]
    for times in (1, 2, 4, 8) if earlier else (1,):  # a space of few integers may have no more
        if len(new) < lacking:
            drawn = _draw_on(known, space, times * (n_trials + len(earlier)), seed, check, seconds)
            new = numbered([(config, "random") for config in drawn], old, earlier)[:lacking]
    return new


def n_counted(trials: Sequence[Candidate]) -> int:
    """Return how many trials ``n_trials`` counts: all but the included ones."""
    return sum(trial.origin in ("default", "portfolio", "random") for trial in trials)


def notes(
    trials: Sequence[Candidate],
    space: Space,
    *,
    include_default: bool,
    defaults: Mapping[str, object],
) -> tuple[str, ...]:
    """Return what a user should know of the trials of a call, a sentence each."""
    sentences = []
    if include_default and (missing := _filled({}, space, defaults)[1]):
        sentences.append(
            f"No default configuration is run, because {', '.join(missing)} has no default value."
        )
    # go without saying
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
    space: Space,
    *,
    n_trials: int,
    include_default: bool,
    timeout: float | None = None,
) -> tuple[str, ...]:
    """Return the sentences, if any, that tell the user once how the ``trials`` are other than
    ``n_trials``."""
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


def _n_draws(space: Space, n_trials: int) -> int:
    # At most the number of points where all are lists; asking for no more keeps scikit-learn from
    # warning.
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
    """Number configurations on from ``old``, leaving out those that are there, or in ``earlier``,
    already."""
    seen = {_identity(config) for config in (*earlier, *(trial.params for trial in old))}
    number = 1 + max((trial.number for trial in old), default=-1)
    new: list[Candidate] = []
    for config, origin in wanted:
        if (identity := _identity(config)) not in seen:
            seen.add(identity)
            new.append(Candidate(number + len(new), config, origin))
    return tuple(new)


def _filled(
    config: Config, space: Space, defaults: Mapping[str, object]
) -> tuple[Config, list[str]]:
    """Return a configuration with the defaults of the keys that it lacks, and those keys that have
    none."""
    full = _with_defaults(config, space, defaults)
    keys = {"l1_ratio" if key == "penalty" else key for part in space for key in part}
    # of so many layers
    without = {"depth"} - config.keys() if isinstance(full.get("width"), tuple) else set()
    wanted = sorted((keys | config.keys()) - without)
    return {key: full[key] for key in wanted if key in full}, sorted(keys - full.keys())


def _with_defaults(config: Config, space: Space, defaults: Mapping[str, object]) -> Config:
    """Return a configuration with all that has a default, which is held to the space where the
    space names it.

    Of alternatives the first counts that lacks the fewest of these values. What has no default
    takes its fixed value.
    """
    plain = _complete(config, defaults)
    part = min(
        space,
        key=lambda part: sum(not holds(part[key], plain[key]) for key in part if key in plain),
    )
    values: Config = {}
    # lr, weight_decay and momentum follow the optimizer.
    for key in sorted(part, key=lambda key: key != "optimizer"):
        full = {"penalty": "l2", **_complete({**config, **values}, defaults)}
        known = key in config or (key == "penalty" and "l1_ratio" in config)
        if not known and (key in full or is_fixed(part[key])):
            values[key] = _nearest(key, part[key], full.get(key))
    if isinstance({**values, **config}.get("width"), tuple):
        values.pop("depth", None)
    return _complete(check_config({**values, **config}, name="space"), defaults)


def _nearest(key: str, choices: Choices, value: object) -> object:
    """Return the value itself where ``choices`` have it, else the nearest number, the first of a
    list, or a draw."""
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
        step = choices.step if isinstance(choices, Steps) else isinstance(choices, OwnDistribution)
        inside = min(low + round((inside - low) / step) * step, high) if step else inside
        if not hasattr(choices, "pmf") or choices.pmf(inside) > 0:
            return inside
    return draw([{key: choices}], 1, 0)[0][key]


def _complete(config: Config, defaults: Mapping[str, object]) -> Config:
    word = config.get("optimizer", defaults.get("optimizer"))
    return {**({} if word is None else optimizer_defaults(str(word))), **defaults, **config}


def _identity(config: Mapping[str, object]) -> frozenset[tuple[str, Hashable]]:
    try:
        return frozenset(config.items())
    except TypeError:  # a value has no hash
        return frozenset((key, _hashable(value)) for key, value in config.items())


def _hashable(value: object) -> Hashable:
    """Return the value, or what stands for it where it has no hash; a list and a tuple of equals
    are equal."""
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
