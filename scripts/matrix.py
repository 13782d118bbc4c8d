"""Test gputune in environments with other versions, and write the results into docs/install.md.

    python scripts/matrix.py newest floors            (default: all of ENVIRONMENTS)
    python scripts/matrix.py newest --keep /tmp/envs  keep the environments, so that the next run is
                                                      faster

Each environment uses the Python of that version on the path. gputune is installed as a wheel from
this tree, together with the named versions. Then a part of the tests runs, which needs about five
minutes on two cores. Rows of other runs do not change.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "install.md"
PARTS = ("replay", "native", "modules", "data", "study", "sklearn_face/test_checks.py")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "pyarrow", "matplotlib", "optuna", "cmaes")
SHOWN = ("torch", "numpy", "scikit-learn", "pandas", "polars")
ENVIRONMENTS: Mapping[str, tuple[str, str]] = {
    "floors": (
        "3.11",
        "torch==2.10.* numpy==2.0.* scikit-learn==1.6.* pandas==2.2.* polars==1.10.* pytest==8.*",
    ),
    "3.12": ("3.12", "torch==2.13.* pandas==2.*"),
    "newest": ("3.13", "pandas>=3"),
    "3.14": ("3.14", "pandas>=3"),
}
"""Name -> the version of Python, and what is asked of other packages; the rest is the newest that
fits."""
HEAD = "| environment | Python | torch | numpy | scikit-learn | pandas | polars | tests | date |"


def main() -> None:
    """Test the environments one after another, and write each row when it is complete."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "names", nargs="*", choices=[*ENVIRONMENTS, []], default=[], help="environments (all)"
    )
    parser.add_argument(
        "--keep", type=Path, help="folder in which the environments are made and stay"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or ENVIRONMENTS:
            row = tried(name, (options.keep or Path(folder)) / name)
            print(row, flush=True)
            write(name, row)


def tried(name: str, folder: Path) -> str:
    """Make an environment, run the tests in it, and return its row of the table."""
    version, asked = ENVIRONMENTS[name]
    python = shutil.which(f"python{version}")
    if python is None:
        return line(
            name, version, *["-"] * len(SHOWN), f"not run: there is no python{version} here"
        )
    if not folder.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    inside = folder / "bin" / "python"
    pip = [inside, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, ROOT, *TOOLS, *asked.split()], check=True)
    # where the folder was kept
    subprocess.run([*pip, "--no-deps", "--force-reinstall", ROOT], check=True)
    shown = (
        "import sys; from importlib.metadata import version as v; print(sys.version.split()[0], "
        f"*map(v, {SHOWN}))"
    )
    versions = subprocess.check_output([inside, "-c", shown], text=True).split()
    tests = [f"tests/{part}" for part in PARTS]
    words = [
        folder / "bin" / "pytest",
        "-o",
        f"cache_dir={folder}/cache",
        "-n",
        "2",
        "--dist",
        "loadfile",
        *tests,
    ]
    ran = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(ran.stdout)
    return line(name, *versions, result(ran.stdout))


def result(output: str) -> str:
    """Return the numbers of passed and failed tests, from pytest's last line or its dots (-q)."""
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", output)
    }
    if not counts:
        dots = re.findall(r"^([.sFEx]+) +\[ *\d+%\]$", output, re.M)
        counts = {"passed": "".join(dots).count("."), "failed": sum(map("".join(dots).count, "FE"))}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return f"{counts.get('passed', 0)} passed" + (f", {failed} failed" if failed else "")


def line(*cells: str) -> str:
    return f"| {' | '.join((*cells, datetime.date.today().isoformat()))} |"


def write(name: str, row: str) -> None:
    """Write a row into the page, in place of the row with the same name."""
    text = PAGE.read_text()
    start, rows = text.split(HEAD)
    kept = [old for old in rows.strip().split("\n")[1:] if not old.startswith(f"| {name} |")]
    rule = "|---" * (len(SHOWN) + 4) + "|"
    PAGE.write_text(f"{start}{HEAD}\n{rule}\n" + "\n".join(sorted([*kept, row])) + "\n")


if __name__ == "__main__":
    main()
