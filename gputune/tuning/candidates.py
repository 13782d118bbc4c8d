"""The space of a call, and the trials that it begins with: the default one, included and drawn ones, those missing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from math import isfinite

from torch import Tensor

from gputune.errors import InputError, StudyCorruptError, StudyVersionError
from gputune.garbage import without_collector
from gputune.methods.config import ConfigCheck, check_config, legal_keys
from gputune.methods.descent import Hypergradient
from gputune.methods.optuna import OptunaSampler
from gputune.methods.random import first_candidates, is_inside, n_counted, notes, top_up
from gputune.methods.recipes import PORTFOLIOS, SPACES, default_space, named_space
from gputune.methods.space import Space, check_include, check_space, choices_of, space_text, to_scipy
from gputune.modules.construction import parameters_of
from gputune.optimizers.classes import argument_defaults
from gputune.scoring.objective import loss_defaults
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate, Store
from gputune.tuning.choices import ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.problem import Problem
from gputune.types import DEFAULTS, NUMBERS, TENSOR_NUMBERS, Config


def checked_space(choice: ModelChoice, options: Options) -> Space:
    """Return the checked space of a call, by default that of the model. Raises InputError."""
    keys, module = legal_keys(choice.searched, choice.optimizer), choice.searched == "module"
    check_include(options.include, keys=keys, module=module)
    space = options.space
    if isinstance(space, str):
        _check_named(space, choice)
        space = named_space(space, choice.goal)
    elif space is None and choice.recipe:
        space = named_space("realmlp", choice.goal)
    elif space is None:
        space = default_space(choice.searched, choice.optimizer, choice.module_class)
    checked = check_space(to_scipy(space), keys=keys, module=module)
    ways = choices_of(checked, "numbers", default=options.numbers)
    if options.numbers not in ("auto", *ways):
        raise InputError(
            f"numbers={options.numbers!r} is none of those that the space has, {', '.join(ways)}, so no trial would "
            "have it; leave it out, or add it to the space."
        )
    return checked


def _check_named(space: str, choice: ModelChoice) -> None:
    """Raise InputError for a space of a name that is another model's, or was measured with another optimizer."""
    if space not in SPACES:
        return  # which ``named_space`` says
    if choice.searched != "mlp" if space in PORTFOLIOS else not choice.recipe:
        model, words = ("mlp", "the MLP") if space in PORTFOLIOS else ("realmlp", "RealMLP")
        given = "realmlp" if choice.recipe else choice.name
        raise InputError(
            f"space={space!r} is of {words}, got model={given!r}; choose model={model!r}, or a space of keys."
        )
    if space in PORTFOLIOS and choice.optimizer != "adamw":
        raise InputError(
            f"space={space!r} begins with configurations that were measured with adamw, got optimizer="
            f"{choice.optimizer!r}; leave one of them out."
        )


_BEST = 5
"""Trials of each earlier study that are tried first."""


@contextmanager
def open_store(options: Options) -> Iterator[Store | None]:
    """Open the study of the search that goes on; None of a new one, and of a file with a fault, which is said later."""
    store = None
    if options.study is not None:
        with suppress(OSError, StudyCorruptError, StudyVersionError):
            store = Store.open(options.study)
    with nullcontext() if store is None else store:
        yield store


def _portfolio(problem: Problem | None, options: Options) -> list[Config]:
    """Return the good configurations that a named space begins with, those that the rows and the method can have."""
    if problem is None or not isinstance(options.space, str) or isinstance(options.method, Hypergradient):
        return []  # a descent knows no averages of weights
    ways = TENSOR_NUMBERS if isinstance(problem.raw, Tensor) else NUMBERS
    return [one for one in PORTFOLIOS.get(options.space, ()) if one.get("numbers", "standard") in ways]


def first_trials(
    space: Space, choice: ModelChoice, options: Options, store: Store | None = None, problem: Problem | None = None
) -> tuple[Candidate, ...]:
    """Draw the trials of this call: default, portfolio, included, random, of which those in the study come first."""
    first = first_candidates(
        space,
        n_trials=options.n_trials,
        include=options.include,
        include_default=options.include_default,
        defaults=_defaults(choice, options),
        portfolio=_portfolio(problem, options),
    )
    if not draws_at_once(options):
        return first
    known = first + _stored_draws(store, options, space)[: max(0, options.n_trials - n_counted(first))]
    return known + top_up(known, space, options.n_trials, options.random_state, earlier=earlier_configs(options))


