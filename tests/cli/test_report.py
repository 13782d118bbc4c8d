"""``gputune report`` from its words to its page."""

import gputune
from command_line import FAST, kinds, run, write_table
from gputune.report.page import page
from gputune.study.store import Store
from study_rows import candidates, result


def tuned(folder):
    table = write_table(folder / "bugs.csv", 60, kind=kinds(60))
    assert run("tune", table, "--target", "kind", "--out", folder / "out", *FAST)[0] == 0
    return folder / "out"


def test_the_page_has_the_held_out_score_of_the_model_beside_the_study(tmp_path):
    out = tuned(tmp_path)
    code, said, err = run("report", out, "--out", tmp_path / "report.html")
    assert (code, said, err) == (0, f"Report   {tmp_path / 'report.html'}\n", "")
    model, study = gputune.load_model(out / "model"), gputune.Study.open(out / "study.db")
    assert (tmp_path / "report.html").read_text() == page(study, model=model.info)
    score = model.info["held_out_score"]
    assert f'<dd class="value">{score:.4f}</dd><dd class="about">the model on 12 rows' in page(study, model=model.info)
    study.report(tmp_path / "same.html", model=model)
    assert (tmp_path / "same.html").read_text() == (tmp_path / "report.html").read_text()
    assert run("report", out, "--live", "--confusion", "--out", tmp_path / "live.html")[0] == 0
    assert "Confusion matrix" in (tmp_path / "live.html").read_text()


def test_a_model_of_an_earlier_best_trial_has_no_say(tmp_path):
    out = tuned(tmp_path)
    with Store.open(out / "study.db") as store:
        store.add_trials(candidates([90]))
        store.finish([result(90, score=2.0)])
    assert run("report", out / "study.db", "--out", tmp_path / "report.html")[0] == 0
    assert "not known here" in (tmp_path / "report.html").read_text()


def test_the_default_place_is_the_working_folder_and_is_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Store.create("study.db", {"model": "mlp", "scoring": "accuracy", "folds": 2}).close()
    (tmp_path / "report.html").write_text("older")
    assert run("report", "study.db") == (0, "Report   report.html\n", "")
    assert "There is no best trial" in (tmp_path / "report.html").read_text()


def test_bad_places_are_refused_and_nothing_is_lost(tmp_path):
    study = tmp_path / "study.db"
    Store.create(study, {}).close()
    before = study.read_bytes()
    for file, out, words in [
        (study, study, f"error: --out {str(study)!r} is the file of the study itself; give another name"),
        (tmp_path / "none.db", tmp_path / "x.html", "there is no study file"),
    ]:
        code, said, err = run("report", file, "--out", out)
        assert (code, said) == (2, "") and words in err
    assert study.read_bytes() == before and not (tmp_path / "x.html").exists()
