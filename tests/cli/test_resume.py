"""``gputune resume``: a search continues from its study only, or reports missing parts."""

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import RandomSampler
from scipy import stats
from sklearn.metrics import accuracy_score, make_scorer
from sklearn.model_selection import GroupKFold

import gputune
from command_line import FAST, NET, kinds, output, refusal, run, write_table
from forked import Fork
from gputune.cli import tune
from gputune.data.folds import pack_folds, unpack_folds
from gputune.spaces.config import legal_keys
from gputune.spaces.distributions import space_from_json, space_text, space_to_json, to_scipy
from gputune.spaces.space import check_space
from gputune.study.store import Store
from gputune.tuning.record import recorded_search
from moments import at_finish
from study_processes import done, table

SMALL = ["--trials", "3", "--epochs", "2", "--workers", "1"]
FOLDER = Path("gputune-out")
STUDY = Path("gputune-out/study.db")


@pytest.fixture
def bugs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sites = [f"s{i % 7}" for i in range(40)]
    return write_table(tmp_path / "bugs.csv", site=sites, kind=kinds())


def tuned(*options, **more):
    """Search by the command; return its output."""
    code, out, err = run(
        "tune", Path("bugs.csv").absolute(), "--target", "kind", *SMALL, *options, **more
    )
    assert code == 0, err
    return out + err


def searched(*data, **options):
    """Search from Python into my.db."""
    common = {"n_trials": 1, "cv": 2, "max_epochs": 2, "study": "my.db", "verbose": 0, "workers": 1}
    model = options.pop("model", "mlp")
    return gputune.tune(model, *(data or ("bugs.csv", "kind")), **{**common, **options})


def lose_results(path, keep):
    """Make the study look as if it had been stopped after this number of trials."""
    with Store.open(path) as store:
        store._connection.execute("DELETE FROM results WHERE number >= ?", (keep,))


def without_time(text):
    return [line for line in text.split("\n") if not line.startswith("Trials ")]


@pytest.mark.parametrize(
    "options",
    [
        [],
        [
            "--cv",
            "time:3",
            "--space",
            "lr=1e-4..1e-1:log",
            "width=8..16",
            "dropout=0..0.5",
            "depth=1,2",
        ],
        ["--groups", "site", "--cv", "3", "--scoring", "neg_log_loss", "--numbers", "quantile"],
        ["--method", "halving", "--test-size", "0"],
        ["--method", "hypergradient", "--outer-steps", "1", "--space", "lr=1e-3..1e-2:log"],
        ["--model", "logistic"],
        ["--model", "net.py:Net", "--space", "module__hidden=2,3"],
    ],
)
def test_a_stopped_search_ends_as_one_that_was_never_stopped(bugs, options):
    (bugs.parent / "net.py").write_text(NET)
    whole = tuned(*options)
    expected = table(STUDY)
    shutil.rmtree(FOLDER / "model")
    lose_results(STUDY, 1)
    out = output("resume", FOLDER)
    assert without_time(out) == without_time(whole)
    assert table(STUDY) == expected
    assert gputune.load_model(FOLDER / "model").target == "kind"


def test_what_a_resumed_search_may_change_arrives(bugs, monkeypatch):
    tuned("--backend", "compiled", "--checkpoint-seconds", "7")
    assert (
        recorded_search(
            STUDY, gputune.Study.open(STUDY).record, {}
        ).options.machine.checkpoint_seconds
        == 7
    )
    lose_results(STUDY, 1)
    seen = []
    search = tune.search

    def spy(recorded, *arguments, **more):
        seen.append(recorded.options)
        return search(recorded, *arguments, **more)

    monkeypatch.setattr(tune, "search", spy)
    changed = (
        "--backend eager --checkpoint-seconds 3 --memory 1MB --workers 1 --timeout 600 --device "
        "cpu --profile"
    )
    code, out, err = run("resume", FOLDER, *changed.split(), loud=True)
    assert code == 0 and ", eager" in err and "Where the time went:" in out
    (options,) = seen
    machine = options.machine
    assert (machine.backend, machine.checkpoint_seconds, machine.memory) == ("eager", 3, "1MB")
    assert (machine.workers, options.search.timeout, machine.device) == (1, 600, "cpu")


