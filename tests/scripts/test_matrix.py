"""scripts/matrix.py: how it counts tests, and how a row comes into the page."""

import pytest

DOTS = "..F.s..E [ 88%]\n. [100%]\n"


@pytest.mark.parametrize(
    "output, says",
    [
        ("=== 5 passed, 1 skipped in 3 s ===", "5 passed"),
        ("=== 1 failed, 5 passed, 2 errors in 3 s ===", "5 passed, 3 failed"),
        (DOTS, "6 passed, 2 failed"),
    ],
)
def test_tests_are_counted(script, output, says):
    assert script("matrix").result(output) == says


def test_a_row_takes_the_place_of_the_one_of_its_name_and_others_stay(script, monkeypatch, tmp_path):
    matrix = script("matrix")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "supported.md")
    matrix.PAGE.write_text(f"# Page\n\n{matrix.HEAD}\n|---|\n")
    for name, tests in (("newest", "1 passed"), ("floors", "2 passed"), ("newest", "3 passed")):
        matrix.write(name, matrix.line(name, "3.13", tests))
    lines = matrix.PAGE.read_text().splitlines()
    assert lines[:3] == ["# Page", "", matrix.HEAD]
    assert [line.split(" | ")[:3] for line in lines[4:]] == [
        ["| floors", "3.13", "2 passed"], ["| newest", "3.13", "3 passed"],
    ]  # fmt: skip


def test_a_python_that_is_not_there_is_a_row_that_says_so(script, monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    row = script("matrix").tried("newest", tmp_path / "newest")
    assert "not run: there is no python3.13 here" in row and row.count("|") == 10
