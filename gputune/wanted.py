"""The trials that a call wants: given, drawn, or asked for later; and those of them that its study lacks."""

import inspect
from collections.abc import Sequence
from dataclasses import replace

from gputune.model_choice import ModelChoice
from gputune.options import Options
from gputune.search.optuna_sampler import OptunaSampler
from gputune.search.random import candidates, remarks, top_up
from gputune.search.space import Space
from gputune.study.ledger import Ledger
from gputune.study.store import Candidate
from gputune.types import DEFAULTS, Config


def wanted_trials(space: Space, choice: ModelChoice, options: Options) -> tuple[Candidate, ...]:
    """Draw the trials of this call: the default one, the included ones, the random ones."""
    return candidates(
        space,
        n_trials=_drawn(options),
        asked=_asked(options),
        include=options.include,
        include_default=options.include_default,
        random_state=options.random_state,
        defaults=_defaults(choice, options),
    )


def add_trials(ledger: Ledger, wanted: Sequence[Candidate], space: Space, options: Options) -> None:
    """Add the trials that the ledger lacks: all of a new study, or what this call adds to an old one."""
    if _lacking(ledger, wanted, space, options):
        with ledger.alone():  # another process may have added them meanwhile
            ledger.add(_lacking(ledger, wanted, space, options))


def remarks_on(ledger: Ledger, space: Space, choice: ModelChoice, options: Options) -> tuple[str, ...]:
    """Return what the user should know of the trials of a ledger, a sentence each."""
    return remarks(
        ledger.candidates,
        space,
        n_trials=_drawn(options),
        include_default=options.include_default,
        defaults=_defaults(choice, options),
    )


def _lacking(
    ledger: Ledger, wanted: Sequence[Candidate], space: Space, options: Options
) -> Sequence[Candidate]:
    if not ledger.candidates:
        return wanted
    known = [candidate.params for candidate in ledger.candidates]
    given = [c for c in wanted if c.origin != "random" and c.params not in known]
    number = 1 + max(candidate.number for candidate in ledger.candidates)
    added = [replace(c, number=number + i) for i, c in enumerate(given)]
    return [*added, *top_up([*ledger.candidates, *added], space, _drawn(options), options.random_state)]


def _drawn(options: Options) -> int:
    """How many trials are drawn at once; a sampler of Optuna's proposes its own later."""
    return 0 if _asked(options) else options.n_trials


def _asked(options: Options) -> int:
    """How many trials a sampler of Optuna's proposes."""
    return options.n_trials if isinstance(options.method, OptunaSampler) else 0


def _defaults(choice: ModelChoice, options: Options) -> Config:
    defaults = {**DEFAULTS, "optimizer": choice.optimizer, "schedule": options.schedule}
    if choice.module_class is not None:  # what its own signature says
        for name, parameter in inspect.signature(choice.module_class).parameters.items():
            if parameter.default is not parameter.empty:
                defaults[f"module__{name}"] = parameter.default
    return defaults