def test_a_killed_command_is_resumed_in_a_new_process(tmp_path, monkeypatch):
    options = ["--trials", "10", "--epochs", "4", "--memory", "1KB", "--workers", "1", "-q"]
    killed = at_finish(3, "os.kill(os.getpid(), signal.SIGKILL)")
    script = killed + "import sys; from gputune.cli.main import main; main(sys.argv[1:])"
    command = Fork(script, "tune", "sklearn:iris", "--out", "out", *options, cwd=tmp_path)
    assert command.wait() == -signal.SIGKILL
    path = tmp_path / "out" / "study.db"
    assert done(path) == 3
    monkeypatch.chdir(tmp_path)
    assert run("resume", "out/study.db")[0] == 0
    assert run("tune", "sklearn:iris", "--out", "whole", *options)[0] == 0
    assert table(path) == table(tmp_path / "whole" / "study.db")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model", "study.db"]


def test_more_trials_and_a_study_from_python(bugs):
    study = searched(space={"lr": stats.loguniform(1e-4, 0.1)}, n_trials=2)
    code, out, err = run("resume", "my.db", "--trials", "4")
    assert (
        (code, err) == (0, "")
        and "gputune.Study.open('my.db').best_model()" in out
        and "Model " not in out
    )
    more = gputune.Study.open("my.db")
    assert more.trials[:2] == study.trials and len(more.trials) == 4
    assert sorted(p.name for p in bugs.parent.iterdir()) == ["bugs.csv", "my.db"]


def refused(*words):
    err = refusal("resume", "my.db")
    assert err.startswith("gputune: error: ") and "Traceback" not in err
    assert [word for word in words if word not in err] == [], err


def test_what_has_changed_is_said(bugs):
    net = bugs.with_name("net.py")
    whole = bugs.read_text()
    net.write_text(NET)
    searched(model="net.py:Net", space={"lr": [0.1, 0.2]})
    bugs.write_text(whole + "1.0,2.0,red,s1,ant\n")
    refused("the rows of", "bugs.csv", "have changed", "(40 rows then, 41 now)", "Restore the file")
    bugs.write_text(whole.replace("red", "pink"))
    refused("(40 rows then and now, with different names or values)")
    bugs.unlink()
    refused("bugs.csv' is gone. Put the file back")


def test_code_runs_only_if_the_command_names_or_allows_it(bugs, forget_code):
    (bugs.parent / "net.py").write_text(NET)
    tuned("--model", "net.py:Net")
    commands = [
        ["predict", "gputune-out/model", "bugs.csv"],
        ["export", "gputune-out/model", "--out", "model.pt2"],
        ["resume", "gputune-out", "-q"],
    ]
    forget_code()
    for command in commands:
        err = refusal(*command)
        assert f"'Net' is in '{bugs.parent}/net.py', and loading it runs that code. Name the" in err
        assert "--module FILE.py:NAME, or add --trust-code if you trust the code." in err
    assert run(*commands[0], "--trust-code")[::2] == (0, "")
    refusal(*commands[0])
    words = r"\(32 rows then, 40 now\). Pass the rows of the search, or leave X and y out to read '.*bugs.csv' again."
    with pytest.raises(gputune.InputError, match=words):  # of which 8 were held out
        gputune.Study.open("gputune-out/study.db").best_model("bugs.csv", "kind", trust_code=True)
    (bugs.parent / "net.py").write_text(NET + "# a word\n")
    code, _, err = run(*commands[0], "--trust-code")
    assert code == 0 and "warning: " in err and "Its parameters still fit" in err
    code, _, err = run(*commands[2], "--trust-code", "--trials", "3")
    assert code == 0 and "The code of Net has changed since the search began" in err
    (bugs.parent / "net.py").rename(bugs.parent / "moved.py")
    forget_code()
    for command in commands:
        assert "does not exist. Check the path." in refusal(*command, "--trust-code")
        assert run(*command, "--module", "moved.py:Net")[0] == 0
    assert "--module must be FILE.py:NAME, the file and the name of the class" in refusal(
        *commands[0], "--module", "moved.py"
    )


