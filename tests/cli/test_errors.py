"""Bad input ends with exit code 2 and one line that names the argument, the value and the
remedy."""

import shlex

import numpy as np
import pytest

from command_line import FAST, kinds, refusal, run, searched, write_table


@pytest.fixture
def bugs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_table(tmp_path / "bugs.csv", kind=kinds())


def refused(*arguments, words=(), lines=1):
    """Run a command that must be refused; its message must have the words."""
    err = refusal(*arguments)
    assert (
        err.startswith("gputune: error: ") and "Traceback" not in err and err.count("\n") == lines
    )
    assert [word for word in words if word not in err] == [], err


def refused_tune(table, *options, words, lines=1):
    refused("tune", table, "--target", "kind", *FAST, *options, words=words, lines=lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bug.csv", "--target", "kind"], ["'bug.csv'; did you mean 'bugs.csv'?"]),
        (["ants.csv", "--target", "kind"], ["'ants.csv'", "CSV"]),
        (["bugs.csv"], ["--target is missing", "'a', 'b', 'c', 'kind'", "--target kind"]),
        (["bugs.npz"], ["--target is missing", "'image', 'label'", "--target label"]),
        (["bugs.npy"], ["--target must be the path of a .npy file", "row of 'bugs.npy'"]),
        (["bugs.csv", "--target", "knd"], ["--target", "got 'knd'", "Did you mean 'kind'?"]),
        (
            ["bugs.csv", "--target", "kind", "--groups", "site"],
            ["--groups", "got 'site'", "'a', 'b'"],
        ),
    ],
)
def test_a_file_or_a_column_that_there_is_not(bugs, arguments, words):
    image = np.zeros((40, 3))
    np.savez("bugs.npz", image=image, label=np.arange(40) % 2)
    np.save("bugs.npy", image)
    refused("tune", *arguments, *FAST, words=words)


def test_missing_answers_are_reported_with_their_line(bugs):
    write_table(bugs, kind=[*kinds(38), "", "NA"])
    refused_tune(bugs, words=["kind has 2 missing values", "line 40", "leave those rows out"])


def test_a_file_without_a_header(bugs):
    bugs.write_text("5.1,3.5,ant\n4.9,3.0,bee\n")
    refused_tune(bugs, words=["got '5.1', '3.5'", "Write a line with the column names above"])
    bugs.write_text("2019,2020,kind\n" + "5,1.5,ant\n4,2,bee\n" * 20)  # years are names
    assert run("tune", bugs, "--target", "kind", *FAST)[0] == 0


@pytest.mark.parametrize(
    ("command", "value", "options", "words"),
    [
        ("tune", 1e300, FAST, "price has 1e+300 in row 35, which is so extreme"),
        (
            "tune",
            -5,
            [*FAST, "--target-transform", "log"],
            "--target-transform log needs numbers above 0 in price",
        ),
        (
            "train",
            -5,
            ["--epochs", "2", "--cv", "2", "--target-transform", "log"],
            "but 1 of 40 are not (the smallest is -5)",
        ),
    ],
)
def test_a_target_in_a_row_that_is_held_out(bugs, command, value, options, words):
    write_table(bugs, price=[value if i == 35 else 0.5 + i for i in range(40)])
    refused(command, bugs, "--target", "price", *options, "--test-size", "0.9", words=[words])


def test_unknown_format(bugs):
    refused_tune(bugs.rename("bugs.xls"), words=["bugs.xls", ".csv", "Convert it"])


