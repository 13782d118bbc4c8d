"""The numbers of the page of published results are those of the result files."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "published-results.md").read_text()
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
