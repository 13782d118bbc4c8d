"""Search with Optuna's TPE, in the settings that gputune measured."""

from dataclasses import dataclass

from gputune.methods.optuna import OptunaSampler


@dataclass(frozen=True)
class TPE(OptunaSampler):
    """Search with Optuna's TPE sampler, the method of ``tune(method="tpe")``.

    Use ``gputune.OptunaSampler("tpe", ...)`` to set its options.
    """

    name = "tpe"
    help = "Optuna's TPE learns from earlier trials and proposes batches of new ones"

    sampler: str = "tpe"
