"""The HTML report of a study: its content, its safety against any text, and its size."""

import functools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import gputune
from gputune.api.study import Study
from gputune.ground.errors import InputError
from gputune.ground.text import short
from gputune.report.page import BUDGET, as_json, page, plain_number, table_columns
from gputune.views.parameters import importance
from gputune.views.scores import score_view
from made_studies import HOSTILE, hostile_study, made_batches, made_descent, made_study, study_of


class Elements(HTMLParser):
    """All tags of a page with their attributes, and the text of each kind of element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags = []
        self.attributes = []
        self.texts = {}
        self.open = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # every element is closed where it should be

    def handle_data(self, data):
        for tag in self.open[-1:]:
            self.texts.setdefault(tag, []).append(data)

    @property
    def text(self):
        return " ".join(" ".join(part for parts in self.texts.values() for part in parts).split())


def table_of(html):
    (data,) = [text for text in Elements(html).texts["script"] if text.startswith("{")]
    return json.loads(data)


@pytest.fixture(scope="module")
def study():
    return made_study(60, halved=True)


@pytest.fixture(scope="module")
def html(study):
    return page(study)


def test_the_headline(study, html):
    best = study.best_trial
    text = Elements(html).text
    assert f"{best.score:.4f} ± {best.std_error:.4f}" in text
    assert f"trial {best.number}, mean ± standard error over 5 folds" in text
    card = html.partition('<dl class="parameters">')[2].partition("</dl>")[0]
    for name, value in best.params.items():
        assert f"<dt>{name}</dt><dd>{short(value)}</dd>" in card  # four digits: no rate has 17
        assert repr(value) in text  # in full in the code
    assert not re.search(r"[0-9.]{9}", card)
    assert (
        "not known here" in text
        and "the best score is optimistic, because it is the best of" in text
    )


def test_the_held_out_score_is_that_of_the_studys_own_model(study):
    best = study.best_trial
    info = {
        "params": best.params,
        "score": best.score,
        "held_out_score": 0.87654,
        "held_out_rows": 36,
    }
    assert "0.8765" in Elements(page(study, model=info)).text
    assert (
        "the model on 36 rows that nothing was fitted on" in Elements(page(study, model=info)).text
    )
    for change in ({"score": 0.5}, {"params": {"lr": 1.0}}, {"fingerprint": {"rows": 3}}):
        with pytest.raises(
            InputError,
            match=r"report\(model=...\) must be the tuned model of this study, got a model",
        ):
            page(study, model=info | change)


def test_a_loss_is_shown_in_its_own_sign():
    text, _, code = page(made_descent()).partition('<section id="again">')
    best = made_descent().best_trial
    assert repr(best.score) in code  # as study.best_score has it
    assert "best cross-validated log_loss (lower is better)" in text
    assert f"{-best.score:.4f} ± " in text and f"-{-best.score:.4f}" not in text


def test_every_section_is_there_and_reached_from_the_top(html):
    parsed = Elements(html)
    ids = {value for _, name, value in parsed.attributes if name == "id"}
    links = [value for tag, name, value in parsed.attributes if tag == "a" and name == "href"]
    assert {link.removeprefix("#") for link in links} <= ids
    assert {
        "curves",
        "slices",
        "parallel",
        "importance",
        "endings",
        "table",
        "again",
        "setting",
    } <= ids
    assert "paths" not in ids
    assert "paths" in {
        value for _, name, value in Elements(page(made_descent())).attributes if name == "id"
    }


def test_a_chart_of_each_kind_is_drawn(study, html):
    labels = [
        value
        for tag, name, value in Elements(html).attributes
        if tag == "svg" and name == "aria-label"
    ]
    assert (
        labels[0]
        == "Learning curves of the best 5 trials, mean and standard deviation over the folds"
    )
    for name in study.best_params:
        assert f"Score against {name}" in labels
    assert "Parallel coordinates: one line a trial" in labels
    assert "Importance of the hyperparameters" in labels


def test_how_the_trials_ended(study, html):
    text = Elements(html).text
    for state in ("complete", "pruned", "failed"):
        number = sum(trial.state == state for trial in study.trials)
        assert number and re.search(rf"\b{number} (complete|pruned|diverged)", text)
    rungs = re.findall(
        r'<tr><td class="number">(3|9)</td><td class="number">(\d+)</td><td class="number">(\d+)',
        html,
    )
    left = {r: sum(t.detail.get("rung") == r for t in study.trials) for r in (3, 9)}
    on = {r: int((np.isfinite(study.curves).any(2).sum(1) > r).sum()) for r in (3, 9)}
    assert rungs == [(str(r), str(left[r]), str(on[r])) for r in (3, 9)]
    failed = next(trial for trial in study.trials if trial.state == "failed")
    assert (
        f'<td class="number">{failed.number}</td><td>diverged in epoch {failed.best_epoch + 1}</td>'
        in html
    )


def test_the_table_has_every_trial_best_first(study, html):
    columns = {column["key"]: column for column in table_of(html)["columns"]}
    ranking = sorted(
        study.ranking(), key=lambda trial: -trial.score if math.isfinite(trial.score) else math.inf
    )
    assert columns["number"]["values"] == [trial.number for trial in ranking]
    assert columns["score"]["values"] == [
        round(t.score, 4) if math.isfinite(t.score) else None for t in ranking
    ]
    states = columns["state"]
    assert [states["levels"][place] for place in states["values"]] == [
        trial.state for trial in ranking
    ]
    assert columns["params_width"]["values"] == [trial.params["width"] for trial in ranking]
    np.testing.assert_allclose(
        columns["params_lr"]["values"], [t.params["lr"] for t in ranking], rtol=5e-4
    )


def test_importance_says_how_it_was_made(study, html):
    found = importance(study)
    text = Elements(html).text
    assert found.names[0] == "lr"
    assert (
        f"of {found.trials} finished trials" in text
        and "random forests (scikit-learn, seed 0)" in text
    )
    assert f"Unshuffled, R² is {found.fit:.2f}." in text
    assert page(study) == html  # the same every time


def test_it_needs_no_network(html):
    parsed = Elements(html)
    assert not re.search(r"https?:|//[a-z]", html.replace("application/json", ""))
    for tag, name, value in parsed.attributes:
        assert name not in (
            "src",
            "srcset",
            "style",
            "action",
            "data",
            "xlink:href",
        ) and not name.startswith("on")
        inside = ("#", "data:image/png;base64,") if tag == "image" else "#"
        assert name != "href" or value.startswith(inside), (tag, value)
    loading = "link img iframe object embed base form foreignobject"
    assert not {*loading.split()} & {*parsed.tags}
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html) and "@import" not in html


def test_the_policy_allows_the_pages_own_script_and_style_only(html):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", rules[kind])
    assert html.index("Content-Security-Policy") < html.index("<style")


@functools.cache
def hostile_page(text):
    return page(hostile_study(text))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_adds_an_element(text):
    written = hostile_page(text)
    hostile = Elements(written)
    plain = Elements(hostile_page("plain"))
    # The number of ticks of a chart depends on the length of its labels.
    in_charts = {"g", "text", "use", "path", "defs", "clippath", "rect", "image"}
    assert {*hostile.tags} == {*plain.tags}
    assert {a[:2] for a in hostile.attributes} == {a[:2] for a in plain.attributes}
    for parsed in (hostile, plain):
        parsed.tags = [tag for tag in parsed.tags if tag not in in_charts]
        parsed.attributes = [a[:2] for a in parsed.attributes if a[0] not in in_charts]
    assert hostile.tags == plain.tags
    assert hostile.attributes == plain.attributes
    assert not any(ord(char) < 32 and char not in "\n" for char in written)


def test_no_text_ends_the_data():
    assert (
        as_json({"a": "</script><!--&\u2028"})
        == '{"a":"\\u003c/script\\u003e\\u003c!--\\u0026\\u2028"}'
    )
    for text in HOSTILE[:6]:
        columns = {column["key"]: column for column in table_of(hostile_page(text))["columns"]}
        assert text in columns[f"params_module__{text}"]["levels"]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: made_study(0), "There is no best trial: the study has no trials"),
        (lambda: made_study(12, waiting=12), "12 trials, but none has been trained yet"),
        (lambda: made_study(30, waiting=20), "20 of 30 trials have not been trained yet"),
        (lambda: made_study(3, waiting=1), "1 of 3 trials has not been trained yet"),
        (lambda: made_study(1), "Not computed: importance needs 10 finished trials"),
        (
            lambda: study_of([{"lr": 1.0 + c} for c in range(4)], [math.nan] * 4),
            "4 of 4 trials diverged",
        ),
        (
            lambda: Study(meta={}, trials=(), curves=np.zeros((0, 0, 0))),
            "The study holds no options.",
        ),
    ],
)
def test_an_empty_a_running_and_a_failed_study_is_a_page(made, words):
    html = page(made())
    assert words in Elements(html).text
    assert "nan" not in re.sub(r"<script>.*", "", html, flags=re.S).lower().replace("finance", "")


def test_ten_thousand_trials_are_small_and_say_what_is_thinned():
    html = page(made_study(10_000, epochs=50))
    assert len(html.encode()) < 2_000_000
    text = Elements(html).text
    assert html.count("data:image/png;base64,") > 2  # many points are one picture
    assert re.search(r"The best 400 of \d+ scored trials have a line", text)
    assert len(table_of(html)["columns"][0]["values"]) == 10_000


def test_a_table_too_large_keeps_the_best_and_says_so(monkeypatch):
    monkeypatch.setattr("gputune.report.page.BUDGET", BUDGET // 20)
    names = [f"module__{'long' * 10}_{i}" for i in range(30)]
    rng = np.random.default_rng(0)
    params = [{name: float(rng.random()) for name in names} for _ in range(225)]
    study = study_of(params, [c / 1e4 for c in range(225)])
    columns, rows = table_columns(study)
    assert rows < 225 and len(as_json(columns)) <= BUDGET // 20
    assert columns[0]["values"] == [trial.number for trial in study.ranking()[:rows]]
    html = page(study)
    assert f"The best {rows} of 225 trials are in this table" in Elements(html).text
    assert "The 9 most important hyperparameters of 30 are drawn" in Elements(html).text


def test_values_that_no_axis_has():
    study = study_of([{"C": math.inf}, {"C": 1.0}, {"C": 0.1}, {"width": 1234567, "lr": 0.1234567}])
    text = Elements(page(study)).text
    assert "1 trial with an infinite C is not drawn" in text
    columns = {column["key"]: column for column in table_columns(study)[0]}
    assert columns["params_C"]["levels"] == ["0.1", "1", "inf"]
    assert [columns[f"params_{name}"]["values"][0] for name in ("width", "lr")] == [1234567, 0.1235]


def test_one_bad_score_does_not_stretch_the_axes():
    scores = [-1e9 if c == 5 else 0.9 + c / 1000 for c in range(20)]
    html = page(study_of([{"lr": 0.1 * (c + 1)} for c in range(20)], scores, scoring="r2"))
    assert "1 score lies beyond the axis and stands at its edge." in Elements(html).text


def test_report_writes_a_file_and_refuses_bad_places(study, html, tmp_path):
    out = tmp_path / "report.html"
    kept = tmp_path / "study.db"
    out.write_text("an older page")
    study.report(out)
    assert out.read_text() == html
    kept.write_text("study")
    for shown, place, message in (
        (study, tmp_path, "is a folder. Give the name of a file, such as report.html"),
        (made_study(2, file=kept), kept, "must not be the file of the study. Give another name"),
        (
            study,
            tmp_path / "report.pdf",
            r"report\('.*report.pdf'\) must end in .html, because the report is HTML",
        ),
        (
            study,
            "none/r.html",
            r"report\('none/r.html'\) must be in an existing folder, but 'none' does not exist. Create the",
        ),
    ):
        with pytest.raises(InputError, match=message):
            shown.report(place)
    assert kept.read_text() == "study"


def test_the_page_of_a_samplers_study():
    study = made_batches(40, halving=gputune.Halving(min_epochs=3))
    html = page(study)
    text = Elements(html).text
    assert "optuna: sampler=TPESampler, halving=(factor=3, min_epochs=3, brackets=1)" in text
    text_of_one = Elements(page(made_batches(9))).text
    assert "optuna: sampler=TPESampler" in text_of_one and "halving=" not in text_of_one
    assert "hypergradient" not in text.lower()
    (origins,) = [column for column in table_of(html)["columns"] if column["key"] == "origin"]
    assert origins["levels"] == [*(f"Optuna, batch {n}" for n in range(1, 6)), "default"]
    shown = [origins["levels"][place].removeprefix("Optuna, ") for place in origins["values"]]
    assert sorted(shown) == sorted(t.origin for t in study.trials)
    assert "Optuna's sampler proposes trials in batches" in text
    assert "Optuna's sampler proposes" not in Elements(page(made_study(3))).text


def test_batches_are_sorted_by_their_number():
    (origins,) = [
        column for column in table_columns(made_batches(90))[0] if column["key"] == "origin"
    ]
    assert origins["levels"] == [*(f"Optuna, batch {n}" for n in range(1, 13)), "default"]


def test_under_halving_the_page_says_which_trials_can_win():
    """A pruned trial scores higher than the best one: the list is in order, and the page says why
    it did not win."""
    made = study_of([{"lr": 0.1 * (n + 1)} for n in range(4)], [0.7, 0.9, 0.8, math.nan])
    trials = [replace(t, state="pruned") if t.number == 1 else t for t in made.trials]
    study = replace(made, trials=tuple(trials))
    assert study.best_trial.number == 2
    html = page(study)
    columns = {column["key"]: column for column in table_of(html)["columns"]}
    assert columns["number"]["values"] == [1, 2, 0, 3]
    eligible = columns["eligible"]
    words = [None if place is None else eligible["levels"][place] for place in eligible["values"]]
    assert words == ["no", "best", "yes", None]
    text = Elements(html).text
    assert (
        "1 trial was pruned and cannot be the best trial, even with a higher score: that score "
        "is from" in text
    )
    assert "the best score so far, without pruned trials" in text
    assert score_view(study).best_so_far.tolist() == [0.7, 0.7, 0.8, 0.8]
    lines = re.findall(r'<g data-rank="(\d+)"', html)
    assert sorted(lines) == ["0", "1", "2"]
    plain = page(made)
    assert "eligible" not in plain and "without pruned trials" not in plain
    alone = [replace(t, state="pruned") if math.isfinite(t.score) else t for t in made.trials]
    text = Elements(page(replace(made, trials=tuple(alone)))).text
    assert "Every trial with a score was pruned, so each of them can be the best trial." in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.001, "0.001"),
        (1.5e-5, "1.5e-5"),
        (1.234e-7, "1.234e-7"),
        (0.0, "0"),
        (64, "64"),
        (1234567, "1234567"),
        (0.12, "0.12"),
        (12350.0, "12350"),
        (-2.5e-6, "-2.5e-6"),
        (1.235e8, "123500000"),
    ],
)
def test_numbers_of_the_table_are_short(value, text):
    assert plain_number(value) == text


def test_an_integer_that_is_no_float_is_infinite_as_in_a_script():
    assert plain_number(10**400) == "Infinity"
    assert plain_number(-(10**400)) == "-Infinity"


def test_a_long_training_time_has_few_digits():
    made = study_of([{"lr": 0.1}, {"lr": 0.2}])
    for longest, shown in ((1.234, 1.23), (123.456, 123.5), (12345.6, 12350.0)):
        study = replace(made, trials=tuple(replace(t, seconds=longest) for t in made.trials))
        (seconds,) = [column for column in table_columns(study)[0] if column["key"] == "seconds"]
        assert seconds["values"] == [shown, shown]