def test_a_cluster_that_only_the_file_names_gets_no_rows(bugs):
    """It would answer in pickles."""
    searched()
    record = gputune.Study.open("my.db").record
    for address in ("local", "auto", "ray://10.0.0.1:10001"):
        record.arguments.kept["workers"] = {"address": address, "cpus": 1}
        wanted = gputune.Ray(address)
        if wanted.is_elsewhere:
            with pytest.raises(
                gputune.InputError,
                match="names the Ray cluster 'ray://10.0.0.1:10001'. The cluster would receive",
            ):
                recorded_search(Path("my.db"), record, {})
            assert (
                recorded_search(Path("my.db"), record, {}, trust_code=True).options.machine.workers
                == wanted
            )
            assert (
                recorded_search(Path("my.db"), record, {"workers": 1}).options.machine.workers == 1
            )
        else:
            found = recorded_search(Path("my.db"), record, {})
            assert found.options.machine.workers == wanted


def test_a_change_of_any_row_is_said_those_held_out_too(bugs):
    assert run("tune", "bugs.csv", "--target", "kind", *FAST)[0] == 0
    whole = bugs.read_text().splitlines()
    said = set()
    for row in range(1, 41, 3):
        changed = whole.copy()
        changed[row] = changed[row].replace(",", "9,", 1)  # its first number
        bugs.write_text("\n".join(changed) + "\n")
        code, _, err = run("resume", "gputune-out")
        again, _, words = run("tune", "bugs.csv", "--target", "kind", *FAST)
        assert code == again == 2
        assert "40 rows then, " not in err
        held_out = "that were held out have changed since the search began. Restore the file" in err
        assert held_out or "have changed since the search began (" in err
        changed = "the held-out rows." if held_out else "data (the same size, but different values"
        assert f"this command in: {changed}" in words
        said.add(held_out)
    assert said == {True, False}
    bugs.write_text("\n".join([*whole, whole[-1]]) + "\n")
    assert "(40 rows then, 41 now). Restore the file" in run("resume", "gputune-out")[2]
    words = run("tune", "bugs.csv", "--target", "kind", *FAST)[2]
    assert (
        "this command in: data (40 rows and 4 columns in the study, 41 rows and 4 columns now). "
        "Use another folder" in words
    )
    bugs.write_text("\n".join(whole) + "\n")
    assert (
        run("resume", "gputune-out")[0]
        == run("tune", "bugs.csv", "--target", "kind", *FAST)[0]
        == 0
    )


def test_another_target_is_named_and_not_what_follows_from_it(bugs):
    tuned("--cv", "2")
    for options, difference in {
        "--target site": "--target ('kind' in the study, 'site' now)",
        "--test-size 0.3": "--test-size (0.2 in the study, 0.3 now). Use another",
        "--seed 1": "--seed (0 in the study, 1 now). Use another",
    }.items():
        _, _, err = run("tune", "bugs.csv", "--target", "kind", *FAST, *options.split())
        assert f"differs from this command in: {difference}" in err
        assert not any(word in err for word in ("folds", "held-out", "data"))


def test_what_is_known_already_is_said(bugs):
    assert "resuming" not in tuned(loud=True)
    assert "resuming: 3 of 3 trials are finished\n" in tuned(loud=True)
    _, _, err = run("resume", FOLDER, "--trials", "1", loud=True)
    assert "more than the 1 trials of this call. The study keeps all of them.\n" in err
    _, _, err = run("resume", FOLDER, "--trials", "4", loud=True)
    assert "resuming: 3 of 4 trials are finished\n" in err
    _, _, err = run("resume", FOLDER, loud=True)
    assert "resuming: 4 of 4 trials are finished\n" in err and "of this call" not in err


def test_a_study_under_another_name_keeps_a_model_of_its_own(bugs):
    tuned()
    before = (FOLDER / "model" / "model.json").read_bytes()
    gputune.Study.open(STUDY).backup(FOLDER / "copy.db")
    assert "copy.model" in output("resume", FOLDER / "copy.db", "--trials", "4")
    assert (FOLDER / "model" / "model.json").read_bytes() == before
    assert gputune.load_model(FOLDER / "copy.model").target == "kind"
    assert run("report", FOLDER / "copy.db")[0] == 0


class Odd:
    """A distribution of one's own."""

    def rvs(self, size=None, random_state=None):
        return 0.01


X = np.arange(80.0).reshape(40, 2)


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ((X, kinds()), {}, "X and y, which were in memory"),
        ((), {"sample_weight": np.ones(40)}, "sample_weight"),
        ((), {"scoring": make_scorer(accuracy_score)}, "scoring, a function"),
        ((), {"space": {"lr": Odd()}}, "space, with an object of your own"),
        ((), {"groups": np.arange(40) % 5, "cv": GroupKFold(2)}, "groups, which were in memory"),
        (
            (),
            {"method": gputune.OptunaSampler(RandomSampler(seed=0))},
            "method, with a sampler of Optuna's",
        ),
    ],
)
def test_what_the_file_does_not_hold_is_named(bugs, data, options, words):
    searched(*data, **options)
    refused(f"does not hold: {words}. Repeat the call of gputune.tune(..., study='my.db') that")


