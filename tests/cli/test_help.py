"""The help: short for -h, complete for --help, the same from ``gputune help``; color only on a
terminal."""

import io
import re
from pathlib import Path

import pytest

from command_line import refusal, run
from gputune.cli.arguments import aliases, make_parser
from gputune.cli.commands import COMMANDS, Flag
from gputune.cli.help import SECTIONS, Style
from gputune.cli.main import main


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(*arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert max(map(len, out.split("\n"))) <= 80
    return out


def test_the_short_help_of_tune_fits_on_a_screen():
    text = help_of("tune", "-h")
    assert text.count("\n") <= 34
    assert "\nUsage: gputune tune [OPTIONS] FILE\n" in text
    options = re.findall(r"^  (?:-\w, )?--[\w-]+", text, re.M)
    assert 14 <= len(options) <= 18
    examples = re.findall(r"^  gputune tune ", text, re.M)
    assert len(examples) == 5


def entries(text):
    """Return the options of a long help: (flags, text)."""
    body = text.partition("\n\nHelp:")[0]
    found = re.findall(r"^  (-.*)\n((?: {10}.*(?:\n|$))+)", body, re.M)
    return [(flags, " ".join(words.split())) for flags, words in found]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_long_help_explains_each_option_with_its_default(command):
    text = help_of(command, "--help")
    options = entries(text)
    rules = {}
    for group in COMMANDS[command].groups.values():
        rules |= {rule.name: rule for rule in group.values()}
    assert len(options) == len(rules)
    for flags, words in options:
        rule = rules[re.search(r"--[\w-]+", flags)[0]]
        required = isinstance(rule, Flag) and rule.required
        assert ("[required]" if required else "[default: ") in words
        assert words[0].isupper() or words.startswith("scikit-learn")
        values = rule.choices or rule.values
        if values:
            assert f"[possible values: {', '.join(values)}]" in words
        assert rule.metavar == "" or re.fullmatch(r"<[^ ]+>(\.\.\.)?|\[<.*>\]", rule.metavar)
    assert help_of("help", command) == text


def test_the_options_of_tune_are_in_groups():
    text = help_of("tune", "--help")
    titles = re.findall(r"^(\w[\w ]+):$", text, re.M)
    groups = ["Data", "Model", "Search", "Early stopping", "Hypergradients", "Compute", "Output"]
    assert [title for title in titles if title in groups] == groups


def test_the_commands_are_in_sections():
    text = help_of("--help")
    for title, names in SECTIONS.items():
        section = text.partition(f"\n\n{title}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"^  (\w+)", section, re.M) == list(names)
    assert sorted(name for names in SECTIONS.values() for name in names) == sorted(COMMANDS)
    assert help_of("help") == text
    assert "gputune tune sklearn:digits" in text and "Examples" not in help_of("-h")


def test_without_arguments_the_short_help_is_an_error():
    code, out, err = run()
    assert (code, out) == (2, "")
    assert err == help_of("-h")


def test_help_on_an_unknown_command():
    expected = (
        "gputune: error: COMMAND must be a command of gputune, got 'tun'. Did you mean 'tune'?\n"
    )
    assert refusal("help", "tun") == expected


def test_no_alias_is_in_the_help_or_is_a_flag():
    for name, command in COMMANDS.items():
        text = help_of(name, "--help")
        own = {rule.name for group in command.groups.values() for rule in group.values()}
        assert not own & aliases(command).keys()
        for alias in aliases(command):
            assert not re.search(rf"{alias}\b(?!-)", text)


def test_the_page_lists_each_alias():
    page = (Path(__file__).parents[2] / "docs" / "tune-a-table.md").read_text()
    table = page.partition("| Also accepted |\n|---|---|---|\n")[2].partition("\n\n")[0]
    listed = {}
    for _, flag, alias in re.findall(r"^\| (.*) \| `(--[\w-]+).* \| `(--[\w-]+)", table, re.M):
        listed[alias] = flag
    assert listed == aliases(COMMANDS["tune"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "has_color"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_color_is_for_a_terminal_that_wants_it(monkeypatch, environment, has_color):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Style.of(Terminal()).has_color is has_color
    assert not Style.of(io.StringIO()).has_color
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    assert main(["tune", "-h"]) == 0
    assert ("\x1b[1mUsage:\x1b[0m" in screen.getvalue()) is has_color
    assert re.sub(r"\x1b\[\d*m", "", screen.getvalue()) == make_parser().commands[
        "tune"
    ].format_help(full=False)


def test_errors_warnings_and_labels_have_a_color(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    assert main(["best", "no\x1b[7mwhere"]) == 2
    text = screen.getvalue()
    assert text.startswith("gputune: \x1b[31merror:\x1b[0m ") and text.count("\x1b") == 2
    style = Style(True)
    labeled = style.labeled("Data     x\nWarning  y\nDatabase z\nNext     Data \nother    Data x")
    assert labeled == (
        "\x1b[1mData\x1b[0m     x\n\x1b[33mWarning\x1b[0m  y\nDatabase z\n\x1b[1mNext\x1b[0m     "
        "Data \nother    Data x"
    )
    assert Style().labeled("Data     x") == "Data     x"
