"""The traits of a user's module: properties that decide how its members are stacked and trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple


@dataclass(frozen=True)
class Traits:
    """Properties of a user's module that decide how it is stacked and trained.

    ``inspection.py`` finds them by trying the module.
    """

    # buffers, frozen parameters and Python numbers that a forward pass in training changes
    changing: tuple[str, ...] = ()
    least_rows: int = 1  # least rows of a minibatch: two if it computes statistics over rows
    alone: bool = True  # whether an output in evaluation mode depends only on its own row
    widest: int = 1  # most numbers that a submodule returns for one row
    parameters: int = 0  # number of trained parameters
    # whether the forward pass, the loss or the step writes into its minibatch
    writes: bool = False
    draws: bool = True  # whether a forward pass in training draws random numbers
    # whether a step in training reads a tensor's value into Python, on which it may branch
    branches: bool = False
    # whether its code drew random numbers outside of PyTorch's default generator
    host_draws: bool = False
    evaluation_draws: bool = False  # whether a forward pass in evaluation mode draws random numbers
    row_losses: bool = True  # whether the loss returns one number per row, not their mean
    at_start: str = ""  # sentence about values that are not finite before training, or ""
    named: tuple[str, ...] = ()  # paths of the trained parameters
    # paths of the parameters that a step does not use and leaves unchanged
    unused: tuple[str, ...] = ()
    # names of the buffers with a rate of gputune.models.Dropout
    scheduled: tuple[str, ...] = ()
    unstackable: str = ""  # why its members cannot be stacked, or ""
    # Layers with trained parameters, if all members can train on merged rows (``merged.py``): the
    # path of each layer, and which of its tensors have the members' rows as first axis.
    merges: tuple[tuple[str, tuple[bool, ...]], ...] = ()
    unmergeable: str = ""  # why unstackable members do not train on merged rows, or ""
    # whether stacked members read the rows of a fold without copies for each member
    common_rows: bool = False
    frozen: int = 0  # number of frozen parameters
    # share of its weights in frozen layers before the first trained layer; 0 if convolutions train
    shared: float = 0.0
    # whether a convolution trains, or follows the first trained layer
    convolves: bool = False
    # whether a row's outputs are positive with the sum 1, as after a softmax
    probabilities: bool = False
    # by how much members were measured to train faster one by one; "" if not, or not known
    slow: str = ""
    coded: bool = False  # whether members were measured to train fastest in compiled code
    uncoded: str = ""  # why members do not train in compiled code; "" if not known
    # Why minibatches cannot be cut into pieces, as members of different batch sizes need (a clause);
    # "" if they can.
    indivisible: str = "the module was not tried"


class FastestWay(NamedTuple):
    """The result of timing the ways to train members.

    Attributes:
        slow: A sentence that says why the trials should train one by one (stacking is clearly
            slower, or failed), or "".
        gain: The seconds that compiled code saves in a step of a member, or 0.0.
        uncoded: A clause that says why compiled code does not train, or "".
        seconds: The seconds of a step of a member, by the name of each backend that was timed.
            Infinity means that the backend cannot train the module.
    """

    slow: str = ""
    gain: float = 0.0
    uncoded: str = ""
    seconds: Mapping[str, float] = MappingProxyType({})