def test_what_a_module_says_is_not_written_in_flags(bugs):
    bugs.with_name("net.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n"
        "    def __init__(self, n_features, n_outputs): super().__init__(n_features, n_outputs)\n"
        "    def forward(self, x): raise RuntimeError('given groups=1, study=2 and max_epochs=3')\n"
    )
    words = [
        "The forward pass of Net raised RuntimeError: given groups=1, study=2 and "
        "max_epochs=3 (net.py, line 4: "
    ]
    refused_tune(bugs, "--model", "net.py:Net", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--trials many", ["--trials", "whole number of at least 0", "'many'"]),
        ("--trials -1", ["--trials", "whole number of at least 0", "'-1'"]),
        ("--epochs 0", ["--epochs", "whole number of at least 1", "'0'"]),
        ("--workers -1", ["--workers: must be a whole number of at least 1, or 'auto', got '-1'"]),
        ("--epochs 1.5", ["--epochs", "whole number", "'1.5'"]),
        ("--seed x", ["--seed", "whole number", "'x'"]),
        ("--workers some", ["--workers", "whole number", "'some'", "'auto'"]),
        ("--test-size 'a fifth'", ["--test-size", "a number such as", "'a fifth'"]),
        ("--method halvng", ["--method", "'halvng'", ". Did you mean 'halving'?"]),
        ("--epoch 3", ["--epoch 3", ". Did you mean '--epochs'?"]),
    ],
)
def test_what_the_parser_refuses(bugs, options, words):
    refused_tune(bugs, *shlex.split(options), words=[*words, "gputune tune --help"], lines=2)


def test_only_a_preset_chooses_the_model(bugs):
    refused_tune(bugs, "--model", "auto", words=["--model", "'auto'"])


