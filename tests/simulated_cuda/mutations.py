"""Ten errors, put into gputune one at a time, that the simulated devices must find: ``on_device.py`` sees whether."""

import torch

from gputune.engine.mlp import StackedMLP
from gputune.engine.stacked import StackedChunk
from gputune.optimizers.update import Clock, Update
from gputune.population.batches import Batches


def _after(owner, name, change):
    """A method that does what it did, and then something to its object."""
    method = getattr(owner, name)

    def changed(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        change(self)
        return result

    return owner, name, changed


def _on_cpu(owner, name):
    """A method whose result stays on the CPU."""
    method = getattr(owner, name)
    return owner, name, lambda *args, **kwargs: method(*args, **kwargs).cpu()


def _in_step(change):
    return _after(StackedChunk, "_step", change)


def _set(**values):
    """Set attributes, each to what a function makes of the object."""

    def change(self):
        for name, make in values.items():
            setattr(self, name, make(self))

    return change


MUTATIONS = {
    "positions on the CPU": _after(Batches, "_set_sizes", _set(positions=lambda b: b.positions.cpu())),
    "learning rates on the CPU": _on_cpu(Clock, "table"),
    "a target on the CPU": _on_cpu(StackedMLP, "targets"),
    "dropout's rates on the CPU": _after(StackedMLP, "__init__", _set(rates=lambda net: net.rates.cpu())),
    "a read in a step": _in_step(lambda chunk: chunk.grad.sum().item()),
    "a copy in a step": _in_step(lambda chunk: torch.ones(2).to(chunk.grad.device)),
    "a draw in a step": _in_step(lambda chunk: chunk.grad.uniform_()),
    "a shape by numbers in a step": _in_step(lambda chunk: chunk.grad[chunk.grad > 0]),
    "a result that outlives its step": _in_step(_set(last=lambda chunk: chunk.grad + 1)),
    "memory that was never written": _after(
        Update, "__init__", _set(moments=lambda update: [torch.empty_like(m) for m in update.moments])
    ),
}
"""What is wrong -> where, and what is there instead."""
