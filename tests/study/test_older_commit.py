"""Studies and models of commit 3592e8d5 open, resume, refit and predict as that commit did."""

import json
import shutil
import sqlite3
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import gputune
import older_commit
from command_line import run
from gputune.study.code import class_from_file
from gputune.study.rows import checksum

ARCHIVE = Path(__file__).with_name("commit_3592e8d5.zip")
RECORDED = json.loads(zipfile.ZipFile(ARCHIVE).read("expected.json"))
SAME_MACHINE = RECORDED["machine"] == older_commit.machine()
"""Whether numbers must have the bits that they had then, unless compiled code trained them."""


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Return the folder with the unpacked archive. Its studies name the module file by the path
    that it has there."""
    zipfile.ZipFile(ARCHIVE).extractall(tmp_path)
    for study in tmp_path.glob("*/*/study.db"):
        _replace_text(study, f"{RECORDED['folder']}/net.py", f"{tmp_path}/net.py")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("older_net", None)


def _replace_text(study, before, after):
    """Replace a text in the options of a study."""
    connection = sqlite3.connect(study)
    for key, value in connection.execute("SELECT key, value FROM meta").fetchall():
        if before in value:
            row = (key, value.replace(before, after))
            connection.execute(
                "UPDATE meta SET value = ?, checksum = ? WHERE key = ?",
                (row[1], checksum(*row), key),
            )
    connection.commit()
    connection.close()


def _assert_equal(value, expected, *, float64=True, compiled=False):
    """Compare numbers: their bits on the machine that wrote the archive, else up to rounding.

    Networks that compiled code has trained (``compiled``) are compared up to rounding on every
    machine, because gputune computes exp with other instructions than at that commit.
    """
    if SAME_MACHINE and not compiled:
        np.testing.assert_array_equal(value, expected)
    else:
        rtol = 1e-6 if float64 else 1e-4
        np.testing.assert_allclose(value, expected, rtol=rtol, atol=rtol)


def _assert_same_table(study, expected, *, float64=True):
    trials = older_commit.table(study)
    for name in ("params", "state", "best_epoch"):
        assert [trial[name] for trial in trials] == [trial[name] for trial in expected]
    for trial, other in zip(trials, expected, strict=True):
        compiled = not float64
        _assert_equal(trial["scores"], other["scores"], float64=float64, compiled=compiled)
        curves = (np.array(trial["curve"]), np.array(other["curve"]))
        _assert_equal(*curves, float64=float64, compiled=compiled)


def _is_float64(name):
    return name not in ("mlp", "halving")


@pytest.mark.parametrize("name", RECORDED["tables"])
def test_a_study_of_an_older_commit_opens(archive, name):
    """The stored values are read, bit for bit; NaN of a waiting trial is compared by its text."""
    for part, expected in (("finished", RECORDED["tables"]), ("partly", RECORDED["partly"])):
        trials = older_commit.table(gputune.Study.open(archive / name / part / "study.db"))
        assert repr(trials) == repr(expected[name])
    states = [trial["state"] for trial in RECORDED["partly"][name]]
    assert "waiting" in states


@pytest.mark.parametrize("name", older_commit.COMMANDS)
def test_a_killed_search_of_an_older_commit_resumes(archive, name, monkeypatch):
    """It goes on from its checkpoint, ends with the table of the whole search, and saves the same
    model."""
    monkeypatch.chdir(archive)
    folder = archive / name / "partly"
    assert any(folder.glob("study.db.state/*.safetensors"))
    if name == "module":
        # A checkpoint belongs to the path of the module file, which is another one here.
        shutil.rmtree(folder / "study.db.state")
    code, _, err = run("resume", folder, "--trust-code", "--quiet")
    assert (code, err) == (0, "")
    assert not folder.joinpath("study.db.state").exists()
    _assert_same_table(
        gputune.Study.open(folder / "study.db"), RECORDED["tables"][name], float64=_is_float64(name)
    )
    predictions = gputune.load_model(folder / "model", trust_code=True).predict_proba(
        older_commit.rows()
    )
    float64 = _is_float64(name)
    expected = RECORDED["predictions"][name]
    _assert_equal(predictions, expected, float64=float64, compiled=not float64)


@pytest.mark.parametrize("name", older_commit.COMMANDS)
def test_a_model_of_an_older_commit_predicts_and_its_study_refits_the_same(archive, name):
    folder = archive / name / "finished"
    rows = older_commit.rows()
    expected = RECORDED["predictions"][name]
    # The module file of the model has another path by now, so the class is given.
    moved = {"module": class_from_file(archive / "net.py", "Net")} if name == "module" else {}
    saved = gputune.load_model(folder / "model", **moved)
    float64 = _is_float64(name)
    _assert_equal(saved.predict_proba(rows), expected, float64=float64)
    study = gputune.Study.open(folder / "study.db")
    refitted = study.best_model(trust_code=True, calibrate=True)
    refitted_predictions = refitted.predict_proba(rows)
    _assert_equal(refitted_predictions, expected, float64=float64, compiled=not float64)


def test_a_killed_search_of_an_imported_class_resumes(archive):
    import older_net

    study = archive / "imported" / "partly" / "study.db"
    resumed = gputune.tune(older_net.Net, "sklearn:iris", study=study, **older_commit.IMPORTED)
    _assert_same_table(resumed, RECORDED["tables"]["imported"])


def test_a_killed_search_of_a_custom_training_loop_resumes(archive):
    study = archive / "loop" / "partly" / "study.db"
    resumed = gputune.search(older_commit.objective, study=study, **older_commit.LOOP)
    _assert_same_table(resumed, RECORDED["tables"]["loop"])


def test_a_finished_search_of_an_older_commit_trains_nothing_when_it_is_repeated(
    archive, monkeypatch
):
    monkeypatch.chdir(archive)
    before = archive / "before.db"
    study = archive / "mlp" / "finished" / "study.db"
    shutil.copy(study, before)
    code, _, err = run("resume", study.parent, "--quiet")
    assert (code, err) == (0, "")
    seconds = [
        [trial.seconds for trial in gputune.Study.open(file).trials] for file in (before, study)
    ]
    assert seconds[0] == seconds[1]