def test_an_unknown_backend_is_refused_with_all_names(bugs):
    words = ["--backend must be one of", "'recorded'", "'eagr'", ". Did you mean 'eager'?"]
    refused_tune(bugs, "--backend", "eagr", words=words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--optimizer adma", ["--optimizer", "'adma'", ". Did you mean 'adam'?"]),
        ("--model mlpp", ["--model", "'mlpp'", ". Did you mean 'mlp'?"]),
        ("--scoring acuracy", ["--scoring", "'acuracy'", ". Did you mean 'accuracy'?"]),
        ("--scoring auc", ["--scoring", "'auc'", ". Did you mean 'roc_auc'?"]),
        ("--scoring MAE", ["--scoring", ". Did you mean 'neg_mean_absolute_error'?"]),
        ("--scoring rmse", ["--scoring", ". Did you mean 'neg_root_mean_squared_error'?"]),
        ("--schedule cosin", ["--schedule", "'cosin'", ". Did you mean 'cosine'?"]),
        (
            "--model cnn --loss crossentropy",
            ["--loss", "'crossentropy'", ". Did you mean 'cross_entropy'?"],
        ),
        ("--space widht=8", ["'widht'", "Did you mean 'width'?"]),
        ("--space learning_rate=0.1", ["'learning_rate'", "Did you mean 'lr'?"]),
        ("--space lr=0", ["lr", "> 0", "got 0"]),
        ("--space lr=-0.1,0.1", ["lr", "> 0", "got -0.1"]),
        ("--space width=0", ["width", ">= 1", "got 0"]),
        ("--space width=0..8", ["width", ">= 1", "from 0 to 8"]),
        ("--space lr=fast", ["lr", "number", "'fast'", "Examples: "]),
        ("--space width=8.5", ["width", "integer", "8.5"]),
        ("--space width", ["--space must be KEY=SPEC, or one of mlp, realmlp, ", "'width'"]),
        ("--space dropout=1", ["dropout", "[0, 1)", "got 1"]),
        ("--space activation=relo", ["--space activation must", "Did you mean 'relu'?"]),
        ("--space optimizer=adaam", ["--space optimizer must", "Did you mean 'adam'?"]),
        ("--space module__hidden=8", ["module__hidden", "nn.Module class", "Leave it out"]),
        (
            "--space realmlp",
            [
                "--space realmlp needs --model realmlp, got --model mlp. Choose that model, or a "
                "space"
            ],
        ),
        ("--space lr=1 --space lr=2", ["'lr' twice", "Join"]),
        ("--test-size 1", ["--test-size must be a share", "got 1.0"]),
        (
            "--timeout 0",
            [
                "--timeout must be a number of seconds above 0, or a time such as '60s', '5m' or '1h30m', got '0'"
            ],
        ),
        ("--cv some", ["--cv", "time:5", "'some'"]),
        ("--cv 33", ["--cv must", "rows, 32, got 33"]),
        ("--cv 1", ["--cv", "at least 2", "'1'"]),
        ("--device cuda:99", ["--device", "'cuda:99'", "cpu"]),
        ("--device tpu", ["--device", "'tpu'", "cpu"]),
        ("--dtype float16", ["--dtype", "'float16'", "float32"]),
        ("--memory much", ["--memory", "'much'", "8GB"]),
        ("--columns all", ["--columns", "'all'", "drop-constant"]),
        ("--numbers log", ["--numbers", "'log'", "quantile"]),
        ("--schedule step", ["--schedule", "'step'", "cosine"]),
        (
            "--target-transform lg",
            ["--target-transform must be 'log' or 'log1p', got 'lg'. Did you mean 'log'?"],
        ),
        ("--target a --target-transform log", ["--target-transform log needs", " Leave it out."]),
        ("--optimizer lamb", ["--optimizer", "'lamb'", "adamw"]),
        (
            "--scoring neg_loss",
            [
                "--scoring neg_loss needs a module that trains with a loss",
                ". Choose another --scoring.",
            ],
        ),
        ("--scoring r2", ["--scoring r2", "binary", "accuracy"]),
        ("--task ranking", ["--task", "'ranking'", "classification"]),
        ("--task regression", ["--task regression", "kind", "text", "Convert it"]),
        ("--model net.py:Net", ["--model", "net.py", "does not exist", "Check the path"]),
        (
            "--drop aa,b",
            [
                "--drop must name columns of the table, got 'aa'",
                "columns are 'a', 'b', 'c', 'kind'",
                "mean 'a'?",
            ],
        ),
        (
            "--drop kind",
            ["--drop must not name the target or the groups, got 'kind'"],
        ),
        (
            "--drop a,b,c",
            ["--drop must leave at least one column to predict from, got 'a', 'b', 'c'"],
        ),
        ("--kind d=number", ["--kind must name columns of the table, got 'd'"]),
        (
            "--category-copies aa",
            [
                "--category-copies must name columns from which the model predicts, got 'aa'",
                "Did you mean 'a'?",
            ],
        ),
        (
            "--kind c=number",
            [
                "--kind c=number does not fit the column 'c', which has '",
                "in row 0",
                "different kind",
            ],
        ),
        ("--kind c", ["--kind must be written like --kind zip=category, got 'c'"]),
        (
            "--kind c=text",
            ["--kind must be one of number, category, date for each column, got 'text'"],
        ),
        ("--class-weight ant", ["--class-weight left=5,stayed=1, or balanced, got 'ant'"]),
        (
            "--class-weight ant=many",
            ["--class-weight must have a number for each class", "got 'ant=many'"],
        ),
        ("--class-weight cat=2", ["--class-weight names the class 'cat'"]),
        (
            "--include lr=1,2",
            ["--include takes one value for each key, got 'lr=1,2'. Lists and ranges"],
        ),
        (
            "--include lr=1 lr=2",
            ["--include must name each key once, got 'lr' twice. Leave one out."],
        ),
        ("--include widht=3", ["error: --include must have only the keys", "mean 'width'?"]),
        ("--include lr=x", ["lr must be a finite number", "'lr=x'"]),
        ("--sampler tpe --method median", ["--sampler tpe needs --method random or halving"]),
        (
            "--method median --factor 2",
            ["--factor belongs to --method halving, got --method median"],
        ),
        (
            "--method tpe --factor 2",
            ["--factor belongs to --method halving", "write --method halving --sampler tpe."],
        ),
        (
            "--method halving --every 2",
            ["--every belongs to --method median, got --method halving"],
        ),
        ("--min-epochs 2", ["--min-epochs belongs to --method halving, got --method random"]),
        ("--segments 2", ["belongs to --method hypergradient, got --method random"]),
        ("--per-layer", ["belongs to --method hypergradient, got --method random"]),
        ("--descend-on lr,momentum", ["belongs to --method hypergradient, got --method random"]),
        (
            "--method hypergradient --descend-on width",
            ["some of lr, momentum, weight_decay, beta1, beta2"],
        ),
        (
            "--method hypergradient --descend-on momentum",
            ["for adamw, which trial 0 uses, got 'momentum'"],
        ),
    ],
)
def test_options_that_cannot_be(bugs, options, words):
    refused_tune(bugs, *options.split(), words=words)
    assert not bugs.with_name("gputune-out").exists()


