"""The options of a search whose configurations one of Optuna's samplers proposes."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from gputune.errors import InputError
from gputune.extras import import_extra
from gputune.search.halving import Halving


@dataclass(frozen=True)
class OptunaSampler:
    """Options of ``tune(method=...)``: a sampler of Optuna's proposes, a batch of its proposals trains together.

    sampler   a sampler such as ``optuna.samplers.TPESampler(seed=0)``. It is copied for each search and never
              changed, and taken as it is: a TPESampler should have ``constant_liar=True``, which is Optuna's own
              default since version 5, or else the proposals of one batch are much alike
    batch     proposals that train together, before the sampler hears of any of their scores
    halving   None trains every trial to its end; ``gputune.Halving(...)`` halves every batch by itself, and trials that
              a rung sends away are told as pruned

    Raises InputError; MissingExtraError without Optuna.
    """

    sampler: Any
    _: KW_ONLY
    batch: int = 16
    halving: Halving | None = None

    def __post_init__(self) -> None:
        samplers = import_extra("optuna.samplers", extra="optuna", used_by="OptunaSampler")
        if not isinstance(self.sampler, samplers.BaseSampler):
            raise InputError(
                "OptunaSampler(sampler=...) must be a sampler of Optuna's, for example "
                f"optuna.samplers.TPESampler(seed=0), got {self.sampler!r}."
            )
        if isinstance(self.sampler, samplers.GridSampler | samplers.BruteForceSampler):
            raise InputError(
                f"OptunaSampler(sampler=...) cannot be a {type(self.sampler).__name__}, which ends an optimization of "
                "Optuna's own; a space of lists with method='random' runs every point."
            )
        if isinstance(self.batch, bool) or not isinstance(self.batch, int) or self.batch < 1:
            raise InputError(f"OptunaSampler(batch=...) must be an integer >= 1, got {self.batch!r}.")
        if self.halving is not None and not isinstance(self.halving, Halving):
            raise InputError(
                f"OptunaSampler(halving=...) must be gputune.Halving(...) or None, got {self.halving!r}."
            )
