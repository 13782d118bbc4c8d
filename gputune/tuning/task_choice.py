"""The decision whether the integers of a target are classes or numbers.

gputune decides this if the user does not set the task and the values are ambiguous.
"""

from contextlib import suppress

import numpy as np
import torch

from gputune.data.source import Source
from gputune.data.target import TaskWord, are_many_whole_numbers, check_target, whole_numbers_words
from gputune.ground.errors import InputError, InputWarning, option, warn
from gputune.modules.module_trial import ModuleTrial
from gputune.scoring.losses import only_classifies
from gputune.tuning.choices import ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.problem import make_problem
from gputune.tuning.session import checked_space, first_trials

_ROWS_PER_NUMBER = 10  # numbers that repeat this often on average are probably classes
_ROWS_PER_CODE = 2  # the same for consecutive codes 0, 1, 2, ...


def chosen_task(source: Source, choice: ModelChoice, options: Options) -> TaskWord | None:
    """Return the task (such as classification) that the user sets or that the model determines.

    Returns None if neither does. The values of the target then decide. A target with more than
    ``MAX_CLASSES`` distinct integers looks like a regression. The integers are classes in two
    cases. Either the loss is only for classes, or the module has one output for each distinct
    integer although it was asked for one output. Otherwise gputune warns if the integers are
    probably classes.
    """
    if options.rows.task is not None:
        return options.rows.task
    target = check_target(source.y, n_rows=len(source.X), name=source.target)
    if not are_many_whole_numbers(target):
        return None
    n_distinct = len(np.unique(target.values))
    if only_classifies(options.training.loss) or _n_outputs(source, choice, options) == n_distinct:
        return "classification"
    if _may_be_classes(target.values, n_distinct):
        task = option("task", "regression")
        warn(f"{whole_numbers_words(target)} If not, pass {task}.", InputWarning)
    return None


def _may_be_classes(values: np.ndarray, n_distinct: int) -> bool:
    """Return True if the integers of a target are probably class codes, because they repeat often.

    Consecutive integers from 0 or 1 may be the codes of many small classes.
    """
    rows_per_number = len(values) / n_distinct
    # Codes begin at 0 or 1 and have almost no gaps.
    are_codes = values.min() in (0, 1) and values.max() - values.min() < 1.1 * n_distinct
    return rows_per_number >= (_ROWS_PER_CODE if are_codes else _ROWS_PER_NUMBER)


def _n_outputs(source: Source, choice: ModelChoice, options: Options) -> int | None:
    """Return the number of outputs of a module that was built for one output.

    Returns None if the module does not run. A later check of the module reports its error with a
    better message.
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
