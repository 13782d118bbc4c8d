"""The choice of a model's training loss, and checks of options that not every model supports."""

from collections.abc import Callable

from gputune.data.target import Target
from gputune.engine.backends.table import BACKENDS, backend_named
from gputune.ground.errors import InputError, option, per_interface
from gputune.population.kinds import is_module
from gputune.scoring.losses import LOSS_OF_TASK
from gputune.scoring.objective import Objective, make_objective
from gputune.tuning.choices import ModelChoice
from gputune.tuning.machine_options import MachineOptions
from gputune.tuning.options import TrainingOptions

_PASS_MODULE = per_interface(
    "pass a module, for example model=gputune.models.MLP", "give a module, --model FILE.py:NAME"
)


def check_machine(choice: ModelChoice, machine: MachineOptions) -> None:
    """Raise InputError if the model does not support the requested precision or backend."""
    model = option("model", choice.name)
    if machine.precision == "bf16" and not is_module(choice.kind):
        raise InputError(
            "precision='bf16'",
            f"is only for your own modules, but {model} trains in full precision",
            remedy=f"Leave {option('precision')} out, or {_PASS_MODULE}.",
        )
    if machine.tf32 and choice.solved:
        raise InputError(
            "tf32=True",
            "is for matrix products in single precision, but the logistic regression solved with "
            f"{option('optimizer', 'exact')} uses double precision",
            remedy=f"Leave {option('tf32')} out.",
        )
    is_named = machine.backend in BACKENDS
    trains_built_in = not is_named or backend_named(machine.backend).trains_built_in
    if not trains_built_in and not is_module(choice.kind):
        raise InputError(
            f"backend={machine.backend!r}",
            f"trains the members of your own module one by one, but this is {model}",
            remedy=f"Choose {option('backend', 'auto')} or {option('backend', 'eager')}.",
        )


def choose_objective(
    target: Target,
    choice: ModelChoice,
    training: TrainingOptions,
    own_step: Callable[..., object] | None = None,
) -> Objective | None:
    """Return the training objective (loss, training step and augmentation) of a module.

    ``own_step`` is the training step of the module itself. An argument of the user replaces it.
    Returns None for a built-in model that trains on the default loss of its task.
    """
    if is_module(choice.kind):
        step = training.training_step
        if step is None and training.loss is None:
            step = own_step
        return make_objective(training.loss, step, training.augment, target.task)
    if target.values.ndim > 1 or target.task == "custom":
        raise InputError(
            f"model={choice.name!r}",
            f"predicts one class or one number per row, but {target.name} has shape "
            f"{target.values.shape}",
            remedy=f"For several outputs {_PASS_MODULE}, which takes n_outputs.",
        )
    if choice.solved and target.task == "regression":
        raise InputError(
            "model='logistic'",
            f"solved with {option('optimizer', 'exact')} predicts classes, but the target is a "
            "number",
            remedy=f"Choose {option('model', 'mlp')}, or {option('optimizer', 'adamw')} for a "
            "linear regression.",
        )
    for name in ("training_step", "augment"):
        if getattr(training, name) is not None:
            raise InputError(
                name,
                f"is only for your own modules, but {option('model', choice.name)} trains on the "
                "loss of its task",
                remedy=f"Leave {option(name)} out, or {_PASS_MODULE}.",
            )
    return None if training.loss is None else _built_in_objective(target, choice, training.loss)


def _built_in_objective(target: Target, choice: ModelChoice, loss: object) -> Objective | None:
    """Return the objective for the loss that the user chose for a built-in model.

    Returns None if this loss is the default loss of the task.
    """
    is_regression = target.task == "regression"
    names = "'mse', 'mae', 'huber' or 'quantile'" if is_regression else "'cross_entropy'"
    model = option("model", choice.name)
    if not isinstance(loss, str):
        raise InputError(
            "loss",
            f"must be {names} for {model}, not your own function",
            remedy=f"To train with your own loss, {_PASS_MODULE}.",
        )
    objective = make_objective(loss, None, None, target.task)
    if objective.loss == LOSS_OF_TASK[target.task]:
        return None
    if not is_regression:
        raise InputError(
            f"loss={loss!r}",
            f"does not fit {model}",
            remedy=f"Choose {names}, or {_PASS_MODULE}.",
        )
    return objective
