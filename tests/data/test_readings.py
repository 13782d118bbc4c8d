"""A file and a DataFrame with equal values are read in the same way, or a note names the column and
a remedy.
"""

import pandas as pd
import polars as pl
import pytest

from command_line import FAST, kinds, refusal, run, write_table
from gputune.data.columns import fit_layout
from gputune.data.files import read_table
from gputune.data.source import read_source
from gputune.data.table import as_table
from gputune.ground.errors import PYTHON
from refused import refused

FRAME = pd.DataFrame({
    "zip": [f"{i % 3:05}" for i in range(60)],
    "region": [("NA", "EU", "AS")[i % 3] for i in range(60)],
    "pool": [("None", "small", "?")[i % 3] for i in range(60)],
    "day": [f"2020-01-{i % 28 + 1:02}" for i in range(60)],
    "n": [i % 7 for i in range(60)],
    "share": [f"{i % 5 / 8}" for i in range(60)],
    "y": [i % 2 for i in range(60)],
})  # fmt: skip


def notes_of(X, **options):
    return PYTHON.render(" ".join(fit_layout(read_source(X, "y", **options).X).notes))


@pytest.fixture
def path(tmp_path):
    FRAME.to_csv(tmp_path / "t.csv", index=False)
    return tmp_path / "t.csv"


def test_a_file_says_what_a_frame_would_keep(path):
    notes = notes_of(path)
    zeros = "leading zeros are lost, because all values are numbers. To keep them, set kinds="
    assert f"Column 'zip': {zeros}{{'zip': 'category'}}." in notes
    assert "Column 'region': 'NA' is read as a missing value." in notes
    assert "Column 'pool': 'None' is read as a missing value." in notes
    assert not any(f"'{name}'" in notes for name in ("n", "share", "day"))
    notes = notes_of(path, kinds={"zip": "category", "region": "category"})
    assert "zip" not in notes and "'NA'" not in notes


@pytest.mark.parametrize("n_levels", [60, 4, 202])
def test_the_advice_to_keep_zeros_is_given_only_where_it_keeps_the_column(tmp_path, n_levels):
    n_rows = 60 if n_levels < 202 else 240
    zips = [f"{i % n_levels:05}" for i in range(n_rows)]
    frame = pd.DataFrame({"n": range(n_rows), "zip": zips, "y": [0, 1] * (n_rows // 2)})
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = notes_of(tmp_path / "t.csv")
    assert "Column 'zip': leading zeros are lost, because all values are numbers." in notes
    is_left_out = "'zip': left out" in notes_of(tmp_path / "t.csv", kinds={"zip": "category"})
    assert is_left_out == (n_levels != 4)
    assert ("To keep them, set kinds={'zip': 'category'}." in notes) == (not is_left_out)


def test_a_frame_says_what_a_file_would_read(tmp_path):
    pl.from_pandas(FRAME).write_parquet(tmp_path / "t.parquet")
    for X in (FRAME, pl.from_pandas(FRAME), tmp_path / "t.parquet"):
        notes = notes_of(X)
        numbers = (
            "text that looks like numbers stays text, because the type of the column is text. To read "
            "numbers, set kinds="
        )
        assert f"Columns 'zip', 'share': {numbers}{{'zip': 'number'}}." in notes
        dates = (
            "text that looks like dates stays text, because the type of the column is text. To read "
            "dates, set kinds="
        )
        assert f"Column 'day': {dates}{{'day': 'date'}}." in notes
        word = (
            "is a level like other text, although it means a missing value in a CSV file. Write "
            "None for a missing value."
        )
        assert f"Column 'region': 'NA' {word}" in notes and f"Column 'pool': 'None' {word}" in notes
        assert "'n'" not in notes
        notes = notes_of(X, kinds={"zip": "category", "day": "date", "share": "number"})
        assert not any(f"'{name}'" in notes for name in ("zip", "day", "share"))


def test_no_remark_on_what_is_read_alike(path, tmp_path):
    frame = FRAME.drop(columns=["zip", "region", "pool", "day", "share"])
    frame["city"] = ["Bonn", None, "Ulm"] * 20
    frame["flag"] = ["true", "false"] * 30
    frame["kind"] = pd.Categorical(["1", "2"] * 30)
    assert as_table(frame).readings == {}
    frame.to_csv(path, index=False)
    assert read_table(path).readings == {} and "looks like" not in notes_of(path)
    read = pd.read_csv(path)  # the type of "kind" is that of the file then
    assert (
        as_table(read).readings == {} and as_table(read).kinds[1:3] == read_table(path).kinds[1:3]
    )


def test_the_command_line_names_its_own_option(tmp_path):
    table = write_table(tmp_path / "t.csv", kind=kinds(), zip=[f"{i % 3:05}" for i in range(40)])
    command = ["tune", table, "--target", "kind", "--out", tmp_path / "o", *FAST]
    out = " ".join(run(*command)[1].split())
    assert "Column 'zip': leading zeros are lost" in out and "set --kind zip=category." in out


def test_an_infinite_value_of_a_chosen_kind_is_refused_as_without_it(tmp_path):
    a = ["inf", *map(str, range(39))]
    table = write_table(tmp_path / "t.csv", a=a, kind=kinds())
    command = ["tune", table, "--target", "kind", "--out", tmp_path / "o", *FAST]
    message = refusal(*command)
    assert "Column 'a' has an infinite value in row 0. Clip it, or leave it empty." in message
    assert refusal(*command, "--kind", "a=number") == message


def test_the_target_and_the_groups_have_notes_too(tmp_path):
    codes = FRAME.assign(y=[f"{i % 3:03}" for i in range(60)])
    codes.to_csv(tmp_path / "codes.csv", index=False)
    notes = notes_of(tmp_path / "codes.csv", groups="zip")
    assert (
        "Columns 'zip', 'y': leading zeros are lost, because all values are numbers. To keep them, "
        "set kinds={'zip': 'category'}."
    ) in notes
    assert "'zip'" not in notes_of(tmp_path / "codes.csv", drop=["zip"])
    FRAME.assign(y=FRAME["region"]).to_csv(tmp_path / "words.csv", index=False)
    notes = notes_of(tmp_path / "words.csv", missing_target="drop", drop=["region"])
    assert "Column 'y': 'NA' is read as a missing value." in notes
    with refused(
        r"y has 20 missing values \(the first in line 2\). 'NA' is read as a missing value"
    ):
        read_source(tmp_path / "words.csv", "y")
