"""The training that the user's module defines itself, found before the search begins."""

from collections.abc import Sequence

import torch

from gputune.data.arrays import ArrayLayout
from gputune.data.columns import Layout
from gputune.data.target import Target
from gputune.ground.errors import InputError
from gputune.ground.types import DEFAULTS, Config, Numbers
from gputune.modules.construction import build_module
from gputune.modules.own_training import (
    Horizon,
    LossOfLabels,
    OwnTraining,
    may_train_itself,
    takes_labels,
    training_of_module,
)
from gputune.modules.pretrained import pretrained_of
from gputune.population.population import InputKind, Shape, module_arguments
from gputune.spaces.random import draw
from gputune.tuning.choices import NAMED, ModelChoice
from gputune.tuning.options import Options
from gputune.tuning.session import checked_space

_TRIED = 8  # configurations that show whether the module's optimizer depends on its arguments


def own_training(
    choice: ModelChoice,
    options: Options,
    target: Target,
    layout: Layout | ArrayLayout,
    numbers: Numbers,
    given: Sequence[Config],
) -> OwnTraining | None:
    """Return the training that the user's module defines itself, or None.

    ``given`` are configurations that train without a search. Otherwise the configurations of a few
    trials are drawn from the space.

    Raises InputError if gputune cannot train the module as it defines.
    """
    builder = choice.module_class
    if builder is None or builder in NAMED.values() or pretrained_of(builder) is not None:
        return None
    training = options.training
    needs_loss = target.task == "custom" and training.loss is None and not training.training_step
    if not needs_loss and not may_train_itself(builder):
        return None
    configs = list(given[:_TRIED])
    if not configs:
        search = options.search
        configs = draw(checked_space(choice, options), _TRIED, search.random_state)
    shape = _shape(target, layout, numbers)
    rows = len(target.values)
    horizon = Horizon(training.epochs, training.epochs * -(-rows // DEFAULTS["batch_size"]))
    found: list[tuple[Config, OwnTraining]] = []
    for config in configs:
        arguments = module_arguments(config)
        if any(arguments == tried for tried, _ in found):
            continue
        try:
            module = build_module(builder, arguments, shape, seed=0)
        except InputError:  # a later check of the module gives a better message
            continue
        own = training_of_module(module, horizon)
        if own is None:
            return _of_labels(choice.name) if needs_loss and takes_labels(module) else None
        found.append((arguments, own))
    _check_defaults(choice.name, found)
    return found[0][1] if found else None


def _of_labels(name: str) -> OwnTraining:
    """Return the training on the loss that a module computes from ``labels``."""
    return OwnTraining(
        LossOfLabels(),
        remark=f"{name} trains on the loss that it computes from its argument labels",
    )


def _shape(target: Target, layout: Layout | ArrayLayout, numbers: Numbers) -> Shape:
    """Return the sizes for which the module is built."""
    if isinstance(layout, ArrayLayout):
        inputs: list[InputKind] = []
        for row, dtype in zip(layout.shapes, layout.dtypes, strict=True):
            # Bytes are scaled to floats.
            kind = torch.float32 if dtype == "uint8" else getattr(torch, dtype)
            inputs.append((row, kind))
        first = layout.shapes[0]
        return Shape(
            n_features=first[-1] if first else 1,
            n_outputs=target.n_outputs,
            input_shape=first,
            inputs=tuple(inputs),
            names=layout.names,
        )
    n_features = sum(layout.widths(numbers))
    groups = layout.groups(layout.places(numbers))
    return Shape(n_features=n_features, n_outputs=target.n_outputs, feature_groups=groups)


def _check_defaults(name: str, found: Sequence[tuple[Config, OwnTraining]]) -> None:
    """Raise InputError if arguments of the module in the space change its optimizer.

    gputune reads the optimizer once. A trial would train with the learning rate of another trial.
    """
    for arguments, own in found[1:]:
        first_arguments, first = found[0]
        if (own.optimizer, own.schedule) != (first.optimizer, first.schedule):
            changed = "optimizer" if own.optimizer != first.optimizer else "schedule"
        else:
            keys = sorted(own.defaults.keys() | first.defaults.keys())
            different = [key for key in keys if own.defaults.get(key) != first.defaults.get(key)]
            if not different:
                continue
            changed = different[0]
        varied = [
            key for key, value in arguments.items() if repr(first_arguments.get(key)) != repr(value)
        ]
        # The argument that holds the value itself, such as lr.
        same = [key for key in varied if arguments[key] == own.defaults.get(changed)]
        argument = (same or varied)[0]
        raise InputError(
            f"space['module__{argument}']",
            f"changes the {changed} in configure_optimizers of {name}, but gputune takes the "
            f"{changed} of each trial from the key {changed!r}",
            remedy=f"Search {changed!r} instead, and leave 'module__{argument}' out.",
        )