def earlier_configs(options: Options) -> list[Config]:
    """Return the configurations that earlier studies have trained, which are not drawn again."""
    return [t.params for study in options.warm_start for t in study.trials if t.state != "waiting"]


def _stored_draws(store: Store | None, options: Options, space: Space) -> tuple[Candidate, ...]:
    """Return the drawn trials of the search that goes on; to draw many takes long."""
    with suppress(OSError, StudyCorruptError):  # said where the search is opened
        if store is not None:
            meta = store.meta
            if (meta.get("seed"), meta.get("space")) == (options.random_state, space_text(space)):
                return tuple(trial for trial in store.candidates() if trial.origin == "random")
    return ()


def with_earlier(options: Options, space: Space) -> Options:
    """Return the options with the best trials of earlier studies among those that are included.

    Raises InputError for a study that has none in the space.
    """
    configs: list[Mapping[str, object]] = []
    for study in options.warm_start:
        name = "warm_start: a study in memory" if study.file is None else f"warm_start: study {str(study.file)!r}"
        trials = [trial for trial in study.ranking() if trial.state == "complete" and isfinite(trial.score)]
        if not trials:
            raise InputError(f"{name} has no finished trial; leave it out.")
        inside = [trial.params for trial in trials if is_inside(trial.params, space)]
        if not inside:
            keys = sorted(trials[0].params.keys() ^ {key for part in space for key in part})
            differs = f"the keys {', '.join(keys)}" if keys else f"values, such as {trials[0].params!r}"
            raise InputError(
                f"{name} was searched in another space, which differs in {differs}; leave warm_start out, or search "
                "that space."
            )
        configs += inside[:_BEST]
    return replace(options, include=[*options.include, *configs])


def notes_on(trials: Sequence[Candidate], space: Space, choice: ModelChoice, options: Options) -> tuple[str, ...]:
    """Return what the user should know of the trials of this call, a sentence each."""
    defaults = _defaults(choice, options)
    return notes(trials, space, include_default=options.include_default, defaults=defaults)


def add_missing(
    ledger: Ledger, trials: Sequence[Candidate], space: Space, options: Options, check: ConfigCheck = check_config
) -> None:
    """Add the trials that the ledger lacks: all of a new study, or what this call adds to an old one."""
    known = len(ledger.candidates)
    with without_collector():
        new = _missing(ledger, trials, space, options, check)
    if new:
        with ledger.alone():
            if len(ledger.candidates) > known:  # another process has added some meanwhile
                new = _missing(ledger, trials, space, options, check)
            ledger.add(new)


def _missing(
    ledger: Ledger, trials: Sequence[Candidate], space: Space, options: Options, check: ConfigCheck
) -> Sequence[Candidate]:
    if not ledger.candidates:
        return trials
    known = [candidate.params for candidate in ledger.candidates]
    # The default configuration was another one where it was not yet held to the space: it runs once.
    origins = {"random"} | {c.origin for c in ledger.candidates if c.origin == "default"}
    new = [c for c in trials if c.origin not in origins and c.params not in known]
    room = max(0, options.n_trials - n_counted(ledger.candidates))
    beyond = [c for c in new if c.origin == "portfolio"][room:]
    new = [c for c in new if c not in beyond]
    number = 1 + max(candidate.number for candidate in ledger.candidates)
    added = [replace(c, number=number + i) for i, c in enumerate(new)]
    if not draws_at_once(options):
        return added
    known_now, seed = [*ledger.candidates, *added], options.random_state
    there = {candidate.number: candidate for candidate in ledger.candidates}
    drawn = [c.params for c in trials if c.origin == "random" and there.get(c.number) != c]
    return [*added, *top_up(known_now, space, options.n_trials, seed, check, earlier_configs(options), drawn)]


def draws_at_once(options: Options) -> bool:
    """Whether trials are drawn at once; a sampler of Optuna's proposes its own later."""
    return not isinstance(options.method, OptunaSampler)


def _defaults(choice: ModelChoice, options: Options) -> Config:
    defaults: Config = {**DEFAULTS, "numbers": options.numbers}
    if choice.module_class is not None:  # what signatures say
        defaults |= argument_defaults(choice.optimizer)
        defaults |= loss_defaults(options.loss)
        for name, parameter in parameters_of(choice.module_class).items():
            if parameter.default is not parameter.empty:
                defaults[f"module__{name}"] = parameter.default
    return defaults | choice.defaults(options.schedule)
