"""Scores of labels for many models at once equal scikit-learn's, also of ties, absent classes and
empty shares."""

import numpy as np
import pytest
import torch
from sklearn.metrics import get_scorer

from gputune.scoring.estimators import fitted
from gputune.scoring.metrics import make_scoring
from gputune.scoring.scores import LABEL_SCORES

pytestmark = pytest.mark.filterwarnings(
    "ignore::sklearn.exceptions.UndefinedMetricWarning", "ignore::UserWarning"
)
OF_ONE_CLASS = ("f1", "precision", "recall", "jaccard")
CASES = [("binary", name, None) for name in LABEL_SCORES]
CASES += [("multiclass", name, None) for name in LABEL_SCORES if name not in OF_ONE_CLASS]
CASES += [("binary", name, 0) for name in OF_ONE_CLASS]


def examples(task, seed):
    """Outputs (4, m, K) and targets, among them ties, classes that nobody has or predicts, and
    constant outputs."""
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 40))
    K = 2 if task == "binary" else int(rng.integers(3, 7))
    outputs = rng.normal(size=(4, m, K))
    outputs[1] = np.round(outputs[1])  # ties
    outputs[2] = outputs[2, :1]  # one answer for all rows
    outputs[3] = -1.0  # no label at all, or the first class
    return torch.from_numpy(outputs), torch.from_numpy(
        rng.integers(0, int(rng.integers(1, K + 1)), m)
    )


@pytest.mark.parametrize(("task", "name", "positive"), CASES)
def test_each_score_is_scikit_learns(task, name, positive, pytestconfig):
    first = CASES.index((task, name, positive))
    for seed in range(first, first + (20 if pytestconfig.getoption("--all") else 1)):
        outputs, y = examples(task, seed)
        classes = np.arange(outputs.shape[-1])
        scoring = make_scoring(name, task, classes, positive)
        assert scoring.score is not None and scoring.scorer is None
        turned = (outputs.flip(-1), 1 - y) if scoring.positive == 0 else (outputs, y)
        found = scoring.score(*turned)
        X = np.zeros((len(y), 1))
        for output, score in zip(turned[0], found.tolist()):
            model = fitted(output, scoring.classes, X, X)
            expected = get_scorer(name)(model, X, turned[1].numpy())
            assert score == pytest.approx(expected, abs=1e-12), (seed, name)
