"""Fixtures that the tests of searches share."""

import pytest

from gputune.sklearn import replay
from searches import CountingScaler


@pytest.fixture
def training(monkeypatch):
    """The calls that train, by their numbers of candidates and folds and the shape of their
    rows."""
    calls = []
    fit_together = replay.fit_together

    def counted(candidates, folds, training):
        calls.append((len(candidates), len(folds.trains), tuple(folds.rows.X.parts[0].shape)))
        return fit_together(candidates, folds, training)

    monkeypatch.setattr(replay, "fit_together", counted)
    return calls


@pytest.fixture
def scaler_fits():
    """The numbers of rows on which a CountingScaler is fitted."""
    CountingScaler.fits.clear()
    return CountingScaler.fits
