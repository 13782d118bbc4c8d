"""``gputune search``, which tunes the training loop in a file, and ``gputune stop``."""

import json
import time
from dataclasses import asdict, replace

import pytest
from scipy import stats

import gputune
from command_line import kinds, output, refusal, run, write_table
from forked import Fork
from gputune.study.claims import Claims
from gputune.study.record import Arguments
from gputune.study.store import Store
from study_rows import candidates, result

START = "import sys; from gputune.cli.main import main; sys.exit(main())"

LOOP = """
import time
from pathlib import Path

def objective(params, report):
    weight = 1.0
    for epoch in range(4):
        weight -= params["lr"] * params["depth"] * weight
        report(weight**2)
    return weight**2

def slow(params, report):
    for epoch in range(600):
        time.sleep(0.05)
        Path("began").touch()
        report(float(params["a"]))
    return 0.0

def broken(params, report):
    raise KeyError("a")
"""


@pytest.fixture
def loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(LOOP)
    return "train.py:objective"


SPACE = ("--space", "lr=0.1,0.2,0.4", "depth=1..2", "--direction", "minimize", "--workers", "1")


def test_the_best_trial_and_its_study(loop):
    document = json.loads(
        output("search", loop, *SPACE, "--trials", "20", "--timeout", "1m", "--json", "--quiet")
    )
    best = document["best"]
    assert best["params"] == {"lr": 0.4, "depth": 2} and "fold_scores" not in best
    assert best["score"] == pytest.approx(0.2**8)  # as the function returned it
    assert (document["direction"], document["scoring"]) == ("minimize", "objective")
    assert document["study"] == "gputune-search/study.db" and document["model"] is None
    assert [edge["name"] for edge in document["next"]["edges"]] == ["lr"]
    study = gputune.Study.open(document["study"])
    assert study.best_score == -best["score"]
    assert document["top"][0]["number"] == study.best_trial.number


def test_it_is_the_search_of_python(loop):
    output("search", loop, *SPACE, "--trials", "5", "--seed", "3", "--out", "o", "-q")
    space = {"lr": [0.1, 0.2, 0.4], "depth": stats.randint(1, 3)}

    def objective(params, report):
        weight = 1.0
        for _ in range(4):
            weight -= params["lr"] * params["depth"] * weight
        return weight**2

    study = gputune.search(
        objective,
        space,
        direction="minimize",
        n_trials=5,
        random_state=3,
        workers=1,
        verbose=0,
    )
    stored = gputune.Study.open("o/study.db")
    assert stored.best_score == study.best_score
    assert [t.params for t in stored.trials] == [t.params for t in study.trials]


def test_the_text_at_the_end(loop):
    out = output("search", loop, *SPACE, "--trials", "4", "--out", "o")
    assert out.startswith("Search   minimize train.py:objective; ")
    assert "objective (lower is better)" in out and "Study    o/study.db" in out
    assert "Next     gputune report o" in out
    repeated = output("search", loop, *SPACE, "--trials", "4", "--out", "o")
    assert repeated.partition("Trials")[0] == out.partition("Trials")[0]


def test_its_study_is_continued_by_the_same_command(loop):
    output("search", loop, *SPACE, "--trials", "2", "--out", "o", "-q")
    assert (
        "belongs to gputune.search, and no file stores the training loop. To resume it, repeat the "
        "command gputune search, or the call of gputune.search(..., study='o/study.db')."
    ) in refusal("resume", "o")
    document = json.loads(
        output("search", loop, *SPACE, "--trials", "4", "--out", "o", "-q", "--json")
    )
    assert sum(document["trials"].values()) >= 3


def test_halving_prunes(loop):
    options = ("--method", "halving", "--epochs", "4", "--trials", "6")
    space = ("--space", "lr=0.01..0.4", "depth=1", "--direction", "minimize", "--workers", "1")
    document = json.loads(output("search", loop, *space, *options, "--json", "-q"))
    assert document["trials"]["pruned"] > 0


def test_a_target_score_has_the_sign_of_the_function(loop):
    words = ("search", loop, *SPACE, "--trials", "6", "--target-score", "0.5", "--json", "-q")
    document = json.loads(output(*words))
    assert document["ended"].endswith("has reached the target score (--target-score -0.5)")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train.py", "FILE.py:NAME must be FILE.py:NAME, got 'train.py'."),
        ("no.py:objective", "no.py', which does not exist. Check the path."),
        (
            "train.py:objektive",
            "train.py' has no such function. It has objective, slow, broken.",
        ),
    ],
)
def test_a_function_that_does_not_exist(loop, words, says):
    assert says in refusal("search", words, *SPACE)


def test_a_function_that_fails(loop):
    code, out, err = run("search", "train.py:broken", *SPACE, "--trials", "2", "--json", "-q")
    assert code == 1 and json.loads(out)["error"]["type"] == "SearchFailedError"
    assert "KeyError: 'a' (line 20 of broken)" in err


def test_an_own_key_may_have_any_value(loop):
    words = ("--space", "lr=0.1", "depth=low,high", "--direction", "minimize", "--workers", "1")
    code, _, err = run("search", loop, *words, "-q")
    assert code == 1 and "TypeError" in err  # the function computes with the text


@pytest.mark.parametrize("spec", ["loguniform(1e-4,1)", "randint(1,9)", "1e-4:1e-1", "1:9:log"])
def test_a_range_in_another_notation_is_no_text(loop, spec):
    says = f"A range must be written LOW..HIGH, with ':log' for a log scale, got 'lr={spec}'."
    words = ("--space", f"lr={spec}", "--direction", "minimize")
    assert f"{says} Examples: " in refusal("search", loop, *words)


