"""Finds the member and the row that cause an error in the middle of a training.

A member is one trial on one fold. If a training fails, members are tried again as plain modules.
"""

import re
import traceback
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.device import CPU, is_out_of_memory
from gputune.ground.errors import InputError, option
from gputune.ground.seeding import keyed_draws
from gputune.ground.text import count
from gputune.modules.construction import call_text, name_of
from gputune.modules.network import ModuleNetwork
from gputune.population.population import Network, module_arguments


class StackedError(InputError):
    """Raised if a forward pass fails with stacked members, but not with a single member on any
    row."""


def uneven_use(name: str, parameter: str, *, one_by_one: bool = False) -> StackedError:
    """Return the error of a module ``name`` that uses a parameter only in some training steps.

    The trials start again after this error, unless they continue from a saved state. Then the user
    sees the error. ``one_by_one`` is True if the members train one by one already.
    """
    remedy = f"Choose {option('backend', 'loop')}."
    if one_by_one:
        remedy = f"Choose {option('method', 'random')}, which trains each trial to the end."
    rule = f"{name} uses its parameter {parameter!r} only in some training steps"
    return StackedError(None, rule, remedy=remedy)


_ROWS = 256  # rows that are tried at a time
# words in torch's errors that are not caused by a forward pass
_DEVICE = re.compile("memory|CUDA|CUBLAS|CUDNN|cuDNN")


def explain(
    error: Exception, network: Network, flat: Tensor, data: Dataset, epoch: int
) -> Exception:
    """Find the member and row that cause an error, and return an InputError that names them.

    The InputError names the fold and the row on which a single member raises the same error. If a
    forward pass raised, but a member fails on no row or on every row, the InputError names the
    configuration. In other cases the result is ``error`` itself. ``flat`` has the members'
    parameters after ``epoch`` epochs. Members run in evaluation mode.
    """
    cause = error.__cause__ if isinstance(error, InputError) else error
    if not isinstance(network, ModuleNetwork) or not isinstance(cause, Exception):
        return error
    if is_out_of_memory(cause) or _DEVICE.search(str(cause)):
        return error
    name = name_of(network.builder)
    raised = f"raised {type(cause).__name__}"
    says = str(cause) or "without a message"
    epochs = count(epoch, "epoch")
    arguments = {f"module__{key}": v for key, v in module_arguments(network.configs[0]).items()}
    call = f"{call_text(name, arguments)} {raised} after {epochs}: {says}"
    values = ", or leave these values out of the space" if arguments else ""
    remedy = f"Correct its forward pass{values}."
    params = network.blocks.views(flat)
    for f, fold in enumerate(data.folds):
        fails = _attempt(network, network.member(params, f, 0), data, f, type(cause))
        kind = "training"
        rows = _failing_part(torch.split(fold.train, _ROWS), fails)
        if rows is None:
            kind = "validation"
            rows = _failing_part(torch.split(fold.valid, _ROWS), fails)
        if rows is None:
            continue
        place = f"some of rows {int(rows.min())} to {int(rows.max())}"
        if len(rows) == 1:
            place = f"row {int(rows[0])}"
            others = fold.train[fold.train != rows.to(fold.train.device)]
            few = torch.split(others[:: max(1, len(others) // 8)], 1)  # enough of them to decide
            if len(others) and all(map(fails, few)):
                rule = f"{_sentence(call)} No single row of X is the cause, because others fail too"
                return InputError(None, rule, remedy=remedy)
        return InputError(
            None,
            f"{_sentence(f'{name} {raised} in fold {f}, after {epochs}: {says}')} It fails on "
            f"{place} of X, which belongs to the {kind} rows of that fold",
            remedy="Correct the forward pass or the loss, or remove these rows from X.",
        )
    for frame, _ in traceback.walk_tb(cause.__traceback__):
        is_forward = frame.f_code.co_name == "forward"
        if is_forward and isinstance(frame.f_locals.get("self"), nn.Module):
            rule = f"{_sentence(call)} In evaluation mode it fails on no row of X"
            return StackedError(None, rule, remedy=remedy)
    return error


def _sentence(text: str) -> str:
    """Return a text with a full stop added if it has none."""
    return f"{text.rstrip('.')}."


def _failing_part(parts: Sequence[Tensor], fails: Callable[[Tensor], bool]) -> Tensor | None:
    """Return the smallest part of some rows on which ``fails`` is True, or None if all parts pass.

    Halves of the failing rows are tried until one row is left, or until both halves pass.
    """
    for rows in parts:
        if fails(rows):
            half = _failing_part(rows.chunk(2), fails) if len(rows) > 1 else None
            return rows if half is None else half
    return None


def _attempt(
    network: ModuleNetwork, module: nn.Module, data: Dataset, fold: int, kind: type[Exception]
) -> Callable[[Tensor], bool]:
    """Return a function that tells if the module fails on some rows with an error of ``kind``."""
    targets = network.targets(data.y)

    def fails(rows: Tensor) -> bool:
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        y = targets[fold % len(targets)][rows].cpu()
        try:
            with torch.no_grad(), keyed_draws(CPU, 0, "check", host=True):
                network.objective.losses(
                    module, inputs, y, network.configs[0], names=network.shape.names
                )
        except Exception as error:
            return type(error) is kind
        return False

    return fails
