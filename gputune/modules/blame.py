"""Why a user's module failed in the middle of a training: in which fold, and on which row of X."""

import re
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.memory import is_out_of_memory
from gputune.modules.construction import name_of
from gputune.modules.module import ModuleNetwork
from gputune.population.network import Network
from gputune.population.population import module_arguments
from gputune.text import count

_ROWS = 256  # that are tried at a time
_DEVICE = re.compile("memory|CUDA|CUBLAS|CUDNN|cuDNN")  # what torch says where no forward is at fault


def explain(error: Exception, network: Network, flat: Tensor, data: Dataset, epoch: int) -> Exception:
    """Return an InputError that names fold and row where a member fails alone as the chunk did on some rows.

    Where a forward raised, and fails on no rows or on any, it names the configuration; else it is the error itself.
    ``flat`` are the members' parameters as they are, after so many epochs. Members run in evaluation mode.
    """
    cause = error.__cause__ if isinstance(error, InputError) else error
    if not isinstance(network, ModuleNetwork) or not isinstance(cause, Exception):
        return error
    if is_out_of_memory(cause) or _DEVICE.search(str(cause)):
        return error
    params = network.blocks.views(flat)
    for f, fold in enumerate(data.folds):
        fails = _attempt(network, network.member(params, f, 0), data, f, type(cause))
        kinds = ("training", fold.train), ("validation", fold.valid)
        for kind, rows in ((kind, rows) for kind, whole in kinds for rows in torch.split(whole, _ROWS)):
            if not fails(rows):
                continue
            while len(rows) > 1 and (half := next((part for part in rows.chunk(2) if fails(part)), None)) is not None:
                rows = half
            place = f"some of rows {int(rows.min())} to {int(rows.max())}"
            if len(rows) == 1:
                place, others = f"row {int(rows[0])}", fold.train[fold.train != rows.to(fold.train.device)]
                few = torch.split(others[:: max(1, len(others) // 8)], 1)  # enough to tell
                if len(others) and all(map(fails, few)):
                    return _of_no_row(cause, network, epoch, "No single row of X is at fault, others fail too")
            return InputError(
                f"model: {name_of(network.builder)} raised {type(cause).__name__} in fold {f}, after "
                f"{count(epoch, 'epoch')}: {str(cause) or 'without a message'}. It fails on {place} of X, of the "
                f"{kind} rows of that fold; mend the forward or the loss for such rows, or leave them out."
            )
    inside = (frame for frame, _ in traceback.walk_tb(cause.__traceback__) if frame.f_code.co_name == "forward")
    if any(isinstance(frame.f_locals.get("self"), nn.Module) for frame in inside):
        return _of_no_row(cause, network, epoch, "In evaluation mode it fails on no row of X")
    return error


def _of_no_row(cause: Exception, network: ModuleNetwork, epoch: int, finding: str) -> InputError:
    """Return the error of a forward that no row of X makes fail."""
    words = ", ".join(f"module__{key}={value!r}" for key, value in module_arguments(network.configs[0]).items())
    return InputError(
        f"model: {name_of(network.builder)}({words}) raised {type(cause).__name__} after {count(epoch, 'epoch')}: "
        f"{str(cause) or 'without a message'}. {finding}; mend its forward"
        f"{', or leave these values out of the space' if words else ''}."
    )


def _attempt(
    network: ModuleNetwork, module: nn.Module, data: Dataset, fold: int, kind: type[Exception]
) -> Callable[[Tensor], bool]:
    """Return what says whether a member raises that kind of error on some rows of a fold."""
    targets = network.targets(data.y)
    y = targets[fold % len(targets)]

    def fails(rows: Tensor) -> bool:
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        config, names = network.configs[0], network.shape.names
        try:
            with torch.no_grad():
                network.objective.losses(module, inputs, y[rows].cpu(), config, names=names)
        except Exception as found:
            return type(found) is kind
        return False

    return fails
