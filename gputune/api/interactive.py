"""Help for users at a Python prompt: suggestions for mistyped arguments, and the study of an
interrupted search."""

from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from functools import partial, wraps
from inspect import signature
from typing import ParamSpec, TypeVar, cast

from gputune.ground.errors import SearchInterrupted, SearchTerminated, with_argument_hints
from gputune.spaces.config import key_of
from gputune.tuning.interrupt import is_interactive
from gputune.tuning.progress import Progress

Given = ParamSpec("Given")
Value = TypeVar("Value")

_OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("epochs", "n_epochs", "num_epochs", "max_iter"), "max_epochs"),
    **dict.fromkeys(("trials", "n_iter", "num_trials"), "n_trials"),
    **dict.fromkeys(("param_distributions", "param_grid", "search_space"), "space"),
    **dict.fromkeys(("metric", "score", "scorer"), "scoring"),
    "folds": "cv",
    "budget": "timeout",
    "seed": "random_state",
    "criterion": "loss",
    "n_jobs": "workers",
    "scheduler": "schedule",
}
"""Argument names of other libraries and gputune's names for them. A search for similar spellings
would not find these pairs."""


_passed: ContextVar[frozenset[str]] = ContextVar("passed", default=frozenset())


def passed_arguments() -> frozenset[str]:
    """Return the names of the arguments that the caller passed to the running public function."""
    return _passed.get()


def public(function: Callable[Given, Value]) -> Callable[Given, Value]:
    """Decorate a public function so that its errors help a user at a Python prompt.

    An unknown keyword argument raises a TypeError that suggests the right name, like Python 3.13
    does. In a notebook or at a prompt, an interrupted search returns its study so far.
    """
    known = signature(function).parameters
    order = tuple(known)
    advice = partial(_advice, known.keys())
    hinted = with_argument_hints(_OTHER_NAMES, advice)(function)

    @wraps(function)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Value:
        token = _passed.set(frozenset([*order[: len(args)], *kwargs.keys()]))
        try:
            return hinted(*args, **kwargs)
        except SearchInterrupted as stopped:
            # A person at a prompt gets the study. A script gets the exception.
            if not is_interactive():
                if isinstance(stopped, SearchTerminated):  # Python prints no message for it
                    Progress(cast(int, kwargs.get("verbose", 1))).say(str(stopped))
                raise
            Progress(cast(int, kwargs.get("verbose", 1))).say(str(stopped))
            so_far: Value = stopped.study
            return so_far
        finally:
            _passed.reset(token)

    return called


def _advice(known: Collection[str], name: str) -> str:
    """Return a sentence on an argument that is a hyperparameter or belongs to a trainer, or "".

    ``known`` are the arguments of the function that the user called.
    """
    trains = "X" in known  # the function trains without the user's trainer
    key = key_of(name) or (TRAINER_KEYS.get(name) if trains else None)
    if key is not None and "space" in known:
        return f'Hyperparameters belong in the space: space={{"{key}": [...]}}.'
    if key is not None and "configs" in known:
        return f'Hyperparameters belong in the configurations: configs=[{{"{key}": ...}}].'
    return TRAINER_ADVICE.get(name, "") if trains else ""


TRAINER_KEYS: Mapping[str, str] = {
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("gradient_clip_val", "max_grad_norm"), "clip_norm"),
    "adam_beta2": "beta2",
    "label_smoothing_factor": "loss__label_smoothing",
}
"""Hyperparameters of a trainer, and the keys of the space for them."""

_EPOCHS = "gputune counts epochs. Pass max_epochs."
_VALIDATION = (
    "Pass all rows as X and y, and the positions of the training and validation rows as "
    "cv=(train, valid)."
)
_SCORING = (
    "gputune computes the validation scores itself. Pass scoring, such as scoring='accuracy' or "
    "scoring='neg_log_loss'."
)
_TRAINER = "tune trains without a trainer. To keep the trainer, call it in the objective of gputune.search."
_DATA = "Pass the dataset as X."
_DEVICE = "Pass device, such as device='cuda'."

TRAINER_ADVICE: Mapping[str, str] = {
    "num_train_epochs": "Pass max_epochs.",
    **dict.fromkeys(("max_steps", "num_steps"), _EPOCHS),
    **dict.fromkeys(
        ("early_stopping", "early_stopping_patience"), "Pass patience, a number of epochs."
    ),
    "max_time": "Pass timeout, such as timeout='5m'.",
    **dict.fromkeys(("monitor", "compute_metrics", "metric_for_best_model"), _SCORING),
    **dict.fromkeys(("accelerator", "devices", "use_cpu", "num_nodes", "gpus"), _DEVICE),
    **dict.fromkeys(
        ("train_dataset", "train_dataloaders", "train_dataloader", "datamodule"), _DATA
    ),
    **dict.fromkeys(("eval_dataset", "val_dataloaders", "validation_data"), _VALIDATION),
    **dict.fromkeys(("trainer", "args", "strategy", "eval_strategy"), _TRAINER),
    **dict.fromkeys(("fp16", "bf16"), "Pass precision='bf16'."),
    **dict.fromkeys(("logger", "report_to"), "Pass a logger of gputune in callbacks."),
    **dict.fromkeys(("default_root_dir", "output_dir"), "Pass the path of a study file as study."),
    "lr_scheduler_type": "Pass schedule, such as schedule='linear'.",
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "Pass schedule='warmup+cosine'."),
}
"""Sentences on the arguments of a trainer that gputune lacks."""
