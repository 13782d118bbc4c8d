"""The numbers of the page of published results are those of the result files."""

import json
import runpy
from pathlib import Path
from statistics import median

import numpy as np
import pytest

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


def test_the_portfolio_of_realmlp():
    numbers = (RESULTS / "realmlp_portfolio-amd-epyc-1-cores.md").read_text()
    rows = [line.split("|")[1:-1] for line in numbers.splitlines() if line.startswith("| ")]
    gains = {cells[0].strip(): [cell.strip() for cell in cells[-2:]] for cells in rows[1:]}
    mean, to_32 = gains.pop("mean")
    of_table = {name: float(to_8.rstrip("%")) for name, (to_8, _) in gains.items()}
    best, worst = min(of_table, key=of_table.get), max(of_table, key=of_table.get)
    n_lower = sum(gain < 0 for gain in of_table.values())
    assert (len(of_table), n_lower, len(of_table) - n_lower) == (11, 6, 5)
    page = " ".join((ROOT / "docs" / "benchmark-tables.md").read_text().split())
    assert f"the best of these eight trials was {mean.lstrip('-')} lower than" in page
    assert f"from {of_table[best]:+.1f}% on {best} to {of_table[worst]:+.1f}% on {worst}." in page
    assert f"32 random configurations, the error was {to_32.lstrip('-')} lower." in page
    table = " ".join((ROOT / "docs" / "tune-a-table.md").read_text().split())
    assert f"the error of the best trial was {mean.lstrip('-')} lower on average" in table


NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def test_tables_with_many_rows():
    file = RESULTS / "many_rows-amd-epyc-1-cores.json"
    of = {(one["table"], one["side"]): one for one in json.loads(file.read_text())["results"]}
    page = (ROOT / "docs" / "benchmark-tables.md").read_text()
    names = list(dict.fromkeys(table for table, _ in of))
    gains, against_catboost = {}, {}
    for name in names:
        sides = [of.get((name, side)) for side in ("LightGBM", "CatBoost", "gputune")]
        best = min(one["error"] for one in sides if one)
        cells = ["not run"] * 3
        for place, one in enumerate(sides):
            if one:
                error = f"{one['error']:.4f}"
                error = f"**{error}**" if one["error"] == best else error
                cells[place] = f"{error} ({one['cpu']:,.0f} s)"
        gaps = [sides[2]["error"] / one["error"] - 1 if one else None for one in sides[:2]]
        gains[name], against_catboost[name] = gaps
        shown = ["not run" if gap is None else f"{gap:+.1%}" for gap in gaps]
        (row,) = [
            line for line in page.splitlines() if line.startswith(f"| {name} (") and "s)" in line
        ]
        assert f"({sides[0]['rows']:,})" in row
        assert row.endswith(f"| {' | '.join(cells + shown)} |")
    ahead = sum(gain < 0 for gain in gains.values())
    in_words = " ".join(page.split())
    assert f"on {NUMBERS[len(names)]} tables of at least 20,000 rows" in in_words
    assert f"lower error than tuned LightGBM on {NUMBERS[ahead]} of {NUMBERS[len(names)]}" in MODELS
    assert (
        f"{-gains['letter']:.0%} lower on letter, {-gains['protein']:.0%} on protein and kc_house, "
        f"{-gains['adult']:.1%} on adult and {-gains['heart_2020']:.1%} on heart_2020. On "
        f"california it was {gains['california']:.1%} higher"
    ) in MODELS
    assert f"{gains['protein']:.0%}" == f"{gains['kc_house']:.0%}"
    known = [gap for gap in against_catboost.values() if gap is not None]
    assert f"CatBoost was measured on {NUMBERS[len(known)]} of them" in in_words
    assert max(known) < 0 and f"tuned CatBoost on all {NUMBERS[len(known)]} tables" in MODELS
    peaks = [of["heart_2020", side]["peak"] / 1024 for side in ("gputune", "LightGBM")]
    assert f"needed {peaks[0]:.1f} GiB of memory there, and LightGBM {peaks[1]:.1f} GiB" in in_words


def test_tabm_mini():
    numbers = json.loads((RESULTS / "tabm-amd-epyc-1-cores.json").read_text())["results"]
    of = {(one["table"], one["side"]): one for one in numbers}
    page = (ROOT / "docs" / "benchmark-tables.md").read_text()
    for name in dict.fromkeys(table for table, _ in of):
        realmlp = of[name, "RealMLP"]
        cells = [f"**{realmlp['error']:.4f}** ({realmlp['cpu']:,.0f} s)"]
        for copies in (8, 32):
            other = of.get((name, f"TabM-mini, {copies} copies"))
            cells.append(f"{other['error']:.4f} ({other['cpu']:,.0f} s)" if other else "not run")
            if other:
                assert other["error"] > realmlp["error"] and other["cpu"] > realmlp["cpu"]
        assert f"| {name}, {realmlp['rows']:,} rows | {' | '.join(cells)} |" in page


