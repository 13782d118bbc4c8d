"""The default number of epochs and the default patience of a search, by the number of rows.

Above 50,000 rows, a trial reads about as many rows in its whole training as with 50 epochs of 50,000
rows. AutoGluon scales the patience of its boosted trees in the same way, from 10,000 rows on
(``get_early_stopping_rounds``). pytabkit and skorch train for the same number of epochs at every
number of rows, until a time limit ends the training.
"""

import math

from gputune.ground.types import LARGE_TABLE
from gputune.spaces.distributions import CheckedSpace
from gputune.spaces.space import choices_of
from gputune.tuning.choices import ModelChoice
from gputune.tuning.method import why_no_patience
from gputune.tuning.options import DEFAULT_EPOCHS, Options

_FEWEST_EPOCHS = 10
_PATIENCE_SHARE = 1 / 4  # of the epochs
_LEAST_PATIENCE = 3  # epochs


def with_length(
    options: Options, choice: ModelChoice, space: CheckedSpace, n_rows: int
) -> tuple[Options, tuple[str, ...]]:
    """Return the options with numbers in place of "auto" for ``max_epochs`` and ``patience``.

    The second result has remarks for the user on defaults that depend on the number of rows. They
    are for tables, so "auto" means 50 epochs without patience for a user's module.
    """
    training = options.training
    is_large = n_rows > LARGE_TABLE and not choice.takes_arrays and not choice.solved
    remarks = []
    max_epochs = training.epochs
    if is_large and training.max_epochs == "auto":
        max_epochs = max(_FEWEST_EPOCHS, round(DEFAULT_EPOCHS * LARGE_TABLE / n_rows))
        remarks.append(
            f"{n_rows:,} rows: trials train for at most {max_epochs} epochs, because an epoch has "
            f"more steps than one of {LARGE_TABLE:,} rows, for which the default is "
            f"{DEFAULT_EPOCHS} epochs"
        )
    patience = training.patience_epochs
    if is_large and training.patience == "auto" and _may_end_early(options, choice, space):
        patience = max(_LEAST_PATIENCE, math.ceil(_PATIENCE_SHARE * max_epochs))
        remarks.append(
            f"{n_rows:,} rows: a trial ends after {patience} epochs without a better mean score, "
            "the default patience of a large table"
        )
    return options.changed(max_epochs=max_epochs, patience=patience), tuple(remarks)


def _may_end_early(options: Options, choice: ModelChoice, space: CheckedSpace) -> bool:
    """Return whether trials without a better score for some epochs are unlikely to become better.

    A schedule lowers the learning rate at its end, where scores become better again.
    """
    training = options.training
    default = choice.complete({}, training.schedule)["schedule"]
    if set(choices_of(space, "schedule", default=default)) != {"constant"}:
        return False
    return not why_no_patience(options.search.method, training.epoch, solved=choice.solved)
