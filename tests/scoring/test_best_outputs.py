"""Of each trial the outputs at its best fold mean so far are kept; where they take too much, of the best trials."""

import numpy as np
import pytest
import torch

from gputune.scoring.scoring import BestOutputs

TRIALS, EPOCHS, SIZES = 5, 6, (3, 2)
BYTES = 4 * sum(SIZES) * 2


@pytest.mark.parametrize("most", [0, 2, TRIALS])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_trials_keep_the_outputs_of_their_best_epochs(most, seed):
    draws = np.random.default_rng(seed)
    means = draws.integers(6, size=(EPOCHS, TRIALS)) / 4
    means[2:, 1] = np.nan  # it has diverged
    outputs = [torch.tensor(draws.normal(size=(EPOCHS, TRIALS, m, 2))) for m in SIZES]
    before = np.array([-np.inf] * 4 + [1.0])  # of the last one an epoch is known whose outputs are not
    best = BestOutputs(most * BYTES + 1, before.copy())
    for epoch in range(EPOCHS):
        alive = np.flatnonzero(epoch < 4 + np.arange(TRIALS))  # the first trial leaves early
        best.take(epoch + 1, alive.tolist(), means[epoch, alive], [one[epoch, alive] for one in outputs])
    means[4:, 0] = np.nan
    tops = np.fmax(np.nanmax(means, 0), before)
    at = np.nanargmax(means, 0)
    kept = [t for t in np.argsort(-tops, kind="stable")[:most] if np.nanmax(means[:, t]) > before[t]]
    found = best.of_trials([f"trial {t}" for t in range(TRIALS)])
    assert found.keys() == {f"trial {t}" for t in kept}
    for t in kept:
        one, expected = found[f"trial {t}"], torch.cat([o[at[t], t] for o in outputs])
        assert one.epoch == at[t] + 1
        np.testing.assert_array_equal(one.values, expected.float())