def test_the_configuration_of_one_training_is_named_as_it_was_typed(bugs):
    refused(
        "train",
        bugs,
        "--target",
        "kind",
        "--set",
        "lr=1",
        "wdth=3",
        words=["error: --set must have only the keys"],
    )


def test_a_folder_that_cannot_be_written_without_a_loss(bugs):
    refused_tune(bugs, "--out", "bugs.csv", words=["--out 'bugs.csv'", "Name another folder"])
    folder = bugs.with_name("mine")
    (folder / "model").mkdir(parents=True)
    refused_tune(bugs, "--out", "mine", words=["--out 'mine'", "Name another folder"])
    assert [p.name for p in folder.rglob("*")] == ["model"]


def test_a_study_of_another_search(bugs):
    assert run("tune", bugs, "--target", "kind", *FAST)[0] == 0
    words = [
        "--out gputune-out holds a different search",
        "--seed (0 in the study, 1 now)",
        "--epochs (2 in the study, 3 now)",
    ]
    words += [
        "--schedule ('constant' in the study, 'cosine' now)",
        "--out OTHER",
        "options of the first command",
    ]
    refused_tune(bugs, *"--seed 1 --epochs 3 --schedule cosine".split(), words=words)
    assert run("best", "gputune-out")[0] == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return searched(tmp_path_factory.mktemp("model"))[1] / "model"


def test_a_search_of_classes_in_the_folder_of_a_search_of_numbers(tmp_path):
    prices = (np.arange(40) * 1.5).tolist()
    table = write_table(tmp_path / "t.csv", kind=kinds(), price=prices)
    options = ["--out", tmp_path / "o", "--trials", 1, "--epochs", 1, "--cv", 2]
    assert run("tune", table, "--target", "price", "--scoring", "r2", *options)[0] == 0
    message = refusal("tune", table, "--target", "kind", *options)
    assert "holds a different search" in message and "--scoring r2 does not fit" not in message


def test_predict_without_a_file_or_a_model(bugs, model):
    refused("predict", model, "none.csv", words=["'none.csv'"])
    refused("predict", "nowhere", bugs, words=["'nowhere'", "Check the path"])


def test_predict_does_not_write_over_its_input(bugs, model):
    before = bugs.read_text()
    refused(
        "predict",
        model,
        bugs,
        "--out",
        bugs,
        words=["--out", "must not be the file that is read", "another name"],
    )
    refused(
        "predict",
        model,
        bugs,
        "--out",
        bugs.parent,
        words=["--out", "is a folder", "name of a file"],
    )
    assert bugs.read_text() == before
    refused(
        "predict",
        model,
        bugs,
        "--out",
        "no/such/folder.csv",
        words=["--out", "'no/such' does not exist", "Create the folder"],
    )


@pytest.mark.parametrize("command", ["trials", "best"])
def test_no_study(bugs, command):
    refused(command, "nowhere", words=["no study file", "check the path", "'nowhere'"])
    refused(command, bugs.parent, words=["no study file", "study.db"])
    refused(command, bugs, words=["bugs.csv"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tun"], "Did you mean 'tune'?"),
        (["tune"], "FILE"),
        (["tune", "a.csv", "--targte", "x"], "--targte"),
        (["tune", "a.csv", "--tar", "x"], "--tar"),
        (["serch", "a.csv"], "'serch'"),
        (["trials", "x", "--format", "xml"], "'xml'"),
    ],
)
def test_usage(arguments, words):
    refused(*arguments, words=[words, "--help'"], lines=2)
