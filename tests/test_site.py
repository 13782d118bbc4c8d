"""The documentation site: what its reference lists. ``./scripts/docs`` builds it."""

import importlib.util
import re
import signal
from importlib import import_module
from pathlib import Path

import pytest

from gputune.cli import main
from gputune.cli.arguments import make_parser
from gputune.cli.commands import COMMANDS
from gputune.cli.help import flag_words
from gputune.ground import errors
from gputune.study import database, model_files
from gputune.study.rows import STATES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = (
    "gputune",
    "gputune.callbacks",
    "gputune.models",
    "gputune.optim",
    "gputune.sklearn",
)
DIRECTIVE = re.compile(r"^\.\. auto(?:class|exception|function):: (\S+)$", re.MULTILINE)


def script(name, folder="scripts"):
    """Return a script as a module."""
    path = ROOT / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def documented():
    """Return the names that the reference documents."""
    names = []
    for page in (DOCS / "reference").glob("*.md"):
        names += DIRECTIVE.findall(page.read_text())
    return names


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_has_every_public_name_once(module, documented):
    public = [f"{module}.{name}" for name in import_module(module).__all__]
    if module == "gputune":
        public.remove("gputune.__version__")  # explained in a sentence
    of_module = [name for name in documented if name.rpartition(".")[0] == module]
    assert sorted(of_module) == sorted(public)


def test_tables_of_the_reference_are_those_of_the_code():
    for page, text in script("reference_tables").pages().items():
        assert (DOCS / "reference" / page).read_text() == text, "run scripts/reference_tables.py"


def first_column(page):
    """Return the code words in the first column of each table of a page of the reference."""
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "reference" / page).read_text(), re.MULTILINE)
    words = []
    for row in rows:
        words += re.findall(r"`([^`=]+)", row)
    return words


def test_the_page_of_states_has_every_state_and_origin():
    words = first_column("trial-states.md")
    assert sorted(words[:5]) == sorted([*STATES, "waiting"])
    source = "".join(path.read_text() for path in (ROOT / "gputune").rglob("*.py"))
    for origin in words[5:9]:
        assert f'"{origin}"' in source


def test_the_page_of_variables_has_every_variable_that_the_code_reads():
    words = first_column("environment-variables.md")
    read = set()
    for path in (ROOT / "gputune").rglob("*.py"):
        read |= set(re.findall(r"""environ\b.{0,12}["'(]([A-Z][A-Z_]+)["']""", path.read_text()))
    assert "CC" in read
    assert read | {errors.STRICT} <= set(words)


def test_the_page_of_files_has_tables_and_versions():
    words = first_column("files.md")
    assert {*database.TABLES, "outputs"} <= set(words)
    assert {model_files.DESCRIPTION, model_files.TENSORS} <= set(words)
    text = (DOCS / "reference" / "files.md").read_text()
    assert f"SQLite database of format version {database.FORMAT_VERSION}." in text
    assert f"a folder of format version {model_files.FORMAT_VERSION}:" in text


def test_the_page_of_errors_has_every_exit_code():
    text = (DOCS / "reference" / "errors.md").read_text()
    codes = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    after_sigusr1 = 128 + signal.SIGUSR1
    exits = (
        main.DONE,
        main.FAILED,
        main.BAD_INPUT,
        main.INTERRUPTED,
        after_sigusr1,
        main.TERMINATED,
    )
    assert [int(number) for number in codes] == list(exits)


@pytest.mark.parametrize(
    "name, entry",
    [
        ("torch.nn.Module", "torch.nn.Module class generated/torch.nn.Module.html\n"),
        ("torch.optim", "torch.optim mod optim.html\n"),
        ("torch.utils.data.Dataset", "torch.utils.data.Dataset class data.html\n"),
        ("torch.nn.Missing", None),  # cannot be imported
        ("torch.onnx", None),  # its page is not known
    ],
)
def test_an_inventory_has_the_page_of_a_name(name, entry):
    entries = list(script("inventories").entries("torch", [name]))
    assert entries == ([] if entry is None else [entry])


def test_inventories_are_files_that_sphinx_reads():
    libraries = script("inventories")._PAGES
    for library in libraries:
        head, *_ = (DOCS / "inventories" / f"{library}.inv").read_text().splitlines()
        assert head == "# Sphinx inventory version 1"


def test_the_page_of_the_command_line_has_every_command_and_option():
    text = "\n".join(script("command_line", "docs/extensions").command_lines())
    for name, command in COMMANDS.items():
        _, section = text.split(f"## gputune {name}\n")
        section, *_ = section.split("\n## ")
        for rules in command.groups.values():
            for rule in rules.values():
                assert f"`{flag_words(rule)}`" in section
        for metavar, _ in command.places.values():
            assert f"`{metavar}`" in section
    assert make_parser().commands.keys() == COMMANDS.keys()
