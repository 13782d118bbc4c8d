"""The completion scripts, run by their shells."""

import shutil
import subprocess

import pytest

from command_line import output, run
from gputune.cli.commands import COMMANDS, SHELLS

ASK = """
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_gputune
printf '%s\\n' "${COMPREPLY[@]}"
"""


def in_shell(shell, script, *words, **more):
    """Return what a script prints, in words."""
    command = [shell, *more.pop("options", ()), "-c", script, shell, *words]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, **more)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.split()


def needs(shell):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")


CASES = [
    (["tu"], ["tune"]),
    (["sta"], ["status"]),
    (["tune", "t.csv", "--epo"], ["--epochs"]),
    (["tune", "--compare"], ["--compare-default"]),
    (["tune", "--method", ""], ["random", "halving", "median", "pbt", "hypergradient", "tpe"]),
    (["tune", "--method", "ha"], ["halving"]),
    (["tune", "--model", ""], ["mlp", "logistic", "realmlp", "cnn", "gru"]),
    (["trials", "out", "--format", ""], ["table", "json", "csv"]),
    (["best", "out", "--format", ""], ["text", "json"]),
    (["completion", ""], list(SHELLS)),
    (["help", "ev"], ["evaluate"]),
]


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash_completes_commands_flags_and_values(words, expected):
    needs("bash")
    script = output("completion", "bash") + ASK
    assert in_shell("bash", script, "gputune", *words) == expected


def test_bash_registers_the_function_and_leaves_files_to_itself():
    needs("bash")
    script = output("completion", "bash")
    registered = in_shell("bash", f"{script}\ncomplete -p gputune")
    assert registered == "complete -o default -F _gputune gputune".split()
    assert in_shell("bash", script + ASK, "gputune", "tune", "t.c") == []
    assert in_shell("bash", script + ASK, "gputune", "") == [*COMMANDS, "--help", "--version"]


@pytest.mark.parametrize("name", COMMANDS)
def test_bash_completes_every_flag(name):
    needs("bash")
    script = output("completion", "bash") + ASK
    completed = set(in_shell("bash", script, "gputune", name, "--"))
    flags = {rule.name for rules in COMMANDS[name].groups.values() for rule in rules.values()}
    assert flags <= completed and "--help" in completed


ZSH = """
compdef() { :; }
compadd() { shift; print -l -- ${(M)@:#$words[CURRENT]*}; }
_files() { :; }
words=("$@")
CURRENT=$#
"""


@pytest.mark.parametrize(
    ("words", "expected"), [case for case in CASES if case[0][1:2] != ["--compare"]]
)
def test_zsh_completes_the_same(words, expected):
    needs("zsh")
    script = f"{ZSH}\n{output('completion', 'zsh')}\n_gputune"
    assert in_shell("zsh", script, "gputune", *words, options=["-f"]) == expected


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_fish_completes_the_same(words, expected, tmp_path):
    needs("fish")
    line = " ".join(["gputune", *words])
    script = f"{output('completion', 'fish')}\ncomplete -C '{line}'"
    ran = subprocess.run(
        ["fish", "--no-config", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    completed = {text.partition("\t")[0] for text in ran.stdout.splitlines()}
    # fish also offers words that hold the letters elsewhere
    assert {word for word in completed if word.startswith(words[-1])} == set(expected)


def test_an_unknown_shell_is_refused():
    code, out, err = run("completion", "fsh")
    assert (code, out) == (2, "")
    assert "Did you mean 'fish'?" in err