def test_a_study_that_no_search_continues_from(bugs):
    refused("there is no study file")
    Store.create("my.db", {"face": "sklearn", "method": "RandomizedSearchCV"}).close()
    refused("belongs to RandomizedSearchCV, a search of scikit-learn estimators. Fit")
    for study in ("mi.db", "model"):
        (bugs.parent / "model.json").touch()
        err = refusal("resume", study)
        assert ("did you mean 'my.db'?" in err) == (study == "mi.db"), err
    (bugs.parent / "models").mkdir()
    assert "Did you mean 'models'?" in refusal("predict", "modles", "bugs.csv")
    (bugs.parent / "my.db").unlink()
    Store.create("my.db", {"model": "mlp"}).close()
    refused(
        "has lost options of its search and cannot be resumed. Search again, into another folder. "
        "`gputune trials`"
    )
    with pytest.raises(
        gputune.InputError, match=r"has lost options .*\(model, target, .*Its trials can be read"
    ):
        searched()


def test_any_splitter_and_class_weights_continue(bugs):
    options = {"groups": "site", "cv": GroupKFold(3), "class_weight": {"ant": 2.0, "bee": 0.5}}
    searched(n_trials=3, memory=1024, **options)
    expected = table("my.db")
    lose_results("my.db", 1)
    assert run("resume", "my.db")[0] == 0
    assert table("my.db") == expected


class Count(gputune.callbacks.Callback):
    """Counts the trials that it hears of."""

    heard = 0

    def on_trials_end(self, trials):
        self.heard += len(trials.trials)


def test_a_search_continues_without_its_callbacks_and_says_so(bugs):
    count = Count()
    searched(n_trials=3, memory=1024, callbacks=[count])
    expected = table("my.db")
    lose_results("my.db", 1)
    code, _, err = run("resume", "my.db", loud=True)
    assert code == 0 and count.heard == 3
    assert "note: a study file does not store callbacks, so these are not called: Count." in err
    assert table("my.db") == expected
    lose_results("my.db", 1)
    assert run("resume", "my.db")[2] == ""


def test_folds_come_back_in_order():
    draw = np.random.default_rng(0)
    folds = [
        (draw.permutation(1000)[:700], np.arange(700, 1000)),
        (np.arange(10), np.empty(0, np.int64)),
    ]
    packed = pack_folds(folds)
    assert len(packed[0][1]) < 100
    for pair, back in zip(folds, unpack_folds(packed)):
        for rows, again in zip(pair, back):
            assert again.dtype == np.int64
            np.testing.assert_array_equal(again, rows)


@pytest.mark.parametrize(
    "space",
    [
        {
            "lr": stats.loguniform(1e-4, 0.1),
            "width": [8, 16],
            "activation": ["relu", "tanh"],
            "depth": 2,
        },
        {
            "lr": stats.uniform(loc=0.1, scale=0.5),
            "width": stats.randint(4, 9),
            "dropout": stats.beta(2, 3, scale=0.5),
        },
        [{"width": gputune.log_int(4, 64)}, {"lr": [0.1], "dropout": stats.uniform}],
        to_scipy(
            {
                "lr": FloatDistribution(1e-4, 0.1, log=True),
                "dropout": FloatDistribution(0.0, 0.5, step=0.1),
                "width": IntDistribution(4, 64, log=True),
                "depth": IntDistribution(1, 3),
            }
        ),
    ],
)
def test_a_space_is_made_again_from_plain_values(space):
    checked = check_space(space, keys=legal_keys("mlp", "adamw"), module=False)
    again = check_space(
        space_from_json(space_to_json(checked)), keys=legal_keys("mlp", "adamw"), module=False
    )
    assert space_text(again) == space_text(checked)


def test_a_space_names_nothing_but_distributions():
    for name in ("sys", "ttest_ind", "__loader__", "no_such"):
        with pytest.raises(
            gputune.InputError, match=f"scipy.stats has no distribution {name!r}. Use the"
        ):
            space_from_json([{"lr": {"scipy": name, "with": {}}}])
