"""Measure by how much the search of README.md beats its default on held-out rows.

The script runs the example of README.md with other random states. Each one splits the rows, draws
the configurations and seeds the training.

    python scripts/examples/readme_margin.py [SEEDS]
"""

import contextlib
import io
import math
import re
import statistics
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
SEEDED = "random_state=0"


def example() -> str:
    """Return the code of the first example of README.md."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    return str(blocks[0])


def held_out_scores(code: str, seed: int) -> tuple[float, float]:
    """Run the example with a seed, and return the held-out accuracy of the default and the best."""
    session: dict[str, object] = {"__name__": "readme"}
    seeded = compile(code.replace(SEEDED, f"random_state={seed}"), "README.md", "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(seeded, session)
    last_line = printed.getvalue().splitlines()[-1]
    default, best = re.findall(r"0\.\d{4}|1\.0000", last_line)
    return float(default), float(best)


def main(n_seeds: int) -> None:
    """Print the held-out scores of each seed, and the mean difference with its standard error."""
    differences = []
    for seed in range(n_seeds):
        default, best = held_out_scores(example(), seed)
        differences.append(best - default)
        print(f"seed {seed}: default {default:.4f}, best {best:.4f}", flush=True)
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(n_seeds)
    print(f"difference {mean:.4f} ± {error:.4f} (standard error over {n_seeds} seeds)")
    print(f"{mean / error:.1f} standard errors")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
