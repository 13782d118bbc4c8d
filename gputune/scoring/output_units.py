"""Refuse scores that compare the target with outputs in other units, such as logits or log
rates."""

from gputune.data.target import Target
from gputune.ground.errors import InputError, option
from gputune.scoring.losses import only_classifies
from gputune.scoring.metrics import OneScoring, Scorings, default_scoring, scorers_of
from gputune.scoring.objective import Objective, loss_arguments
from gputune.scoring.torch_losses import name_of_loss, other_units, remedy_for_units


def _scorers(scoring: Scorings | None) -> list[OneScoring | None]:
    """Return the scorers of a ``scoring`` argument as a list. None stands for the default score."""
    if scoring is None:
        return [None]
    several = scorers_of(scoring)
    return [scoring] if several is None else list(several.values())  # type: ignore[list-item]


def soft_label_scoring(scoring: Scorings | None) -> Scorings:
    """Return the ``scoring`` for a target of class probabilities (soft labels). The default is
    "neg_loss".

    Raises InputError for scores that would compare the probabilities with logits.
    """
    for scorer in _scorers(scoring):
        if isinstance(scorer, str) and scorer != "neg_loss":
            raise InputError(
                f"scoring={scorer!r}",
                "would compare the module's logits with the probabilities in y",
                remedy=f"Leave {option('scoring')} out to rank by the loss, or give "
                "scoring=callable(outputs, y).",
            )
    return "neg_loss" if scoring is None else scoring


def output_units(objective: Objective, n_outputs: int) -> str:
    """Return the unit of a module's outputs if its loss fixes a unit other than y's, such as "log
    rates".

    The result is "" if the outputs have the unit of y.
    """
    if objective.step is not None:
        return ""
    if n_outputs == 1 and only_classifies(objective.loss):
        return ""  # it is refused together with its target
    return other_units(objective.loss, loss_arguments(objective.fixed))


def refuse_other_units(scoring: Scorings | None, objective: Objective, target: Target) -> None:
    """Raise InputError if a score would compare the target with outputs in another unit, such as
    logits."""
    named = [one for one in _scorers(scoring) if not callable(one) and one != "neg_loss"]
    if not named:
        return
    units = output_units(objective, target.n_outputs)
    score = named[0] or default_scoring("regression", objective)
    other = remedy_for_units(objective.loss)
    by_loss = option("scoring", "neg_loss")
    remedy = f"{other}, or say {by_loss}" if other else f"Say {by_loss}"
    raise InputError(
        f"loss={name_of_loss(objective.loss)}",
        f"makes the outputs {units}, and {option('scoring', score)} would compare these with "
        f"{target.name}",
        remedy=f"{remedy}: then the loss ranks the trials, and predict returns {units}.",
    )
