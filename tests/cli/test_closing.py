"""The closing text of searches that the command line cannot begin itself: by a sampler of Optuna's."""

from pathlib import Path

import numpy as np
import pytest

from gputune.cli.closing import Ending, closing_text
from gputune.data.source import Source, read_source
from gputune.search.stopping import Halving
from made_studies import made_batches


def closing(study):
    rest: Source = read_source(np.zeros((4, 2)), np.array([0, 1, 0, 1]))
    ending = Ending("houses.csv", study, rest, None, Path("out/study.db"), None, 3.0)
    return " ".join(closing_text(ending, width=90).split())


@pytest.mark.parametrize(
    ("trials", "words"), [(21, "proposed 20 trials in 3 batches"), (2, "proposed 1 trial in 1 batch")]
)
def test_a_sampler_is_told_with_its_batches(trials, words):
    text = closing(made_batches(trials))
    assert f"Sampler Optuna's TPESampler {words} " in text
    assert "Descent" not in text and "outer step" not in text and "sent away" not in text


def test_a_sampler_whose_batches_are_halved():
    study = made_batches(40, halving=Halving(min_epochs=3))
    text = closing(study)
    assert any(trial.state == "pruned" for trial in study.trials)
    assert (
        "Sampler Optuna's TPESampler proposed 39 trials in 5 batches Halving of 40 trials these were sent"
        in text
    )
    assert "after epoch 3" in text and "Descent" not in text
