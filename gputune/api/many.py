"""The function ``train_many``, which trains given configurations of a module together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gputune.api.interactive import public
from gputune.data.arrays import as_arrays
from gputune.data.target import TaskWord
from gputune.ground.errors import InputError
from gputune.ground.types import BackendWord, Precision, ScheduleWord
from gputune.population.kinds import is_module
from gputune.scoring.metrics import Scorings
from gputune.tuning.choices import choose_model
from gputune.tuning.many import TrainedModules, mean_squared_error, train_given
from gputune.tuning.options import make_options
from gputune.tuning.record import read_rows

Arrays: TypeAlias = np.ndarray | Tensor


@public
def train_many(
    module: object,
    configs: Sequence[Mapping[str, object]],
    X: object,
    y: object,
    *,
    cv: object = None,
    max_epochs: int = 10,
    loss: str | Callable[..., object] | None = None,
    training_step: Callable[..., object] | None = None,
    augment: Callable[..., object] | None = None,
    scoring: Scorings | None = None,
    task: TaskWord | None = None,
    optimizer: str | type[torch.optim.Optimizer] | None = None,
    schedule: ScheduleWord = "constant",
    sample_weight: object = None,
    device: str = "auto",
    backend: BackendWord = "auto",
    dtype: Literal["float32", "float64"] = "float32",
    precision: Precision = "full",
    memory: int | str | None = None,
    random_state: object = 0,
    verbose: int = 0,
) -> TrainedModules:
    """Train a module once for each configuration and fold, all at the same time.

    This is gputune's engine without a search: there is no space, no study, no file and no scaling
    of inputs or targets. Every result equals that of a plain PyTorch loop over one module, up to
    rounding.

    Guide: ``docs/torch-func.md``.

    Args:
        module: a ``torch.nn.Module`` class, or a function or ``functools.partial`` that returns a
            module. It is called with the ``module__*`` values of a configuration, and with
            ``n_features``, ``n_outputs`` and ``input_shape`` if its signature has them.
        configs: C dicts of hyperparameters, at least one. The keys are those of a space of
            ``gputune.tune``, such as "lr", "batch_size", "weight_decay" and "module__hidden"
            (``docs/reference/space-keys.md``). A missing key has its default value. Modules with
            the same "init_seed" start from the same weights. Configurations whose tensors have
            different shapes train in separate groups.
        X: the inputs, n rows: an array or tensor (n, ...), or a tuple or dict of several. Floats
            are converted to ``dtype``.
        y: the targets, an array or tensor. Integers (n,) are the classes 0 to K - 1. Floats (n,) or
            (n, ...) are numbers.
        cv: the folds. None: one fold that has all rows, both for training and for the scores. A
            number of folds (at least 2), a scikit-learn splitter, pairs of (train, valid) row
            positions, or one tuple (train, valid).
        max_epochs: number of epochs, at least 1.
        loss: the training loss: a loss of ``torch.nn``, or ``callable(outputs, y)``. None:
            cross-entropy for classes (binary cross-entropy if the module returns one logit per
            row), mean squared error for numbers.
        training_step: ``callable(module, (x, y))`` in place of ``loss``.
        augment: ``callable(x, generator)``, applied to training minibatches.
        scoring: the score of the curves, as in ``gputune.tune``. None: accuracy for classes, the
            negative loss for numbers.
        task: the kind of target, if its dtype does not tell it: "classification", "regression",
            "multilabel" or "custom".
        optimizer: name of an optimizer or a class of ``torch.optim``. None: "adamw".
        schedule: factor on the learning rate over ``max_epochs``, as in ``gputune.tune``.
        sample_weight: weights (n,) of the rows in the training loss.
        device: "auto", "cpu", "cuda" or "cuda:1".
        backend: how the members train, as in ``gputune.tune``. "auto" chooses.
        dtype: "float32" or "float64".
        precision: "full", or "bf16" for matrix products in bfloat16.
        memory: memory that modules training together may take, in bytes or as text such as "8GB".
            None: gputune decides.
        random_state: an integer in [0, 2**32), a numpy RandomState or Generator, or None. It seeds
            initial weights, row orders, folds and dropout.
        verbose: 1 shows a progress bar and the plan on standard error.

    Returns:
        The learning curves, the stacked parameters and the modules.

    Raises:
        InputError: the input is bad. It is a ValueError.

    Example:
        >>> import gputune, torch
        >>> class Net(torch.nn.Module):
        ...     def __init__(self, n_features, n_outputs, hidden=8):
        ...         super().__init__()
        ...         self.enter = torch.nn.Linear(n_features, hidden)
        ...         self.leave = torch.nn.Linear(hidden, n_outputs)
        ...
        ...     def forward(self, x):
        ...         return self.leave(torch.relu(self.enter(x)))
        >>> x, y = torch.randn(90, 4), torch.arange(90) % 3
        >>> configs = [{"lr": lr, "init_seed": seed} for lr in (0.1, 0.01) for seed in range(4)]
        >>> trained = gputune.train_many(Net, configs, x, y, cv=3, max_epochs=5)
        >>> trained.curves.shape  # (configurations, epochs, folds)
        (8, 5, 3)
        >>> trained.state["enter.weight"].shape
        torch.Size([8, 3, 8, 4])
    """
    choice = choose_model(module, optimizer)
    if not is_module(choice.kind):
        raise InputError(
            "module",
            "must be a torch.nn.Module class or a function that returns a module",
            got=module,
            remedy="gputune.tune and gputune.sklearn train the built-in models.",
        )
    X, y = _checked_rows(X, y)
    if task is None:
        task = _task_of(y)
    is_loss_open = loss is None and training_step is None
    if is_loss_open and task in ("regression", "custom"):
        loss = mean_squared_error
    if scoring is None and task != "classification":
        scoring = "neg_loss"
    options = make_options(
        include=(),
        n_trials=0,
        include_default=False,
        cv=cv,
        max_epochs=max_epochs,
        loss=loss,
        training_step=training_step,
        augment=augment,
        scoring=scoring,
        task=task,
        schedule=schedule,
        sample_weight=sample_weight,
        columns="keep",
        numbers="none",
        device=device,
        backend=backend,
        dtype=dtype,
        precision=precision,
        memory=memory,
        workers=1,
        keep_predictions=False,
        random_state=random_state,
        verbose=verbose,
    )
    source = read_rows(choice, options.rows, X, y)
    return train_given(choice, configs, source, options)


def _checked_rows(X: object, y: object) -> tuple[object, Arrays]:
    """Return X as one or several named inputs of a module, and y. Raises InputError for others."""
    inputs = (X,) if isinstance(X, Arrays) else X
    if not isinstance(inputs, Mapping | tuple) or as_arrays(inputs) is None:
        raise InputError(
            "X",
            "must be an array, a tensor, or a tuple or dict of them",
            got=X,
            remedy="gputune.tune reads tables, files and Datasets.",
        )
    if not isinstance(y, Arrays):
        raise InputError("y", "must be an array or a tensor", got=y)
    return inputs, y


def _task_of(y: Arrays) -> TaskWord:
    """Return the kind of a target by its dtype and its number of axes."""
    is_float = y.is_floating_point() if isinstance(y, Tensor) else y.dtype.kind == "f"
    if is_float and y.ndim <= 2:
        return "regression"
    return "classification" if y.ndim == 1 else "custom"
