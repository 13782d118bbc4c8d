"""Why a user's module failed in the middle of a training: in which fold, and on which row of X."""

import re
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, Fold
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
    if not isinstance(network, ModuleNetwork) or not isinstance(cause, Exception) or _is_of_device(cause):
        return error
    params = network.blocks.views(flat)
    for f, fold in enumerate(data.folds):
        run = _attempt(network, network.member(params, f, 0), data, f, type(cause))
        for kind, rows in _blocks(fold):
            if not run(rows):
                continue
            row = _narrow(run, rows)
            if len(row) == 1 and _fails_on_any(run, fold.train, row):
                return _of_no_row(cause, network, epoch, "No single row of X is at fault, others fail too")
            place = f"row {int(row[0])}" if len(row) == 1 else f"some of rows {int(row.min())} to {int(row.max())}"
            return InputError(
                f"model: {name_of(network.builder)} raised {type(cause).__name__} in fold {f}, after "
                f"{count(epoch, 'epoch')}: {str(cause) or 'without a message'}. It fails on {place} of X, of the "
                f"{kind} rows of that fold; mend the forward or the loss for such rows, or leave them out."
            )
    inside = (frame for frame, _ in traceback.walk_tb(cause.__traceback__) if frame.f_code.co_name == "forward")
    if any(isinstance(frame.f_locals.get("self"), nn.Module) for frame in inside):
        return _of_no_row(cause, network, epoch, "In evaluation mode it fails on no row of X")
    return error


def _fails_on_any(fails: Callable[[Tensor], bool], rows: Tensor, row: Tensor) -> bool:
    """Whether other rows fail too, one by one: as many as are enough to tell."""
    others = rows[rows != row.to(rows.device)]
    return len(others) > 0 and all(fails(other) for other in torch.split(others[:: max(1, len(others) // 8)], 1))


def _of_no_row(cause: Exception, network: ModuleNetwork, epoch: int, finding: str) -> InputError:
    """Return the error of a forward that no row of X makes fail."""
    words = ", ".join(f"module__{key}={value!r}" for key, value in module_arguments(network.configs[0]).items())
    return InputError(
        f"model: {name_of(network.builder)}({words}) raised {type(cause).__name__} after {count(epoch, 'epoch')}: "
        f"{str(cause) or 'without a message'}. {finding}; mend its forward"
        f"{', or leave these values out of the space' if words else ''}."
    )


def _is_of_device(error: Exception) -> bool:
    return is_out_of_memory(error) or bool(_DEVICE.search(str(error)))


def _blocks(fold: Fold) -> Iterator[tuple[str, Tensor]]:
    for kind, rows in (("training", fold.train), ("validation", fold.valid)):
        for block in torch.split(rows, _ROWS):
            yield kind, block


def _attempt(
    network: ModuleNetwork, module: nn.Module, data: Dataset, fold: int, kind: type[Exception]
) -> Callable[[Tensor], bool]:
    """Return what says whether a member raises that kind of error on some rows of a fold."""
    targets = network.targets(data.y)
    config, names = network.configs[0], network.shape.names

    def fails(rows: Tensor) -> bool:
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        y = targets[fold % len(targets)][rows].cpu()
        try:
            with torch.no_grad():
                network.objective.losses(module, inputs, y, config, names=names)
        except Exception as found:
            return type(found) is kind
        return False

    return fails


def _narrow(fails: Callable[[Tensor], bool], rows: Tensor) -> Tensor:
    """Return the first row that fails alone, or the fewest that fail together."""
    while len(rows) > 1:
        half = next((part for part in rows.chunk(2) if fails(part)), None)
        if half is None:
            break
        rows = half
    return rows
