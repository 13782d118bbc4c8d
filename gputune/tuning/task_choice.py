"""Whether whole numbers to be predicted are classes, where the user does not say it and the values
do not tell."""

from contextlib import suppress

import numpy as np
import torch

from gputune.data.source import Source
from gputune.data.target import TaskWord, are_many_whole_numbers, check_target, whole_numbers_words
from gputune.errors import InputError, InputWarning, warn
from gputune.modules.module_trial import ModuleTrial
from gputune.scoring.losses import only_classifies
from gputune.tuning.choices import ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.problem import make_problem
from gputune.tuning.session import checked_space, first_trials

_ROWS_PER_NUMBER = 10  # numbers that repeat so often on average may well be classes
_ROWS_PER_CODE = 2  # and codes 0, 1, 2, ... that repeat so often


def chosen_task(source: Source, choice: ModelChoice, options: Options) -> TaskWord | None:
    """Return the task that the user says or that the model decides; None to take the target as it
    looks.

    More than ``MAX_CLASSES`` distinct whole numbers look like a number to be predicted. They are
    classes if the loss only classifies, or if the module has as many outputs as there are distinct
    numbers although it was asked for one output. Otherwise numbers that may well be classes are
    warned of.
    """
    if options.task is not None:
        return options.task
    target = check_target(source.y, n_rows=len(source.X), name=source.target)
    if not are_many_whole_numbers(target):
        return None
    n_distinct = len(np.unique(target.values))
    if only_classifies(options.loss) or _n_outputs(source, choice, options) == n_distinct:
        return "classification"
    if _may_be_classes(target.values, n_distinct):
        warn(f"{whole_numbers_words(target)} If not, say task='regression'.", InputWarning)
    return None


def _may_be_classes(values: np.ndarray, n_distinct: int) -> bool:
    """Whether whole numbers repeat as classes do; consecutive ones from 0 or 1 may be codes of many
    small classes."""
    rows_per_number = len(values) / n_distinct
    are_codes = values.min() in (0, 1) and values.max() - values.min() < 1.1 * n_distinct
    return rows_per_number >= (_ROWS_PER_CODE if are_codes else _ROWS_PER_NUMBER)


def _n_outputs(source: Source, choice: ModelChoice, options: Options) -> int | None:
    """Return the number of outputs of a module that is asked for one output; None if it cannot be
    tried.

    An error of the module is left to its inspection, which knows more to say.
    """
    if choice.module_class is None:
        return None
    with suppress(InputError):
        problem = make_problem(source, "regression", choice, options)
        rows = np.arange(len(source.X), dtype=np.int64)
        data = problem.dataset([(rows, rows[:0])], torch.device("cpu"))
        trials = first_trials(checked_space(choice, options), choice, options)
        trial = ModuleTrial(choice.module_class, trials[0].params if trials else {}, data)
        outputs = trial.forward(trial.inputs, training=False)
        if isinstance(outputs, torch.Tensor) and outputs.dim() == 2:
            return outputs.shape[1]
    return None