TABLE_CHART = ROOT / "scripts" / "benchmark" / "table_chart.py"
MODELS = " ".join((ROOT / "docs" / "which-model.md").read_text().split())
"""The text of the page that compares models for tables."""


@pytest.fixture(scope="module")
def table_chart():
    return runpy.run_path(str(TABLE_CHART))


def test_the_chart_of_tables_shows_the_results(table_chart):
    assert (ROOT / "docs" / "table-errors.svg").read_text() == table_chart["chart"]()
    assert "](table-errors.svg)" in MODELS
    results = json.loads((RESULTS / "tables-amd-epyc-1-cores.json").read_text())["results"]
    one = next(one for one in results if (one["table"], one["split"]) == ("adult", 0))
    assert one["scoring"] == "accuracy" and table_chart["error"](one) == 1 - one["score"]


def test_where_networks_win_and_lose(table_chart):
    ratios = table_chart["relative_errors"]()
    assert len(ratios) == 11
    won = []
    of_wins = []
    of_losses = {}
    for table, of_table in ratios.items():
        trees = min(1.0, of_table["LightGBM tuned"], of_table["default CatBoost"])
        percent = round(100 * (of_table["realmlp ensemble"] / trees - 1))
        if table_chart["best_model"](of_table) in ("RealMLP", "MLP"):
            won.append(table)
            of_wins.append(-percent)
        else:
            of_losses[table] = percent
    assert "A network has the lowest error on six tables" in MODELS and len(won) == 6
    assert f"On {', '.join(won[:-1])} and {won[-1]}, the error of RealMLP's ensemble" in MODELS
    assert f"is {min(of_wins)}% to {max(of_wins)}% lower than the lowest error of" in MODELS
    assert f"On german_credit it is {of_losses.pop('german_credit')}% higher" in MODELS
    low, high = min(of_losses.values()), max(of_losses.values())
    *first, last = of_losses
    lost = f"On {', '.join(first)} and {last}, the error of RealMLP's ensemble is {low}% to {high}%"
    assert f"{lost} higher" in MODELS
    medians = {
        way: round(100 * (1 - median(of_table[way] for of_table in ratios.values())))
        for way in table_chart["LABELS"]
    }
    assert medians.pop("mlp portfolio ensemble") == 3 and set(medians.values()) == {5}
    assert "all have a 5% lower error than boosting" in MODELS
    assert "The ensemble of MLPs has a 3% lower error." in MODELS
    better = {way: sum(of_table[way] < 1 for of_table in ratios.values()) for way in medians}
    n_lightgbm = sum(of["realmlp ensemble"] < of["LightGBM tuned"] for of in ratios.values())
    assert f"on {better['realmlp ensemble']} of 11 tables, and a lower error than tuned" in MODELS
    assert f"tuned LightGBM on {n_lightgbm} of 11" in MODELS
    n_mlp = sum(of_table["mlp portfolio ensemble"] < 1 for of_table in ratios.values())
    assert f"default settings on {n_mlp} of 11 tables. |" in MODELS


def test_the_seconds_of_the_models_for_tables():
    results = json.loads((RESULTS / "tables-amd-epyc-1-cores.json").read_text())["results"]

    def seconds(way):
        of_table = {}
        for one in results:
            if one["way"] == way and "rows" not in one["table"]:
                of_table.setdefault(one["table"], []).append(one["seconds"])
        medians = [median(seconds) for seconds in of_table.values()]
        return f"{min(medians):.0f} to {max(medians):.0f} s"

    assert f"RealMLP's ensemble took {seconds('realmlp ensemble')}" in MODELS
    assert f"which takes {seconds('realmlp ensemble')}" in MODELS
    assert f"ensemble of MLPs {seconds('mlp portfolio ensemble')}" in MODELS
    assert f"tuned LightGBM {seconds('LightGBM tuned')}" in MODELS
    assert f"CatBoost with default settings takes {seconds('default CatBoost')}" in MODELS


def test_higher_frequencies_on_california():
    (path,) = (RESULTS / "records").glob("california-*-c297d5415112-*.json")
    seeds = json.loads(path.read_text())["seeds"]
    rmse = np.mean([seed["quality"] for seed in seeds])
    cpu = np.mean([seed["cpu_seconds"] for seed in seeds])
    results = json.loads((RESULTS / "tuned-mlp-amd-epyc-1-cores.json").read_text())["results"]
    (published,) = (
        one
        for one in results
        if (one["table"], one["model"], one["trials"]) == ("california", "realmlp", 16)
        and one["way"] == "ensemble"
    )
    assert f"a test RMSE of {rmse:.3f} after {cpu:.0f} CPU seconds" in MODELS
    assert f"had {published['score']:.3f} after {published['cpu']:,.0f} CPU seconds" in MODELS
    assert f"was {100 * (1 - rmse / published['score']):.0f}% lower in a sixth" in MODELS
    assert published["cpu"] / cpu == pytest.approx(6, abs=0.5)