def test_a_text_with_a_colon_is_a_value(loop):
    words = ("--space", "lr=0.1", "depth=1", "aspect=16:9", "--direction", "minimize", "-q")
    document = json.loads(output("search", loop, *words, "--workers", "1", "--json"))
    assert document["best"]["params"]["aspect"] == "16:9"


def test_the_folder_must_be_a_folder(loop, tmp_path):
    (tmp_path / "file").touch()
    assert "--out must be a folder, got 'file'" in refusal("search", loop, *SPACE, "--out", "file")


@pytest.fixture
def searching(loop, tmp_path):
    """A search in another process, which has begun its first trial."""
    words = ["search", "train.py:slow", "--space", "a=1,2,3", "--direction", "maximize"]
    process = Fork(START, *words, "--workers", "1", "--out", "o", "--json", cwd=tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        process.kill()
        process.communicate()


def test_a_trial_and_then_the_search_end_from_outside(searching, tmp_path):
    asked = output("stop", "o", "--trial", "0")
    assert asked.endswith("will end trial 0 after the running epoch\n")
    end = time.monotonic() + 30
    while not (ended := Store.open(tmp_path / "o/study.db").results()):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert {number: result.state for number, result in ended.items()} == {0: "pruned"}
    assert "--trial must be the number of a trial that has not ended, got 0, which is" in refusal(
        "stop", "o", "--trial", "0"
    )
    assert "of the study, from 0 to 2, got 7" in refusal("stop", "o", "--trial", "7")
    document = json.loads(output("stop", "o", "--json"))
    assert (document["trial"], len(document["processes"])) == (None, 1)
    out, _ = searching.communicate()
    document = json.loads(out)
    assert (searching.returncode, document["status"]) == (0, "done")
    assert document["ended"] == "gputune stop has ended the search"
    assert document["trials"]["pruned"] == 1
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["study.db"]
    assert "no process works on the study 'o/study.db'. The search has ended." in refusal(
        "stop", "o"
    )


def test_a_study_that_does_not_exist(tmp_path):
    assert "there is no study file" in refusal("stop", tmp_path / "no.db")


META = {"model": "mlp", "scoring": "accuracy", "folds": 2}


@pytest.fixture
def owned(tmp_path, monkeypatch):
    """A study on which a process of this test works, and its claims."""
    path = tmp_path / "study.db"
    meta = {**META, "method": {"name": "pbt"}}
    with Store.create(path, meta) as store:
        store.add_trials(candidates(range(2)))
        store.finish([result(1)])
    with Claims(path) as claims:
        assert claims.take_setup() is None
        yield path, claims


def test_a_search_on_another_machine(owned, monkeypatch):
    path, claims = owned
    (owner,) = claims.owners()
    elsewhere = replace(owner, host="node7", boot="other")
    monkeypatch.setattr(Claims, "owners", lambda self: [elsewhere])
    err = refusal("stop", path)
    assert f"process {owner.pid} on 'node7' works on the study" in err
    assert err.endswith(
        "reaches only processes on this machine. Run the command on that machine.\n"
    )


def test_a_population_has_no_single_trial_to_end(owned):
    path, claims = owned
    err = refusal("stop", path, "--trial", "0")
    assert "--trial cannot end one trial of a search with --method pbt" in err
    assert claims.stop_requests() == (False, set())
    output("stop", path)
    assert claims.stop_requests() == (True, set())


def test_a_cluster_has_no_single_trial_to_end(tmp_path):
    path = tmp_path / "study.db"
    arguments = Arguments(kept={"workers": {"cluster": "ray", "address": "local"}})
    stored = asdict(arguments)
    del stored["preset"]  # as in a search without a preset
    with Store.create(path, {**META, "arguments": stored}) as store:
        store.add_trials(candidates(range(2)))
    message = (
        "--trial cannot end one trial of a search on a cluster, because its tasks do not receive "
        "the request. Leave --trial out to end the whole search."
    )
    with Claims(path) as claims:
        assert claims.take_setup() is None
        assert message in refusal("stop", path, "--trial", "0")
        assert claims.stop_requests() == (False, set())


@pytest.mark.parametrize("method", ["random", "halving"])
def test_a_trial_of_a_stacked_search_ends(method, tmp_path, monkeypatch):
    """Its neighbors have the same scores as without the request."""
    from gputune.engine.stop import Stop

    table = write_table(tmp_path / "t.csv", kind=kinds())
    words = ("tune", table, "--target", "kind", "--trials", "4", "--epochs", "9", "--cv", "2")
    words += ("--workers", "1", "--method", method, "--space", "lr=1e-3..1e-1:log", "-q")
    output(*words, "--out", tmp_path / "whole")
    whole = gputune.Study.open(tmp_path / "whole/study.db")
    monkeypatch.setattr(Stop, "ended_trials", lambda self: {2})
    output(*words, "--out", tmp_path / "cut")
    study = gputune.Study.open(tmp_path / "cut/study.db")
    cut = study.trials[2]
    assert cut.state == "pruned" and cut.best_epoch == 1
    assert cut.fold_scores == tuple(whole.curves[2, 0])
    if method == "random":
        assert cut.detail["ended"] == "by gputune stop"
        for number in (0, 1, 3):
            assert study.trials[number].fold_scores == whole.trials[number].fold_scores
