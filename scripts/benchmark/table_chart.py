"""Draw the chart of docs/which-model.md: the errors of networks and boosted trees on eleven tables.

The figures come from the result file of ``python scripts/benchmark --tables``. The script writes
docs/table-errors.svg, which has colors for a light and for a dark theme:

    python scripts/benchmark/table_chart.py
"""

import json
import math
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
RESULT = HERE / "results" / "tables-amd-epyc-1-cores.json"
DOCS = HERE.parents[1] / "docs"

BASELINE = "default HistGradientBoosting"
LABELS = {
    "realmlp ensemble": "RealMLP, ensemble",
    "mlp portfolio ensemble": "MLP with its portfolio, ensemble",
    "LightGBM tuned": "LightGBM, tuned for 60 s",
    "default CatBoost": "CatBoost, default settings",
}
"""The models of the chart, with their labels."""

WIDTH = 760
LEFT = 118  # x of the lowest ratio
RIGHT = 612  # x of the highest ratio
TOP = 100  # y of the first table
ROW = 28
LOWEST = 0.3
HIGHEST = 1.25
TICKS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)

STYLE = """\
.errors { --ink: var(--color-foreground-primary, #1f2328);
  --soft: var(--color-foreground-secondary, #59636e);
  --paper: var(--color-background-primary, #ffffff); --line: #8884; --worse: #d1242f18;
  --network: #1a7f5a; --trees: #bc5f04; font: 13px sans-serif; }
.errors text { fill: var(--ink); }
.errors .small { fill: var(--soft); font-size: 12px; }
.errors .line { stroke: var(--line); }
.errors .even { stroke: var(--soft); stroke-dasharray: 4 3; }
.errors .worse { fill: var(--worse); }
.errors .network { fill: var(--network); stroke: var(--network); stroke-width: 1.5; }
.errors .trees { fill: var(--trees); stroke: var(--trees); stroke-width: 1.5; }
.errors .open { fill: var(--paper); }
.errors .won { fill: var(--network); }
.errors .lost { fill: var(--trees); }
@media (prefers-color-scheme: dark) {
  .errors { --ink: var(--color-foreground-primary, #f0f6fc);
    --soft: var(--color-foreground-secondary, #9198a1);
    --paper: var(--color-background-primary, #131416); --worse: #f8514924;
    --network: #3fb98a; --trees: #f0883e; }
}
"""


def error(result: dict[str, Any]) -> float:
    """Return the error of a result: its RMSE, or 1 minus its accuracy or ROC AUC."""
    score = float(result["score"])
    return score if result["scoring"].startswith("neg_") else 1 - score


def relative_errors() -> dict[str, dict[str, float]]:
    """Return the error of each model by table, divided by the error of boosting.

    Errors are medians over the splits. Tables with larger samples of rows are left out.
    """
    results = json.loads(RESULT.read_text())["results"]
    tables = {one["table"] for one in results if one["way"] == BASELINE}
    ratios = {}
    for table in tables:
        errors: dict[str, list[float]] = {way: [] for way in (BASELINE, *LABELS)}
        for one in results:
            if one["table"] == table and one["way"] in errors:
                errors[one["way"]].append(error(one))
        of_boosting = median(errors[BASELINE])
        ratios[table] = {way: median(errors[way]) / of_boosting for way in LABELS}
    return dict(sorted(ratios.items(), key=_advantage_of_networks))


def _advantage_of_networks(item: tuple[str, dict[str, float]]) -> float:
    """Return the lowest error of a network relative to the lowest error of trees, also of
    boosting."""
    _, ratios = item
    networks = min(ratio for way, ratio in ratios.items() if "mlp" in way)
    trees = min(ratio for way, ratio in ratios.items() if "mlp" not in way)
    return networks / min(trees, 1.0)


def best_model(ratios: dict[str, float]) -> str:
    """Return the short name of the model with the lowest error on a table."""
    way = min(ratios, key=lambda way: ratios[way])
    if ratios[way] >= 1:
        return "boosting"
    return LABELS[way].split()[0].rstrip(",")


def x_of(ratio: float) -> float:
    """Return the horizontal position of a ratio. The axis is logarithmic."""
    share = math.log(ratio / LOWEST) / math.log(HIGHEST / LOWEST)
    return LEFT + share * (RIGHT - LEFT)


def mark(way: str, x: float, y: float) -> str:
    """Return the mark of a model: a circle for networks, a square for trees."""
    is_network = "mlp" in way
    css = "network" if is_network else "trees"
    if way in ("mlp portfolio ensemble", "default CatBoost"):
        css += " open"
    if is_network:
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y}" r="4.5"/>'
    return f'<rect class="{css}" x="{x - 4:.1f}" y="{y - 4}" width="8" height="8"/>'


def legend() -> list[str]:
    """Return the legend: the marks and labels of the models."""
    parts = []
    for number, (way, label) in enumerate(LABELS.items()):
        x = LEFT + 250 * (number % 2)
        y = 22 + 22 * (number // 2)
        parts.append(mark(way, x, y))
        parts.append(f'<text x="{x + 12}" y="{y + 4}">{escape(label)}</text>')
    return parts


def chart() -> str:
    """Return the chart as SVG."""
    ratios = relative_errors()
    bottom = TOP + ROW * len(ratios) - 8
    height = bottom + 46
    n_won = sum(best_model(of_table) in ("RealMLP", "MLP") for of_table in ratios.values())
    title = (
        f"Held-out error on {len(ratios)} tables of 2,000 rows relative to scikit-learn's boosting "
        f"with default settings. A network has the lowest error on {n_won} tables."
    )
    even = x_of(1)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f"<style>\n{STYLE}</style>",
        '<g class="errors">',
        *legend(),
        f'<rect class="worse" x="{even:.1f}" y="{TOP - 24}" width="{RIGHT - even:.1f}" '
        f'height="{bottom - TOP + 24}"/>',
        f'<text class="small" x="{even - 8:.1f}" y="{TOP - 30}" text-anchor="end">'
        "better than boosting</text>",
        f'<text class="small" x="{even + 8:.1f}" y="{TOP - 30}">worse</text>',
        f'<text class="small" x="{RIGHT + 16}" y="{TOP - 30}">lowest error</text>',
        f'<line class="even" x1="{even:.1f}" x2="{even:.1f}" y1="{TOP - 24}" y2="{bottom}"/>',
    ]
    for number, (table, of_table) in enumerate(ratios.items()):
        y = TOP + ROW * number
        parts.append(f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{table}</text>')
        parts.append(f'<line class="line" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        for way in reversed(LABELS):
            # Marks of networks stand above the line and marks of trees below, so that none is hidden.
            offset = -5 if "mlp" in way else 5
            parts.append(mark(way, x_of(of_table[way]), y + offset))
        best = best_model(of_table)
        css = "won" if best in ("RealMLP", "MLP") else "lost"
        parts.append(f'<text class="{css}" x="{RIGHT + 16}" y="{y + 4}">{best}</text>')
    for tick in TICKS:
        parts.append(
            f'<text class="small" x="{x_of(tick):.1f}" y="{bottom + 16}" text-anchor="middle">'
            f"{tick}</text>"
        )
    parts.append(
        f'<text class="small" x="{(LEFT + RIGHT) / 2}" y="{bottom + 36}" text-anchor="middle">'
        "error relative to scikit-learn's boosting with default settings (logarithmic)</text>"
    )
    parts += ["</g>", "</svg>"]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write the chart."""
    (DOCS / "table-errors.svg").write_text(chart())


if __name__ == "__main__":
    main()
