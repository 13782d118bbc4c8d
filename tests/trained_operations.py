"""Trains an operation of ``operations.py`` in all backends that can train it, and compares the members
with a plain PyTorch loop.
"""

from dataclasses import replace
from functools import partial

import torch

import reference
from gputune.engine.members import MemberChunk
from gputune.engine.stacked import StackedChunk
from gputune.modules.inspection import traits_of
from gputune.modules.looped import LoopChunk, LoopedModule
from gputune.modules.module import StackedModule
from gputune.modules.trace import TraceError
from gputune.scoring.validation import Validation
from operations import COMPILED, INPUTS, LOOP, RECORDED, ROWS
from problems import fill, largest_difference, make_data, rows_of, shape_of

EPOCHS = 2
RATES = (0.03, 0.1)


def data_of(operation):
    data = make_data(operation.task, n=ROWS, weights=operation.weights, copies=False)
    return replace(data, inputs=(INPUTS[operation.rows][None],))


def configs_of(operation):
    # not Adam, which makes steps of the rounding error of a gradient that is 0
    config = {"batch_size": 5, "optimizer": "sgd", **operation.config}
    return fill(*({"lr": rate, **config} for rate in RATES))


class Trained:
    """The chunks of an operation's members in all backends that can train them, trained."""

    def __init__(self, operation):
        self.operation = operation
        self.data = data_of(operation)
        self.configs = configs_of(operation)
        objective = operation.objective
        self.traits = traits_of(operation.build, self.configs[0], self.data, objective=objective)
        self.reason = self.traits.unstackable
        self.chunks = {LOOP: self.chunk(LoopedModule, LoopChunk)}
        if not self.reason:
            self.chunks[RECORDED] = self.chunk(StackedModule, StackedChunk, recorded=True)
            try:
                self.chunks[COMPILED] = self.chunk(StackedModule, MemberChunk)
            except TraceError as error:
                self.reason = str(error)
        with torch.no_grad():
            for chunk in self.chunks.values():
                for epoch in range(EPOCHS):
                    chunk.advance(epoch)

    @property
    def backend(self):
        """The fastest backend that can train the operation."""
        return [*self.chunks][-1]

    def chunk(self, module, kind, **options):
        network = module(
            self.operation.build,
            self.configs,
            shape_of(self.data),
            seed=0,
            traits=self.traits,
            objective=self.operation.objective,
        )
        with torch.no_grad():
            return kind(network, Validation(self.data, None), seed=0, horizon=EPOCHS, **options)

    def plain(self, fold, config, monkeypatch):
        """The module that a plain PyTorch loop trains."""
        operation = self.operation
        x, y, weights = rows_of(self.data, fold)
        if operation.plain_loss is not None:
            monkeypatch.setattr(reference, "minibatch_loss", operation.plain_loss)
        sizes = {"n_features": self.data.n_features, "n_outputs": self.data.n_outputs}
        build = operation.build
        names = build.func.__init__.__code__.co_varnames
        build = partial(build, **{k: v for k, v in sizes.items() if k in names})
        if operation.rows == "ids":  # reference.py casts a module to the type of its rows
            return self.plain_of_ids(build, x, y, config)
        return reference.train_module(build, x, y, config, epochs=EPOCHS, weights=weights)

    @staticmethod
    def plain_of_ids(build, x, y, config):
        module = None

        def make():
            nonlocal module
            module = build().double()
            module.to = lambda dtype: module
            return module

        weights = torch.ones(len(x), dtype=torch.float64)
        reference.train_module(make, x, y, config, epochs=EPOCHS, weights=weights)
        return module


def member(chunk, fold, trial):
    network = chunk.network
    return network.member(network.blocks.views(chunk.flat), fold, trial)


def differences(trained, monkeypatch):
    """The largest difference of each backend's member from a plain loop, or from the looped member
    for options that a plain loop of PyTorch does not have."""
    found = {}
    for fold in (0, 1):
        for trial, config in enumerate(trained.configs):
            if trained.operation.has_plain_loop:
                expected = trained.plain(fold, config, monkeypatch)
            else:
                expected = member(trained.chunks[LOOP], fold, trial)
            for name, chunk in trained.chunks.items():
                worst = largest_difference(member(chunk, fold, trial), expected)
                found[name] = max(found.get(name, 0.0), worst)
    return found


def check(operation, monkeypatch):
    """Check that an operation trains in its backend, and equals a plain loop in each backend."""
    trained = Trained(operation)
    for backend, worst in differences(trained, monkeypatch).items():
        assert worst < 1e-10, f"in the backend {backend}: {worst:.1e}"
    assert trained.backend == operation.backend, trained.reason
