"""The quantile-normal transform in torch equals the one in NumPy, which has scipy's normal quantile."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from gputune.data.quantiles import fit_quantiles, normal_deviate, normal_scores, normal_scores_of


def test_the_normal_deviate_is_scipys():
    p = np.concatenate([np.logspace(-7, -0.31, 500), 1 - np.logspace(-7, -0.31, 500), [0.075, 0.925, 0.5]])
    np.testing.assert_allclose(normal_deviate(torch.tensor(p)).numpy(), ndtri(p), rtol=1e-12, atol=1e-15)
    ends = normal_deviate(torch.tensor([0.0, 1.0], dtype=torch.float64))
    np.testing.assert_allclose(ends, [-5.199337582605575, 5.199337582605575], rtol=1e-9)


@pytest.mark.parametrize("rows", [2, 3, 40, 2500])
def test_the_scores_are_those_of_numpy(rows):
    rng = np.random.default_rng(rows)
    columns = [rng.normal(size=rows), rng.lognormal(8, 3, rows), rng.integers(0, 4, rows), 1e-9 * rng.normal(size=rows)]
    part = np.stack(columns, axis=1)
    part[0] = 17.0, 3.0, 0.0, 1e-9
    part[1] = -2.0, 5.0, 3.0, -1e-9
    quantiles = fit_quantiles(part)
    beyond = np.stack([part.min(0) - 1, part.max(0) + 1, part.mean(0), np.full(4, 0.5)])
    values = np.concatenate([part, beyond, quantiles, (quantiles[1:] + quantiles[:-1]) / 2])
    expected = np.stack([normal_scores(values[:, j], quantiles[:, j]) for j in range(4)], axis=1)
    found = normal_scores_of(torch.tensor(values), torch.tensor(quantiles)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
