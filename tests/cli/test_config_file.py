"""Options of a TOML file: the same as typed ones, and errors that name the file and the key."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

from command_line import FAST, kinds, output, refusal, write_table
from gputune.cli.arguments import make_parser
from gputune.cli.inputs import add_config


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "bugs.csv", kind=kinds())
    return tmp_path / "search.toml"


def parsed(*words):
    return make_parser().parse_args(list(words), Namespace(typed=list(words)))


@pytest.mark.parametrize(
    ("text", "typed"),
    [
        ("trials = 3\nmax_epochs = 4\nrandom-state = 5", "--trials 3 --epochs 4 --seed 5"),
        ('target = "kind"\ncv = 3\ntimeout = 60', "--target kind --cv 3 --timeout 60"),
        (
            'cv = "time:3"\nout = "there"\nworkers = "auto"',
            "--cv time:3 --out there --workers auto",
        ),
        ('scoring = ["accuracy", "f1"]\ndrop = ["a", "b"]', "--scoring accuracy,f1 --drop a,b"),
        ('scoring = "f1"\ndrop = "a,b"', "--scoring f1 --drop a,b"),
        ('[space]\nlr = "1e-4..1e-1:log"\nwidth = [8, 16]', "--space lr=1e-4..1e-1:log width=8,16"),
        ('space = "realmlp"', "--space realmlp"),
        ('space = ["lr=0.1", "width=8"]', "--space lr=0.1 width=8"),
        (
            "[space]\nmodule__flag = [true, false]\nwidth = [[8, 4], 8]\ndepth = 2",
            "--space module__flag=true,false width=(8,4),8 depth=2",
        ),
        ('[kinds]\nzip = "category"', "--kind zip=category"),
        (
            "[[include]]\nlr = 0.1\nwidth = 8\n[[include]]\nlr = 0.2",
            "--include lr=0.1 width=8 --include lr=0.2",
        ),
        ("include_default = false\nno-predictions = true", "--no-default --no-predictions"),
        ("no-default = false\nkeep_predictions = true", "--include-default --keep-predictions"),
        (
            "quiet = true\nensemble = true\ncompare_default = false",
            "-q --ensemble --no-compare-default",
        ),
        (
            'method = "halving"\nfactor = 2\nmin_epochs = 1',
            "--method halving --factor 2 --min-epochs 1",
        ),
        ('method = "halving"\nrungs = [1, 3]\nkeep = 2', "--method halving --rungs 1,3 --keep 2"),
    ],
)
def test_a_file_means_the_same_as_flags(config, text, typed):
    config.write_text(text)
    arguments = parsed("tune", "FILE", "--config", "search.toml")
    add_config(arguments)
    expected = vars(parsed("tune", "FILE", *typed.split()))
    assert {**vars(arguments), "config_file": None, "typed": None} == {**expected, "typed": None}


def test_flags_win_over_the_file(config):
    config.write_text("trials = 3\nepochs = 4\nensemble = true\n[space]\nlr = 0.1\n")
    words = ["tune", "--config", "search.toml", "--trials", "5", "--space", "width=8", "FILE"]
    arguments = parsed(*words)
    add_config(arguments)
    assert (arguments.n_trials, arguments.max_epochs, arguments.space) == (5, 4, ["width=8"])
    assert arguments.ensemble is True and arguments.verbose == 1


def test_a_training_reads_its_configuration_from_the_file(config):
    config.write_text("epochs = 4\n[set]\nlr = 0.1\nwidth = 8\n")
    arguments = parsed("train", "FILE", "--config", "search.toml")
    add_config(arguments)
    assert (arguments.config, arguments.max_epochs) == (["lr=0.1", "width=8"], 4)


def test_a_search_with_a_file(config):
    config.write_text('target = "kind"\ntrials = 2\nepochs = 2\ncv = 2\nworkers = 1\n')
    text = output("tune", "bugs.csv", "--config", "search.toml", "--trials", "3")
    assert "3 trials x 2 folds x 2 epochs" in text


def test_the_file_of_the_page_is_read(config):
    page = (Path(__file__).parents[2] / "docs" / "tune-a-table.md").read_text()
    config.write_text(re.search(r"```toml\n(.*?)```", page, re.S)[1])
    arguments = parsed("tune", "FILE", "--config", "search.toml")
    add_config(arguments)
    assert arguments.space == ["lr=1e-4..1e-1:log", "width=64,128"]
    assert (arguments.target, arguments.n_trials, arguments.include_default) == (
        "price",
        100,
        False,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "trails = 3",
            "search.toml: trails is not an option of gputune tune. Did you mean 'trials'?",
        ),
        (
            "n_trails = 3",
            "search.toml: n_trails is not an option of gputune tune. Did you mean 'n-trials'?",
        ),
        ("qqqqq = 3", "search.toml: qqqqq is not an option of gputune tune. Remove it."),
        ('config = "a.toml"', "search.toml: config is not an option of gputune tune."),
        ('trials = "many"', "search.toml: trials must be a number, got 'many'."),
        ("trials = 2.5", "search.toml: trials must be a whole number of at least 0, got 2.5."),
        ("epochs = 0", "search.toml: epochs must be a whole number of at least 1, got 0."),
        ("epochs = true", "search.toml: epochs must be a number, got True."),
        (
            "workers = 0",
            "search.toml: workers must be a whole number of at least 1, or 'auto', got 0.",
        ),
        ("target = [1]", "search.toml: target must be text or a number, got [1]."),
        ("drop = [1]", "search.toml: drop must be a name or a list of names, got [1]."),
        ("space = 3", "search.toml: space must be a table, a list of texts or a text, got 3."),
        ("include = 3", "search.toml: include must be a table or a list of tables, got 3."),
        ("[space]\nlr = 2020-01-01", "search.toml: space.lr must be text, a number, true, false"),
        ("ensemble = 1", "search.toml: ensemble must be true or false, got 1."),
        ('method = "halvin"', "search.toml: method must be one of 'random', 'halving', "),
        ('method = "halvin"', "got 'halvin'. Did you mean 'halving'?"),
        (
            "trials = 3\ncv = = 3",
            "--config must be a TOML file, but search.toml: Invalid value (at line 2,",
        ),
        ("trials = 3\ntrials = 4\n", "must be a TOML file, but search.toml: Cannot overwrite"),
        (
            "trials = 3\nn_trials = 4",
            "search.toml: n_trials is the same option as trials. Remove one.",
        ),
    ],
)
def test_errors_name_the_file_and_the_key(config, text, words):
    config.write_text(text)
    assert words in refusal("tune", "bugs.csv", "--target", "kind", "--config", "search.toml")


def test_a_value_that_only_the_search_refuses_names_the_file(config):
    config.write_text("[space]\nlr = [-1.0]")
    words = ["tune", "bugs.csv", "--target", "kind", "--config", "search.toml"]
    assert refusal(*words).startswith("gputune: error: search.toml: --space lr must be a finite")
    assert "search.toml" not in refusal(*words, "--space", "lr=-1")


def test_files_that_cannot_be_read(config):
    words = ["tune", "bugs.csv", "--target", "kind", *FAST, "--config"]
    assert "'nowhere.toml'" in refusal(*words, "nowhere.toml")
    assert refusal(*words, ".").startswith("gputune: error: ")
    config.write_bytes(b"\xff\xfe")
    assert "--config must be a TOML file in UTF-8, got 'search.toml'" in refusal(
        *words, "search.toml"
    )
    config.write_bytes(b"#" * ((1 << 20) + 1))
    assert "--config must be a TOML file of at most 1 MiB" in refusal(*words, "search.toml")
