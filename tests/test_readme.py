"""The README's code runs, in order, in one session, and prints as many lines as it shows."""

import os
import re
import shlex
from pathlib import Path

import pytest

from gputune.cli.main import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "readme"}
    blocks = [(kind, text) for kind, text in BLOCKS if kind in ("python", "text")]
    assert [kind for kind, _ in blocks].count("python") >= 2
    for (kind, code), (next_kind, text) in zip(blocks, [*blocks[1:], ("", "")]):
        if kind == "text":
            continue
        expected = text if next_kind == "text" else ""
        exec(compile(code, "README.md", "exec"), session)
        printed = capsys.readouterr().out
        assert printed.count("\n") == expected.count("\n"), printed
        assert printed.split("(")[0] == expected.split("(")[0]


def test_the_console_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (console,) = (text for kind, text in BLOCKS if kind == "console")
    command, shown = console.split("\n", 1)
    assert command.startswith("$ gputune ")
    assert main(shlex.split(command.removeprefix("$ gputune "))) == 0
    printed = capsys.readouterr().out
    for line, expected in zip(printed.splitlines()[:5], shown.splitlines()[:5]):
        assert line == expected


def test_what_the_readme_names_exists():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", TEXT):
        page, _, heading = path.partition("#")
        assert (ROOT / page).exists(), path
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.M) if heading else []
        assert not heading or heading in [words.lower().replace(" ", "-") for words in headings], (
            path
        )
    for path in re.findall(r"`((?:gputune|models|tests|scripts)/[\w./]*)`", TEXT):
        assert (ROOT / path).exists(), path


def test_the_index_lists_every_page():
    listed = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text()))
    for pages in ("docs/**/*.md", "scripts/examples/*.ipynb"):
        for page in ROOT.glob(pages):
            path = os.path.relpath(page, ROOT / "docs")
            assert path in listed or path == "index.md", f"docs/index.md does not list {path}"
    assert "docs/index.md" in TEXT


def test_the_design_names_every_script():
    design = (ROOT / "docs" / "design.md").read_text()
    named = {line for line in design.splitlines() if line.startswith("| `scripts/` |")}.pop()
    scripts = ROOT / "scripts"
    files = [
        path for folder in ("", "examples", "reproduce") for path in (scripts / folder).glob("*.py")
    ]
    names = [str(path.relative_to(scripts)) for path in files] + [
        p.parent.name for p in scripts.glob("*/__main__.py")
    ]
    parts = re.compile(r"reproduce/baydin2018_\w+")  # imported by the script of that name
    assert [name for name in names if f"`{name}`" not in named and not parts.match(name)] == []


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/docs", "scripts/test", ".ci/run"])
def test_shell_scripts_can_be_started(script):
    assert (ROOT / script).stat().st_mode & 0o111
    assert (ROOT / script).read_text().startswith("#!/bin/sh\n")
