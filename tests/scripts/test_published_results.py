"""The numbers of the page of published results are those of the result files."""

import json
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "published-results.md").read_text()
TEXT = " ".join(PAGE.split())
RESULTS = ROOT / "scripts" / "benchmark" / "results"


def test_the_tuned_mlps(script):
    published = script("tuned_mlp").PUBLISHED
    numbers = json.loads((RESULTS / "tuned-mlp-amd-epyc-1-cores.json").read_text())["results"]
    metrics = {"churn": "accuracy", "california": "RMSE", "adult": "accuracy"}
    for name, metric in metrics.items():
        ours = {
            one["way"]: one["score"]
            for one in numbers
            if (one["table"], one["model"], one["rows"]) == (name, "mlp", "training")
        }
        theirs = [score for who, (score, _, _) in published[name].items() if "MLP" in who]
        cells = [", ".join(reversed(theirs)), *(f"{score:.4f}" for score in ours.values())]
        assert list(ours) == ["best trial", "ensemble"]
        assert f"| {name}, {metric} | {' | '.join(cells)} |" in PAGE


def test_fcnet():
    (path,) = RESULTS.glob("fcnet-*.json")
    numbers = json.loads(path.read_text())
    agreement = numbers["agreement"]
    assert f"gputune's errors with the published errors is {agreement['spearman']:.3f}." in TEXT
    assert f"rank correlation {agreement['spearman']:.3f} |" in PAGE
    assert f"correlation of {agreement['between_seeds']:.3f} with another" in TEXT
    assert f"their mean rank is in the top {100 * agreement['best_rank']:.1f}%" in TEXT
    errors = np.array([trial["error"] for trial in numbers["trials"]])
    published = np.array([trial["published"] for trial in numbers["trials"]])
    learned_nothing = np.abs(errors - 1) < 0.05
    unit = np.median(published[learned_nothing])
    assert f"The errors of {learned_nothing.sum()} networks lie between 0.95 and 1.05" in TEXT
    assert f"the median of their published errors is {unit:.3f}" in TEXT
    ratios = errors * unit / published
    assert f"the median ratio to the published errors is {np.median(ratios):.2f}" in TEXT
    n_close = (np.abs(ratios - 1) < 0.1).sum()
    assert f"between 0.9 and 1.1 for {n_close} of the {len(ratios)} networks" in TEXT
    assert f"recorded {numbers['recorded_hours']:.1f} hours for one training" in TEXT
    assert f"gputune needs {numbers['seconds']:,.0f} s on two cores" in TEXT


def test_the_earlier_scores_on_the_page_of_records():
    numbers = json.loads((RESULTS / "tuned-mlp-amd-epyc-1-cores.json").read_text())["results"]
    page = " ".join((ROOT / "docs" / "records.md").read_text().split())

    def ensemble(table, model, trials):
        (one,) = [
            one
            for one in numbers
            if (one["table"], one["model"], one["trials"]) == (table, model, trials)
            and one["way"] == "ensemble"
        ]
        return one

    california = ensemble("california", "realmlp", 16)
    score = f"an RMSE of {california['score']:.4f}, slightly above the target"
    assert f"{score}, after {california['cpu']:,.0f} CPU seconds" in page
    assert f"an accuracy of {ensemble('adult', 'portfolio', 32)['score']:.4f}." in page
