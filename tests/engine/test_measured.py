"""Memory measured at two sizes: by what PyTorch allocates on the CPU, where the same code trains as on a GPU."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import nn

from gputune.engine.job import Job, Need, measure_need, train_chunk
from gputune.engine.plan import Planner, trial_cost
from gputune.population.population import Population
from gputune.scoring.metrics import make_scoring
from problems import fill, make_data
from problems import peak_bytes as peak

DATA = make_data(n=120, d=20, dtype=torch.float32)
SCORING = make_scoring(None, DATA.task, np.arange(3))


def job(module_class=None, epochs=9):
    return Job(seed=0, epochs=epochs, horizon=epochs, scoring=SCORING, module_class=module_class)


def population(*configs, kind="mlp"):
    return Population(kind, tuple(range(len(configs))), tuple(fill(*configs)))


def whole_peak(group, module_class=None):
    """The peak of all trials of a population in one chunk, trained for a whole epoch."""
    return peak(lambda: train_chunk(job(module_class, epochs=1), DATA, group))


class Wide(nn.Module):
    """A module whose activations are far larger than its parameters tell."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.outer = nn.Linear(n_features, n_outputs)

    def forward(self, x):
        seen = self.inner(x.unsqueeze(-1).repeat(1, 1, 50).unsqueeze(-1)).tanh()
        return self.outer(seen.squeeze(-1).mean(-1))


@pytest.mark.parametrize(("width", "sizes"), [(16, [16]), (100, [64]), (100, [8, 11, 16, 13])])
def test_a_line_through_two_sizes_foretells_the_peak_of_many_trials(width, sizes):
    group = population(*({"width": width, "batch_size": sizes[i % len(sizes)]} for i in range(30)))
    need = measure_need(job(), DATA, group, peak)
    assert need.once + 30 * need.trial == pytest.approx(whole_peak(group), rel=0.05)


def test_a_module_is_measured_too():
    group = population(*({"batch_size": 32} for _ in range(16)), kind="module")
    need = measure_need(job(Wide), DATA, group, peak)
    assert need.once + 16 * need.trial == pytest.approx(whole_peak(group, Wide), rel=0.05)
    size = sum(p.numel() for p in Wide(20, 3).parameters())
    assert need.trial > 5 * trial_cost(group, DATA, size).trial_bytes  # what an estimate cannot know


def test_the_largest_batches_are_measured():
    large, small = (population(*({"batch_size": size if i == 9 else 20} for i in range(10))) for size in (60, 20))
    assert measure_need(job(), DATA, large, peak).trial > measure_need(job(), DATA, small, peak).trial


def test_the_plan_goes_by_what_was_measured():
    group = population(*({"batch_size": 32} for _ in range(16)), kind="module")
    need = measure_need(job(Wide), DATA, group, peak)
    room = need.once + 4 * need.trial + 1
    measure = partial(measure_need, job(Wide), DATA, peak=peak)
    planner = Planner(DATA, None, 1, parameters=65, free=round(room / 0.8))
    plan = replace(planner, measure=lambda found, most: measure(found, most=most)).plan([group], 3)
    assert [len(chunk.index) for chunk in plan.chunks] == [4] * 4
    assert whole_peak(plan.chunks[0], Wide) <= 1.01 * room
    assert len(planner.plan([group], 3).chunks) == 1  # the estimate would have taken them all


def test_a_search_that_is_far_from_the_limit_is_not_measured():
    asked, group = [], population(*({"width": 16} for _ in range(10)))
    one, measure = trial_cost(group, DATA).trial_bytes, lambda found, most: asked.append(most)
    for free in (25 * one * 2, 5 * one * 2):
        plan = Planner(DATA, None, 1, free=free, measure=measure).plan([group], 1)
    assert asked == [8]  # of 0.8 x 10
    assert [len(chunk.index) for chunk in plan.chunks] == [5, 5]  # None: the estimate stands


def test_what_cannot_be_measured_is_left_to_the_estimate():
    alone, two = population({"width": 16}), population({"width": 16}, {"width": 16})
    assert measure_need(job(), DATA, alone, peak) is measure_need(job(), DATA, two, peak, most=1) is None
    assert measure_need(job(), DATA, two, Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))) is None
    with pytest.raises(RuntimeError, match="x"):
        measure_need(job(), DATA, two, Mock(side_effect=RuntimeError("x")))
    # A trial that leaves nothing over needs a byte at least.
    assert measure_need(job(), DATA, two, lambda work: 100) == Need(once=99, trial=1)
