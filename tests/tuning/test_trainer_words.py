"""Words of the trainers of Lightning and transformers in ``tune``: each message says what to pass."""

import re
from inspect import signature

import numpy as np
import pytest

import gputune
from gputune.api.interactive import TRAINER_ADVICE, TRAINER_KEYS
from gputune.spaces.config import legal_keys

X = np.random.default_rng(0).normal(size=(30, 2))
Y = np.arange(30) % 3


def test_every_advice_on_an_argument_of_a_trainer_names_an_argument_of_tune():
    known = signature(gputune.tune).parameters
    for word, advice in TRAINER_ADVICE.items():
        assert word not in known
        words = set(re.findall(r"\w+", advice))
        assert words & known.keys() or "gputune.search" in advice, advice
    assert set(TRAINER_KEYS.values()) <= {*legal_keys("module", "adamw"), "loss__label_smoothing"}


def test_hyperparameters_of_train_many_belong_in_its_configurations():
    message = (
        r"^train_many\(\) got an unexpected keyword argument 'learning_rate'. Hyperparameters "
        r'belong in the configurations: configs=\[{"lr": ...}\].$'
    )
    with pytest.raises(TypeError, match=message):
        gputune.train_many("mlp", [{}], [[0.0]], [0], learning_rate=0.1)


class Foreign:
    """A callback of another library."""

    __module__ = "lightning.pytorch.callbacks"


def test_callbacks_of_a_trainer():
    message = (
        r"^callbacks must be a list of gputune.callbacks.Callback objects, .* gputune trains without "
        r"a trainer. Pass patience=5 to stop trials early. To keep the trainer and its callbacks, "
        r"call the trainer in the objective of gputune.search.$"
    )
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune("mlp", X, Y, callbacks=[Foreign()])


@pytest.mark.parametrize(
    ("task", "metric", "scoring"),
    [
        ("classification", "val_loss", "neg_log_loss"),
        ("regression", "val_loss", "neg_mean_squared_error"),
        ("classification", "eval_acc", "accuracy"),
        ("regression", "val_mae", "neg_mean_absolute_error"),
        ("regression", "val_xyz", "r2"),
    ],
)
def test_a_metric_that_a_trainer_logs_is_no_scoring(task, metric, scoring):
    message = (
        f"got '{metric}'. A trainer logs metrics such as '{metric}', but gputune computes the "
        f"score from the predictions of the validation rows. For example scoring='{scoring}'."
    )
    with pytest.raises(gputune.InputError, match=re.escape(message)):
        gputune.tune("mlp", X, Y, scoring=metric, task=task, verbose=0)
