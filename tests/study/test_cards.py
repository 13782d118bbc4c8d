"""What a notebook shows of a study and of a model."""

import re
from html import unescape

import numpy as np
import pytest

import gputune
from gputune.api.study import Study
from made_studies import HOSTILE, hostile_study, made_study


def test_a_study():
    study = made_study(30, halved=True)
    html, best = study._repr_html_(), study.best_trial
    assert "Study of mlp" in html and f"{best.score:.4f} ± {best.std_error:.4f} over 5 folds" in html
    for name in best.params:
        assert f">{name}</th>" in html
    assert f"{sum(t.state == 'pruned' for t in study.trials)} pruned" in html
    assert len(html) < 2500


def test_a_study_without_a_result():
    assert "none" in made_study(0)._repr_html_()
    assert "4 waiting" in made_study(4, waiting=4)._repr_html_()
    assert (
        Study(meta={}, trials=(), curves=np.zeros((0, 0, 0)))
        ._repr_html_()
        .startswith("<div><strong>Study</strong>")
    )


def test_a_model():
    X, y = np.random.default_rng(0).normal(size=(40, 3)), np.array(["<b>", "x"])[np.arange(40) % 2]
    study = gputune.tune("mlp", X, y, n_trials=1, max_epochs=2, cv=2, workers=1, verbose=0)
    html = study.best_model()._repr_html_()
    assert "TunedModel: MLP" in html and "2: &lt;b&gt;, x" in html and "3 columns" in html
    assert f'cross-validated accuracy</th><td style="text-align:left">{study.best_score:.4f}' in html


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_an_element(text):
    html = hostile_study(text)._repr_html_()
    assert re.findall(r"<(/?\w+)", html) == re.findall(r"<(/?\w+)", hostile_study("plain")._repr_html_())
    assert gputune.text.clean(text) in unescape(html)
