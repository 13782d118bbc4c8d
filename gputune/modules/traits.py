"""What a user's module does, as far as its stacking depends on it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """What a user's module does, as far as its stacking depends on it (``inspection.py`` finds out
    by trying it)."""

    # buffers, frozen parameters and Python numbers that a forward in training changes
    changing: tuple[str, ...] = ()
    least_rows: int = 1  # that a minibatch needs: two for statistics over them
    alone: bool = True  # whether an output in evaluation mode depends on its own row alone
    widest: int = 1  # most numbers that a submodule returns for a row
    parameters: int = 0  # number of those that are trained
    # whether the forward, the loss or the step writes into the minibatch that it is given
    writes: bool = False
    draws: bool = True  # whether a forward in training draws random numbers
    # whether its code can draw them outside of PyTorch's default generator
    host_draws: bool = False
    evaluation_draws: bool = False  # whether a forward in evaluation mode draws random numbers
    row_losses: bool = True  # whether the loss gives a number a row, rather than their mean
    at_start: str = ""  # what is not finite before anything has trained, in words, "" where all is
    named: tuple[str, ...] = ()  # paths of the parameters that are trained
    # paths of those that a step of stacked members does not use, which stay as they are
    unused: tuple[str, ...] = ()
    # names of the buffers that hold a rate of gputune.models.Dropout
    scheduled: tuple[str, ...] = ()
    unstackable: str = ""  # why its members cannot be stacked, "" where they can
    # whether a row's outputs are positive and have the sum 1, as behind a softmax
    probabilities: bool = False
    # by how much they were measured to train faster one by one; "" where not, or not known
    slow: str = ""
    coded: bool = False  # whether they were measured to train fastest in compiled code of their own

    @property
    def loop_reason(self) -> str:
        """Why members train one by one, "" where they are stacked."""
        return self.unstackable or self.slow
