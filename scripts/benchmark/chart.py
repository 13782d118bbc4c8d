"""Draw the chart of README.md: the seconds of one search with gputune and with two other tools.

The figures come from the newest measurement in results/. The script writes docs/speed-light.svg and
docs/speed-dark.svg:

    python scripts/benchmark/chart.py
"""

import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
RESULT = HERE / "results" / "training-amd-epyc-2-cores.json"
DOCS = HERE.parents[1] / "docs"

LABELS = {
    "gputune": "gputune",
    "scikit-learn": "scikit-learn",
    "PyTorch loop": "plain PyTorch loop",
}
"""The engines in the order of the chart, with their labels."""

WIDTH = 760
HEIGHT = 176
LEFT = 160  # x of the first pixel of a bar
LONGEST = 500  # pixels of the longest bar
ROW = 36
FONT = "-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """The colors of one version of the chart."""

    background: str
    text: str
    quiet: str
    bar: str
    other_bar: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#59636e", "#1a7f5a", "#afb8c1"),
    "dark": Theme("#0d1117", "#f0f6fc", "#9198a1", "#3fb98a", "#4b535d"),
}


def measured() -> tuple[dict[str, float], str]:
    """Return the median seconds of each engine, and the line that says what was measured."""
    result = json.loads(RESULT.read_text())
    work = result["works"][0]
    seconds = {engine["engine"]: float(engine["median"]) for engine in work["engines"]}
    machine = result["machine"]
    what = (
        f"MLP on digits, {len(work['trials'])} trials x {work['folds']} folds x {work['epochs']} "
        f"epochs, {machine['cores']} cores of an {machine['cpu']}, {machine['date']}"
    )
    return seconds, what


def seconds_text(seconds: float) -> str:
    """Return a duration with two digits: 3.6 s, 75 s, 110 s."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{float(f'{seconds:.2g}'):.0f} s"


def chart(theme: Theme) -> str:
    """Return the chart as SVG."""
    seconds, what = measured()
    longest = max(seconds.values())
    ours = seconds["gputune"]
    fastest = seconds_text(ours)
    slowest = seconds_text(longest)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="{FONT}" font-size="15">',
        f"<title>One search: gputune {fastest}, a plain PyTorch loop {slowest}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{theme.background}"/>',
    ]
    for row, (engine, label) in enumerate(LABELS.items()):
        top = 20 + ROW * row
        middle = top + 17
        length = LONGEST * seconds[engine] / longest
        color = theme.bar if engine == "gputune" else theme.other_bar
        value = seconds_text(seconds[engine])
        weight = "bold" if engine == "gputune" else "normal"
        parts.append(
            f'<text x="{LEFT - 12}" y="{middle}" text-anchor="end" fill="{theme.text}" '
            f'font-weight="{weight}">{escape(label)}</text>'
        )
        parts.append(
            f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="24" rx="3" fill="{color}"/>'
        )
        parts.append(
            f'<text x="{LEFT + length + 10:.1f}" y="{middle}" fill="{theme.text}" '
            f'font-weight="{weight}">{value}</text>'
        )
    parts.append(
        f'<text x="{LEFT}" y="{HEIGHT - 22}" fill="{theme.quiet}" font-size="13">'
        f"{escape(what)}</text>"
    )
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write both versions of the chart."""
    for name, theme in THEMES.items():
        (DOCS / f"speed-{name}.svg").write_text(chart(theme))


if __name__ == "__main__":
    main()
