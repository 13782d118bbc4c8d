"""Make docs/report.png and the pictures of docs/gallery.md.

Each picture of a search runs the Python code of a page, and draws the study that the page makes.
The script needs matplotlib and Chromium.

    python scripts/gallery.py
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from PIL import Image

DOCS = Path(__file__).resolve().parents[1] / "docs"
README = DOCS.parent / "README.md"
GALLERY = DOCS / "gallery"
WIDTH = 400  # pixels of a picture of the gallery
COLORS = 128  # a palette makes the files small
REPORT_SIZE = (1280, 1040)
HEAD_SIZE = (1000, 700)  # a narrow window: its text is larger in the small picture
SEARCH = (
    "tune sklearn:digits --model net.py:net --space lr=1e-4..1e-1:log "
    "--space module__hidden=32,64,128,256 --trials 16 --epochs 20 --out run"
)


def session_of(page: str, name: str) -> dict[str, Any]:
    """Run the Python blocks of a page until one of them defines ``name``."""
    file = (DOCS / page).resolve()
    session: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", file.read_text(), re.S):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, file.name, "exec"), session)
        if name in session:
            return session
    raise SystemExit(f"{page} does not define {name}")


def write_report() -> Path:
    """Search the network of README.md on the command line, and return the HTML report."""
    (net,) = re.findall(r"^def net\(.*?\n(?=\n\n)", README.read_text(), re.DOTALL | re.MULTILINE)
    Path("net.py").write_text(f"from torch import nn\n\n\n{net}")
    gputune = [sys.executable, "-P", "-m", "gputune"]
    subprocess.run([*gputune, *SEARCH.split(), "--quiet"], check=True)
    subprocess.run([*gputune, "report", "run"], check=True)
    return Path("run", "report.html")


def screenshot(source: Path, size: tuple[int, int]) -> Image.Image:
    """Return the picture of an HTML or SVG file in a browser window of the given size."""
    browser = shutil.which("chromium")
    if browser is None:
        raise SystemExit("the script needs chromium on the PATH")
    width, height = size
    target = Path.cwd() / "screenshot.png"
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
        f"--screenshot={target}",
        source.resolve().as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(target) as image:
        return image.convert("RGB")


def save(image: Image.Image, target: Path) -> None:
    """Write a picture with a palette, and print its size."""
    image.quantize(COLORS).save(target, optimize=True)
    print(f"{target.relative_to(DOCS)}: {image.width} x {image.height}, {target.stat().st_size} B")


def save_small(image: Image.Image, name: str) -> None:
    """Write a picture of the gallery."""
    height = round(image.height * WIDTH / image.width)
    small = image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    save(small, GALLERY / f"{name}.png")


def save_figure(name: str) -> None:
    """Write the current matplotlib figure as a picture of the gallery."""
    memory = io.BytesIO()
    plt.savefig(memory, dpi=200)
    plt.close("all")
    with Image.open(memory) as image:
        save_small(image.convert("RGB"), name)


def draw_intervals(session: dict[str, Any]) -> None:
    """Draw the prediction intervals of rows that the search has not seen."""
    lower, upper, true = session["lower"], session["upper"], session["y_new"]
    middle = (lower + upper) / 2
    _, ax = plt.subplots()
    inside = (lower <= true) & (true <= upper)
    spread = (upper - lower) / 2
    ax.errorbar(middle, middle, yerr=spread, fmt="none", ecolor="0.8", label="90% interval")
    ax.plot(middle[inside], true[inside], "o", markersize=3, label="inside")
    ax.plot(middle[~inside], true[~inside], "o", markersize=3, label="outside")
    ax.set(xlabel="predicted value", ylabel="true value of a new row")
    ax.legend()


def main() -> None:
    """Run the searches and write every picture."""
    GALLERY.mkdir(exist_ok=True)
    plt.switch_backend("Agg")
    plt.rcParams.update({"figure.figsize": (4, 2.8), "figure.constrained_layout.use": True})
    plt.rcParams.update({"font.size": 8, "legend.fontsize": 7})

    report = write_report()
    save(screenshot(report, REPORT_SIZE), DOCS / "report.png")
    save_small(screenshot(report, HEAD_SIZE), "report")
    study = session_of("../README.md", "study")["study"]
    print(study.default_trial.text)
    study.plot_curves(best=3, ax=plt.subplots()[1])
    save_figure("curves")

    study = session_of("report.md", "study")["study"]
    study.plot_parallel(ax=plt.subplots(figsize=(6, 4.2))[1])
    save_figure("parallel")

    study = session_of("gallery.md", "study")["study"]
    study.plot_pareto(ax=plt.subplots()[1])
    save_figure("pareto")

    draw_intervals(session_of("ensembles-and-intervals.md", "lower"))
    save_figure("intervals")

    save_small(screenshot(DOCS / "speed-light.svg", (760, 176)), "speed")
    save_small(screenshot(DOCS / "trials-and-folds.svg", (800, 340)), "members")

    study = session_of("hypergradient-search.md", "study")["study"]
    study.plot_path("lr", ax=plt.subplots()[1])
    save_figure("path")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main()
