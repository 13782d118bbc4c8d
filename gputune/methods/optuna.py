"""Search with an Optuna sampler, which proposes the configurations.

gputune copies the user's sampler into an Optuna study in memory. It asks this copy for
configurations, and reports their scores to it.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING

from gputune.ground.entry_points import import_extra
from gputune.ground.errors import InputError, check_count, option
from gputune.ground.text import clean, count
from gputune.ground.types import Json
from gputune.methods.halving import Halving
from gputune.methods.stopping import pruning_text
from gputune.tuning.method import Method, method_class

if TYPE_CHECKING:
    import optuna

    from gputune.executors.worker import PruningRule
    from gputune.methods.sampling import OptunaStudy
    from gputune.spaces.config import ConfigCheck
    from gputune.spaces.distributions import CheckedSpace
    from gputune.study.store import Candidate
    from gputune.study.study import Study
    from gputune.tuning.context import Context
    from gputune.tuning.session import Session


@dataclass(frozen=True)
class OptunaSampler(Method):
    """Options of a search with an Optuna sampler, for ``tune(method=...)`` or ``search``.

    The sampler proposes batches of configurations. The configurations of a batch train together. If
    the search resumes from its study file, a fresh copy of the sampler proposes the same trials
    again, and receives their results. A sampler without a seed may propose other trials. gputune
    then adds a note.

    Args:
        sampler: "tpe" is Optuna's TPE in the settings that gputune measured, with the
            ``random_state`` of the search [default: "tpe"]. Or an Optuna sampler such as
            ``optuna.samplers.TPESampler(seed=0)``. gputune copies the sampler for each search and
            never changes it. A TPESampler should have
            ``constant_liar=True``, which is Optuna's default since version 5. Otherwise the
            proposals of one batch are very similar.
        batch: The number of proposals that train together, at least 1 [default: 16]. The sampler
            receives no score of a batch before it has proposed all of the batch.
            With ``halving`` and ``refill``, it is the number of slots, which is the number of
            trials that train at the same time.
        halving: None trains every trial to its end. ``gputune.Halving(...)`` applies successive
            halving. gputune reports trials that stop at a rung to the sampler as pruned.
        refill: With ``halving``, True fills the slots of pruned trials with new proposals at once
            [default: True]. A trial is then compared with all trials that ever reached its rung
            (ASHA, arXiv:1810.05934). False trains batch by batch, and compares the trials within
            each batch. Without ``halving`` both are the same. ``gputune.search`` always trains
            batch by batch.

    Raises:
        InputError: An option is invalid.
        MissingExtraError: Optuna is not installed.

    Example:
        >>> import gputune, optuna
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)
        >>> method = gputune.OptunaSampler(sampler, batch=4)
        >>> study = gputune.tune(
        ...     "mlp", X, y, method=method, n_trials=9, max_epochs=3, verbose=0
        ... )
        >>> [trial.origin for trial in study.trials[::4]]
        ['default', 'batch 1', 'batch 2']
    """

    name = "optuna"
    samples_first = False

    sampler: "optuna.samplers.BaseSampler | str" = "tpe"
    _: KW_ONLY
    batch: int = 16
    halving: Halving | None = None
    refill: bool = True

    def __post_init__(self) -> None:
        if self.sampler != "tpe":
            self._check_sampler()
        check_count(self.batch, "OptunaSampler(batch=...)")
        if self.halving is not None and not isinstance(self.halving, Halving):
            raise InputError(
                "OptunaSampler(halving=...)",
                "must be gputune.Halving(...) or None",
                got=self.halving,
            )
        if not isinstance(self.refill, bool):
            raise InputError("OptunaSampler(refill=...)", "must be True or False", got=self.refill)

    def _check_sampler(self) -> None:
        """Raise InputError if the sampler is not an Optuna sampler that can propose batches."""
        samplers = import_extra("optuna.samplers", extra="optuna", used_by="OptunaSampler")
        if not isinstance(self.sampler, samplers.BaseSampler):
            raise InputError(
                "OptunaSampler(sampler=...)",
                "must be 'tpe' or an Optuna sampler",
                got=self.sampler,
                remedy="For example optuna.samplers.TPESampler(seed=0).",
            )
        if isinstance(self.sampler, samplers.GridSampler | samplers.BruteForceSampler):
            random = option("method", "random")
            raise InputError(
                "OptunaSampler(sampler=...)",
                f"cannot be a {type(self.sampler).__name__}, which ends Optuna's own optimization",
                remedy=f"Use a space of lists with {random}, which runs every point.",
            )

    def seeded_sampler(self, seed: int | None) -> "optuna.samplers.BaseSampler":
        """Return the user's sampler, or the TPE sampler with a random seed."""
        from gputune.methods.sampling import tpe_sampler

        return tpe_sampler(seed) if isinstance(self.sampler, str) else self.sampler

    @property
    def lacks(self) -> str:
        return "" if self.sampler == "tpe" else "method, with a sampler of Optuna's"

    @property
    def refills(self) -> bool:
        """True if the search refills the slots of pruned trials. Without halving, no slot becomes
        free before all trials of its batch have ended."""
        return self.refill and self.halving is not None

    @property
    def compares_trials(self) -> bool:
        return self.halving is not None

    def check_space(self, space: "CheckedSpace") -> None:
        """Raise InputError if the sampler cannot propose configurations of the space."""
        from gputune.methods.sampling import check_askable

        check_askable(space)

    def check(
        self, context: "Context", space: "CheckedSpace", trials: "Sequence[Candidate]"
    ) -> None:
        """Raise InputError if the sampler or the halving does not fit the search."""
        from gputune.methods.rungs import check_rungs

        self.check_space(space)
        self.seeded_sampler(None)  # raises MissingExtraError without Optuna
        if "penalty" in space[0]:
            raise InputError(
                "space",
                "must have 'l1_ratio' instead of the older key 'penalty' for an Optuna sampler",
                remedy="l1_ratio=0 is l2, l1_ratio=1 is l1, and C=inf is no penalty.",
            )
        if self.halving is not None:
            check_rungs(self.halving, context)

    def run(self, context: "Context", space: "CheckedSpace") -> None:
        """Train the waiting trials, and then the proposals of the sampler."""
        from gputune.methods.rungs import train_in_rungs
        from gputune.methods.sampling import SlotStudy, add_earlier, sample
        from gputune.methods.training import train_batches

        if self.refill and self.halving is not None:
            seed = context.options.search.random_state
            study = SlotStudy(self.seeded_sampler(seed), space)
            add_earlier(study, context)
            train_in_rungs(context, self.halving, context.ledger.candidates, study, self.batch)
            return
        train = partial(train_batches, context, self.halving)
        sample(
            context,
            train,
            self._make_study(context, space),
            batch=self.batch,
            epochs=context.epochs,
        )

    def run_loop(
        self,
        session: "Session",
        space: "CheckedSpace",
        train: Callable[[], bool],
        check: "ConfigCheck",
    ) -> None:
        """Train the waiting trials of a custom training loop, and then the sampler's proposals."""
        from gputune.methods.sampling import sample

        sample(session, train, self._make_study(session, space, check), batch=self.batch, epochs=1)

    def _make_study(
        self, session: "Session", space: "CheckedSpace", check: "ConfigCheck | None" = None
    ) -> "Callable[..., OptunaStudy]":
        """Return a function that makes an Optuna study with a fresh copy of the sampler."""
        from gputune.methods.sampling import OptunaStudy
        from gputune.spaces.config import check_config

        sampler = self.seeded_sampler(session.options.search.random_state)
        return partial(OptunaStudy, sampler, space, check=check or check_config)

    def pruning_rule(self, max_epochs: int | None) -> "PruningRule | None":
        """Return the rule of the halving, or None."""
        return None if self.halving is None else self.halving.pruning_rule(max_epochs)

    def to_json(self) -> Json:
        """Return the options as plain JSON. It has only the name of a sampler's class."""
        halving = None
        if self.halving is not None:
            halving = dict(self.halving.to_json())
            del halving["name"]
        if isinstance(self.sampler, str):
            return {
                "name": self.name,
                "sampler": self.sampler,
                "batch": self.batch,
                "halving": halving,
                "refill": self.refill,
            }
        record = {"name": self.name, "sampler": type(self.sampler).__name__, "halving": halving}
        # Left out without refilled slots, so that older studies continue.
        return record | {"refill": True} if self.refills else record

    @classmethod
    def from_json(cls, options: Json) -> Method:
        """Return the method, or random search in place of a sampler that the file cannot store.

        A refit does not use the sampler.
        """
        if options["sampler"] != "tpe":
            return method_class("random")()
        halving = options["halving"]
        return cls(**{**options, "halving": None if halving is None else Halving(**halving)})

    @classmethod
    def summary(cls, study: "Study") -> list[tuple[str, str]]:
        """Return a line about the proposals, and a line about the pruned trials."""
        method = study.record.method
        assert isinstance(method, dict)
        origins = [trial.origin for trial in study.trials if str(trial.origin).startswith("batch ")]
        n_batches = len(set(origins))
        batches = "1 batch" if n_batches == 1 else f"{n_batches} batches"
        trials = count(len(origins), "trial")
        sampler = "TPESampler" if method["sampler"] == "tpe" else clean(method["sampler"])
        lines = [("Sampler", f"Optuna's {sampler} proposed {trials} in {batches}")]
        if method["halving"]:
            lines.append(("Halving", pruning_text(study)))
        return lines


@dataclass(frozen=True)
class TPE(OptunaSampler):
    """Search with Optuna's TPE sampler, the method of ``tune(method="tpe")``.

    Use ``gputune.OptunaSampler("tpe", ...)`` to set its options.
    """

    name = "tpe"
    help = "Optuna's TPE learns from earlier trials and proposes batches of new ones"

    sampler: str = "tpe"
