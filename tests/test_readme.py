"""The README's code runs, in order, in one session, and prints as many lines as it shows."""

import json
import os
import re
import runpy
import shlex
from pathlib import Path

import pytest

import gputune
from gputune.cli.main import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.S)


def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    session = {"__name__": "readme"}
    blocks = [(kind, text) for kind, text in BLOCKS if kind in ("python", "text")]
    assert [kind for kind, _ in blocks].count("python") >= 1
    for (kind, code), (next_kind, text) in zip(blocks, [*blocks[1:], ("", "")]):
        if kind == "text":
            continue
        expected = text if next_kind == "text" else ""
        exec(compile(code, "README.md", "exec"), session)
        printed = capsys.readouterr().out
        assert printed.count("\n") == expected.count("\n"), printed
        assert printed.split("(")[0] == expected.split("(")[0]
        numbers = [float(number) for number in re.findall(r"\b0\.\d{4}\b", printed)]
        shown = [float(number) for number in re.findall(r"\b0\.\d{4}\b", expected)]
        assert numbers == pytest.approx(shown, abs=0.02)


def test_the_console_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (console,) = (text for kind, text in BLOCKS if kind == "console")
    command, shown = console.split("\n", 1)
    assert command.startswith("$ gputune ")
    assert main(shlex.split(command.removeprefix("$ gputune "))) == 0
    printed = capsys.readouterr().out
    for line, expected in zip(printed.splitlines()[:5], shown.splitlines()[:5]):
        assert line == expected


def test_the_commands_of_agents_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "AGENTS.md").read_text()
    assert text.count("\n") <= 60
    rows = [f"{i % 7},{i % 5},{3 * (i % 7) + i % 5}.5\n" for i in range(60)]
    for name in ("data", "more", "new"):
        (tmp_path / f"{name}.csv").write_text("area,rooms,price\n" + "".join(rows))
    (commands,) = re.findall(r"```sh\n(.*?)```", text, re.S)
    printed = {}
    for command in commands.splitlines():
        words = shlex.split(command, comments=True)
        if (
            words[1] == "export"
        ):  # takes 7 s to import torch.export; tests/integrations/test_export.py runs it
            continue
        assert main(words[1:]) == 0, command
        printed[" ".join(words)] = capsys.readouterr().out
    best = json.loads(printed["gputune best run --format json"])
    assert {"number", "params", "score", "fold_scores", "default"} <= set(best)
    assert {"improvement", "improvement_std_error"} <= set(best["default"])
    trials = json.loads(printed["gputune trials run --format json"])
    assert len(trials) == 16 and trials[0]["state"] == "complete"
    table = printed["gputune trials run --format csv"]
    assert {"number", "state", "score", "fold_0", "params_lr"} <= set(
        table.split("\n")[0].split(",")
    )
    scores = json.loads(printed["gputune evaluate run/model more.csv --format json"])
    assert scores["rows"] == 60 and scores["trained_share"] > 0 and "r2" in scores["scores"]
    info = gputune.load_model("run/model").info
    assert info["held_out_score"] > info["held_out_baseline"]["score"]
    assert main(["tune", "data.csv", "--target", "prize", "--out", "other"]) == 2


def test_the_citation_names_the_version():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {gputune.__version__}\n" in citation


@pytest.mark.parametrize("page", ["AGENTS.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_links_of_other_files_lead_somewhere(page):
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", (ROOT / page).read_text()):
        target, _, heading = path.partition("#")
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.M)
        anchors = [title.lower().replace(" ", "-") for title in headings]
        assert not heading or heading in anchors, path


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for path in re.findall(r"`((?:gputune|tests|docs|scripts)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    paths = [*ROOT.glob("gputune/**/*.py"), *ROOT.glob("tests/*.py"), ROOT / "pyproject.toml"]
    sources = "\n".join(path.read_text() for path in paths)
    for name in re.findall(r"`(_?[A-Za-z]\w*_\w+|[A-Z][a-z]+[A-Z]\w+)`", text):
        assert name == "OMP_NUM_THREADS" or re.search(rf"\b{name}\b", sources), name


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


def test_the_chart_shows_the_newest_measurement():
    names = re.findall(r'(?:srcset|src)="(docs/speed-\w+\.svg)"', TEXT)
    assert names == ["docs/speed-dark.svg", "docs/speed-light.svg"]
    script = runpy.run_path(str(ROOT / "scripts" / "benchmark" / "chart.py"))
    for name, theme in script["THEMES"].items():
        drawn = script["chart"](theme)
        assert (ROOT / "docs" / f"speed-{name}.svg").read_text() == drawn
    seconds, _ = script["measured"]()
    for engine in script["LABELS"]:
        assert script["seconds_text"](seconds[engine]) in TEXT


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
