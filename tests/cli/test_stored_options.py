"""A study holds each option of its command: ``gputune resume`` ends with the same trials and the
same model."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import gputune
from command_line import NET, kinds, output, run, write_table
from gputune.cli.arguments import make_parser
from gputune.tuning.record import recorded_search

SMALL = ["--trials", "3", "--epochs", "2", "--cv", "2", "--workers", "1", "--memory", "1KB"]


def options_now(study):
    """Return the search that ``gputune resume`` would make of a study."""
    return recorded_search(study, gputune.Study.open(study).record, {}, trust_code=True)


def as_option(read):
    return lambda search, record: read(SimpleNamespace(**search.options.values()))


def as_field(read):
    return lambda search, record: read(record)


# The commands whose studies are looked at, by a word.
COMMANDS = {
    "classes": (
        "--target kind --model mlp --optimizer adamw --include lr=0.5 --no-default --epochs 3 "
        "--patience 2 --trials 2 --scoring f1 --positive bee --space lr=0.25 --schedule cosine "
        "--seed 3 --target-score 0.999 --patience-trials 50 --task classification --cv 2 "
        "--class-weight balanced --drop c --kind z=category --max-levels 5 --category-copies a --columns keep "
        "--numbers quantile --groups site --test-size 0.3 --device cpu --backend eager --dtype "
        "float64 --memory 1MB --workers 1 --checkpoint-seconds 7 --no-predictions --ensemble "
        "--calibrate --no-compare-default --missing-target drop"
    ),
    "numbers": (
        "--target price --model net.py:Net --trials 2 --epochs 4 --method halving --factor 2 "
        "--min-epochs 1 --brackets 2 --target-transform log1p --loss huber --intervals --cv 2 "
        "--workers 1 --warm-start earlier/study.db --space module__hidden=2,3"
    ),
    "median": "--target price --trials 2 --epochs 4 --method median --min-epochs 1 --every 2 --cv 2 "
    "--workers 1",
    "fixed": "--target price --trials 2 --epochs 4 --method halving --rungs 1,2 --keep 1 --cv 2 "
    "--workers 1",
    "population": (
        "--target price --trials 2 --epochs 4 --method pbt --interval 2,3 --fraction 0.5 --resample 0.1 "
        "--factors 0.5,2 "
        "--no-explore --burn-in 2 --cv 2 --workers 1"
    ),
    "descents": (
        "--target kind --trials 1 --epochs 2 --method hypergradient --descend-on lr,weight_decay "
        "--outer-steps 1 --segments 2 --per-layer --cv 2 --workers 1"
    ),
}

# Where each option is stored: the command that gives it, how a resumed search reads it, and the
# expected value.
STORED = {
    "file": (
        "classes",
        as_field(lambda record: record.source["path"].rpartition("/")[2]),
        "bugs.csv",
    ),
    "target": ("classes", as_field(lambda record: record.target), "kind"),
    "model": ("numbers", lambda search, record: search.choice.name, "Net"),
    "optimizer": ("classes", lambda search, record: search.choice.optimizer, "adamw"),
    "n_trials": ("classes", as_option(lambda options: options.n_trials), 2),
    "include_default": ("classes", as_option(lambda options: options.include_default), False),
    "max_epochs": ("classes", as_option(lambda options: options.max_epochs), 3),
    "patience": ("classes", as_option(lambda options: options.patience), 2),
    "method": ("median", as_option(lambda options: type(options.method).__name__), "Median"),
    "scoring": ("classes", as_option(lambda options: options.scoring), "f1"),
    "positive": ("classes", as_option(lambda options: options.positive), "bee"),
    "space": ("classes", as_option(lambda options: list(options.space[0]["lr"])), [0.25]),
    "schedule": ("classes", as_option(lambda options: options.schedule), "cosine"),
    "random_state": ("classes", as_option(lambda options: options.random_state), 3),
    "target_score": ("classes", as_option(lambda options: options.target_score), 0.999),
    "patience_trials": ("classes", as_option(lambda options: options.patience_trials), 50),
    "factor": ("numbers", as_option(lambda options: options.method.factor), 2),
    "min_epochs": ("numbers", as_option(lambda options: options.method.min_epochs), 1),
    "brackets": ("numbers", as_option(lambda options: options.method.brackets), 2),
    "rungs": ("fixed", as_option(lambda options: list(options.method.rungs)), [1, 2]),
    "keep": ("fixed", as_option(lambda options: options.method.keep), 1),
    "every": ("median", as_option(lambda options: options.method.every), 2),
    "hyperparameters": (
        "descents",
        as_option(lambda options: list(options.method.hyperparameters)),
        ["lr", "weight_decay"],
    ),
    "outer_steps": ("descents", as_option(lambda options: options.method.outer_steps), 1),
    "segments": ("descents", as_option(lambda options: options.method.segments), 2),
    "per_layer": ("descents", as_option(lambda options: options.method.per_layer), True),
    "task": ("classes", lambda search, record: search.source.origin["task"], "classification"),
    "target_transform": ("numbers", as_option(lambda options: options.target_transform), "log1p"),
    "cv": ("classes", as_option(lambda options: len(options.cv)), 2),
    "loss": ("numbers", as_option(lambda options: options.loss), "huber"),
    "class_weight": ("classes", as_option(lambda options: options.class_weight), "balanced"),
    "drop": ("classes", as_option(lambda options: list(options.drop)), ["c"]),
    "kinds": ("classes", as_option(lambda options: options.kinds), {"z": "category"}),
    "n_ens": ("numbers", as_option(lambda options: options.n_ens), 1),
    "max_levels": ("classes", as_option(lambda options: options.max_levels), 5),
    "category_copies": ("classes", as_option(lambda options: options.category_copies), ("a",)),
    "missing_target": ("classes", as_option(lambda options: options.missing_target), "drop"),
    "columns": ("classes", as_option(lambda options: options.columns), "keep"),
    "numbers": ("classes", as_option(lambda options: options.numbers), "quantile"),
    "groups": ("classes", as_field(lambda record: record.source["groups"]), "site"),
    "test_size": (
        "classes",
        lambda search, record: (record.source["test_size"], search.test is not None),
        (0.3, True),
    ),
    "device": ("classes", as_option(lambda options: options.device), "cpu"),
    "backend": ("classes", as_option(lambda options: options.backend), "eager"),
    "dtype": ("classes", as_option(lambda options: options.dtype), "float64"),
    # a GPU alone takes it
    "tf32": ("classes", lambda search, record: record.arguments.kept["tf32"], False),
    "precision": ("classes", lambda search, record: record.arguments.kept["precision"], "full"),
    "memory": ("classes", as_option(lambda options: options.memory), "1MB"),
    "workers": ("classes", as_option(lambda options: options.workers), 1),
    "checkpoint_seconds": ("classes", as_option(lambda options: options.checkpoint_seconds), 7),
    "keep_predictions": ("classes", as_option(lambda options: options.keep_predictions), False),
    "ensemble": ("classes", lambda search, record: search.final_model["ensemble"], True),
    "intervals": ("numbers", lambda search, record: search.final_model["intervals"], True),
    "interval": ("population", as_option(lambda options: options.method.interval), (2, 3)),
    "fraction": ("population", as_option(lambda options: options.method.fraction), 0.5),
    "factors": ("population", as_option(lambda options: options.method.factors), (0.5, 2.0)),
    "resample": ("population", as_option(lambda options: options.method.resample), 0.1),
    "explore": ("population", as_option(lambda options: options.method.explore), False),
    "burn_in": ("population", as_option(lambda options: options.method.burn_in), 2),
    "calibrate": ("classes", lambda search, record: search.final_model["calibrate"], True),
    "compare_default": (
        "classes",
        lambda search, record: search.final_model["compare_default"],
        False,
    ),
}

# Options that are stored as trials: the parameters that the trials of the study have.
TRIALS = {"include": ("classes", {"lr": 0.5}), "warm_start": ("numbers", {"module__hidden": 3})}

NOT_STORED = {
    "help": "prints and ends",
    "study": "is the place of the study itself",
    "timeout": "is for one run: each has the time that it was given",
    "profile": "is a text about one run",
    "dry_run": "writes no study",
    "json": "is the form of what one run prints",
    "config_file": "gives other options",
    "preset": "gives other options",
    "verbose": "is what one run prints",
    "ray": "is stored as workers; tests/integrations/test_ray_workers.py resumes such a search",
    "sampler": "is an object of Optuna: resume says that it is missing, and the same command resumes",
    "config": "is the only trial of train, which is stored as a trial",
}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Run the commands; return the folder."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "net.py").write_text(NET)
        columns = {"site": [f"s{i % 7}" for i in range(40)], "z": [i % 4 for i in range(40)]}
        price = [100.0 + i + 0.5 * (i % 3) for i in range(40)]
        write_table(folder / "bugs.csv", **columns, kind=kinds(), price=price)
        earlier = (
            "--target price --model net.py:Net --space module__hidden=2,3 --cv 2 --trials 2 "
            "--epochs 1"
        )
        for name, options in {"earlier": earlier, **COMMANDS}.items():
            code, _, err = run("tune", "bugs.csv", *options.split(), "--out", name, "-q")
            assert code == 0, err
        yield folder


def test_each_option_of_the_commands_has_a_place_in_the_study(studies, monkeypatch):
    monkeypatch.chdir(studies)
    commands = make_parser().commands
    names = {action.dest for name in ("tune", "train") for action in commands[name]._actions}
    assert names == {*STORED, *TRIALS, *NOT_STORED}
    resumed = {name: options_now(studies / name / "study.db") for name in COMMANDS}
    records = {name: gputune.Study.open(studies / name / "study.db").record for name in COMMANDS}
    read = {
        name: place(resumed[command], records[command])
        for name, (command, place, _) in STORED.items()
    }
    assert read == {name: expected for name, (_, _, expected) in STORED.items()}
    for name, (command, params) in TRIALS.items():
        trials = gputune.Study.open(studies / command / "study.db").trials
        assert any(params.items() <= trial.params.items() for trial in trials), name


@pytest.mark.parametrize(
    ("target", "options"),
    [
        pytest.param("kind", ["--ensemble"], marks=pytest.mark.long),
        ("kind", ["--calibrate"]),
        pytest.param("price", ["--intervals"], marks=pytest.mark.long),
        ("price", ["--ensemble", "--intervals"]),
    ],
)
def test_a_search_killed_before_its_first_model_ends_with_the_same_model(
    tmp_path, monkeypatch, target, options
):
    monkeypatch.chdir(tmp_path)
    price = [100.0 + i + 0.5 * (i % 3) for i in range(40)]
    table = write_table(tmp_path / "bugs.csv", kind=kinds(), price=price)
    whole = output("tune", table, "--target", target, *SMALL, *options, "--out", "whole")
    shutil.copytree("whole", "killed")
    shutil.rmtree("killed/model")
    resumed = output("resume", "killed")
    ending = [text.partition("Trials ")[2].partition("\n")[2] for text in (whole, resumed)]
    assert ending[0].replace("whole", "killed") == ending[1]
    descriptions = [
        json.loads((tmp_path / name / "model" / "model.json").read_text())
        for name in ("whole", "killed")
    ]
    assert descriptions[0] == descriptions[1]
    models = [gputune.load_model(f"{name}/model") for name in ("whole", "killed")]
    predict = "predict_proba" if target == "kind" else "predict"
    np.testing.assert_array_equal(*(getattr(model, predict)(table) for model in models))
    if "--intervals" in options:
        np.testing.assert_array_equal(*(model.predict_interval(table, 0.8) for model in models))


def test_what_a_resumed_search_is_given_is_stored_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = write_table(tmp_path / "bugs.csv", kind=kinds())
    output("tune", table, "--target", "kind", *SMALL, "--out", "out")
    output("resume", "out", "--calibrate", "--patience-trials", "40", "--target-score", "0.9")
    search = options_now(tmp_path / "out" / "study.db")
    assert search.final_model == {"ensemble": False, "intervals": False, "calibrate": True}
    assert (search.options.search.patience_trials, search.options.search.target_score) == (40, 0.9)
    output("resume", "out")
    assert options_now(tmp_path / "out" / "study.db").final_model == search.final_model
    output("tune", table, "--target", "kind", *SMALL, "--out", "out")  # which asks for none of them
    search = options_now(tmp_path / "out" / "study.db")
    assert not any(search.final_model.values())
    assert (search.options.search.patience_trials, search.options.search.target_score) == (
        None,
        None,
    )
