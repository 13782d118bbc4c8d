"""Records: the seconds that gputune needs to reach a fixed quality, on the page docs/records.md.

Each seed trains in a process of its own. A log file keeps the figures of all seeds, so the same
command resumes a measurement that was stopped. The tables of the page are made of all log files.
Tables of docs/published-results.md are copied from result pages:

    python scripts/benchmark --records digits --seeds 5
    python scripts/benchmark --records california adult --data FILE.py --change "fewer epochs"
    python scripts/benchmark --records
"""

import json
import math
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import ttest_1samp

import gputune
from benchmark.report import HERE, describe_machine, file_stem, table
from benchmark.studies.record_tasks import TASKS, Task
from benchmark.work import stop_workers

SEEDS = 5
P_LIMIT = 0.01
RESULTS = HERE / "results"
DOCS = HERE.parents[1] / "docs"
PAGES = [DOCS / "records.md", DOCS / "published-results.md"]
FIGURES = ("fcnet", "mnist1d", "learned-rate")
"""Result pages of scripts/reproduce whose table of figures stands on a page of the docs."""

HEAD = "date|seconds|CPU seconds|quality|p|record|commit|machine|what changed|log"


@dataclass(frozen=True)
class Attempt:
    """One seed of a record: the quality, the seconds of wall clock and the CPU seconds."""

    seed: int
    quality: float
    seconds: float
    cpu_seconds: float


def run(options: Namespace) -> int:
    """Measure the records that the options name, and write their log files.

    The pages get their new tables only if the log files are in the usual folder.
    """
    for name in options.records:
        measure_record(TASKS[name], options)
        print(f"\n{record_table(options.out, TASKS[name])}\n")
    if options.out.resolve() == RESULTS:
        for page in PAGES:
            page.write_text(with_tables(page.read_text(), RESULTS))
            print(f"written: {page}")
    return 0


def measure_record(task: Task, options: Namespace) -> None:
    """Measure the seeds of a record that are not measured yet, and write its log file.

    The file is written after each seed, so that the same command resumes a stopped measurement.
    """
    log = {
        "record": task.name,
        "machine": describe_machine(),
        "load": round(os.getloadavg()[0], 1),
        "change": options.change,
        "work": task.work,
        "target": task.target,
    }
    logs = options.out / "records"
    logs.mkdir(parents=True, exist_ok=True)
    path = started_log(logs, log)
    attempts: list[Attempt] = []
    if path is None:
        path = logs / log_name(task, log["machine"])
    else:
        log = json.loads(path.read_text())
        attempts = [Attempt(**seed) for seed in log["seeds"]]
        seeds = ", ".join(str(attempt.seed) for attempt in attempts)
        print(f"{task.name}: measured before: seeds {seeds}. To measure again, delete {path}.")
    for seed in range(len(attempts), options.seeds):
        attempts.append(in_fresh_process(task, seed, options.data))
        print(f"{task.name}, {attempts[-1]}", flush=True)
        log["p"] = p_value(task, attempts)
        log["seeds"] = [asdict(attempt) for attempt in attempts]
        path.write_text(json.dumps(log, indent=1, allow_nan=False) + "\n")
    print(verdict(task, attempts))
    print(f"log file: {path}")


def started_log(folder: Path, log: dict[str, Any]) -> Path | None:
    """Return the log file in ``folder`` of a measurement that the measurement ``log`` can resume.

    Only the date and the load may differ. None if there is no such file, or if the code differs
    from its commit.
    """
    commit = log["machine"]["commit"]
    if commit == "unknown" or commit.endswith("-dirty"):
        return None
    for path in sorted(folder.glob(f"{log['record']}-*.json")):
        if _lasting(json.loads(path.read_text())) == _lasting(log):
            return path
    return None


def _lasting(log: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a log file that does not depend on the time of the measurement."""
    machine = {key: value for key, value in log["machine"].items() if key != "date"}
    content = {key: log[key] for key in ("record", "change", "work", "target")}
    return content | {"machine": machine}


def log_name(task: Task, machine: dict[str, Any]) -> str:
    """Return the name of a log file. A second measurement of a commit on a day has the same."""
    return file_stem(machine, f"{task.name}-{machine['date']}-{machine['commit']}") + ".json"


def in_fresh_process(task: Task, seed: int, data: Path | None) -> Attempt:
    """Return one seed's attempt, measured in a process that has done nothing else.

    If the process fails, its own message is all that is printed: SystemExit has only its exit code.
    """
    words = [task.name, str(seed), *([str(data.resolve())] if data else [])]
    command = [sys.executable, "-m", "benchmark.studies.records", *words]
    # Python finds this package in PYTHONPATH even if it must not search the current folder.
    paths = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths}
    process = subprocess.run(
        command, cwd=HERE.parent, env=environment, stdout=subprocess.PIPE, text=True
    )
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    return Attempt(**json.loads(process.stdout.splitlines()[-1]))


def measure_here(task: Task, seed: int, data: Path | None) -> Attempt:
    """Return one seed's attempt, measured in this process.

    The time begins when the rows are in memory, and ends when the quality can be computed.
    """
    assert task.prepare is not None, task.name
    reach = task.prepare(data)
    cpu = _all_cpu_seconds()
    begin = time.perf_counter()
    score = reach(seed)
    seconds = time.perf_counter() - begin
    stop_workers()  # the CPU seconds of a process are known when it has ended
    return Attempt(seed, score(), round(seconds, 3), round(_all_cpu_seconds() - cpu, 3))


def _all_cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its ended child processes."""
    return sum(os.times()[:4])


def p_value(task: Task, attempts: Sequence[Attempt]) -> float | None:
    """Return the p value of the t test that the mean quality is better than the target.

    The test is one-sided. The value is None if fewer than two seeds were measured.
    """
    qualities = [attempt.quality for attempt in attempts]
    if len(qualities) < 2:
        return None
    if len(set(qualities)) == 1:  # a t test needs some spread
        is_better = qualities[0] < task.target if task.is_error else qualities[0] > task.target
        return 0.0 if is_better else 1.0
    side = "less" if task.is_error else "greater"
    return float(ttest_1samp(qualities, task.target, alternative=side).pvalue)


def reason_against(task: Task, attempts: Sequence[Attempt]) -> str | None:
    """Return why these attempts are no record, or None if the rule is met."""
    if len(attempts) < SEEDS:
        return f"no: {len(attempts)} of {SEEDS} seeds"
    p = p_value(task, attempts)
    if p is None or not p < P_LIMIT:
        return f"no: p is not below {P_LIMIT}"
    return None


def verdict(task: Task, attempts: Sequence[Attempt]) -> str:
    """Return the sentences that say whether the rule is met."""
    qualities = [attempt.quality for attempt in attempts]
    reason = reason_against(task, attempts)
    rule = "The rule is met." if reason is None else f"The rule is not met ({reason})."
    seconds = mean(attempt.seconds for attempt in attempts)
    return (
        f"{task.name}: {task.metric} {_with_spread(qualities, 4)}, target {task.target:g}, "
        f"p = {_p_text(p_value(task, attempts))}, {seconds:.2f} s. {rule}"
    )


def _with_spread(values: Sequence[float], digits: int) -> str:
    """Return the mean and the standard deviation of the values."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{spread}"


def _p_text(p: float | None) -> str:
    """Return a p value with two digits."""
    if p is None:
        return "unknown"
    return f"{p:.2g}"


def read_logs(folder: Path, task: Task) -> Iterator[tuple[dict[str, Any], list[Attempt], str]]:
    """Yield the log, the attempts and the path in ``folder`` of each measurement of a record.

    The oldest comes first.
    """
    found = []
    for path in folder.glob(task.pattern):
        log = task.read(json.loads(path.read_text()))
        attempts = [Attempt(**one) for one in log["seeds"]]
        found.append((log, attempts, path.relative_to(folder).as_posix()))
    found.sort(key=lambda entry: (entry[0]["machine"]["date"], entry[2]))
    yield from found


def record_table(folder: Path, task: Task) -> str:
    """Return the table of all measurements of a record. The fastest valid time is bold."""
    logs = list(read_logs(folder, task))
    if not logs:
        return "Not measured yet."
    valid = [
        mean(one.seconds for one in attempts)
        for _, attempts, _ in logs
        if reason_against(task, attempts) is None
    ]
    best = min(valid, default=math.nan)
    rows = []
    for log, attempts, path in logs:
        machine = log["machine"]
        seconds = mean(one.seconds for one in attempts)
        shown = f"**{seconds:,.2f}**" if seconds == best else f"{seconds:,.2f}"
        reason = reason_against(task, attempts)
        cells = [
            machine["date"],
            shown,
            f"{mean(one.cpu_seconds for one in attempts):,.2f}",
            _with_spread([one.quality for one in attempts], 4),
            _p_text(p_value(task, attempts)),
            "yes" if reason is None else reason,
            machine["commit"],
            f"{machine['cpu']}, {machine['cores']} cores",
            log["change"],
            f"[log](../scripts/benchmark/results/{path})",
        ]
        rows.append("|".join(cells))
    return table(HEAD, rows)


def figures_table(folder: Path, name: str) -> str:
    """Return the table of a result page, with a link to this page."""
    pages = sorted(folder.glob(f"{name}-*.md"))
    if not pages:
        return "Not measured yet."
    lines = pages[-1].read_text().splitlines()
    rows = "\n".join(line for line in lines if line.startswith("|"))
    link = f"../scripts/benchmark/results/{pages[-1].name}"
    return f"{rows}\n\n[The result page]({link}) names the machine, the versions and the date."


def with_tables(text: str, folder: Path) -> str:
    """Return the page's text with the present tables.

    A table stands between the lines "<!-- NAME -->" and "<!-- end of NAME -->".
    """
    for name, task in TASKS.items():
        text = _with_block(text, name, record_table(folder, task))
    for name in FIGURES:
        text = _with_block(text, f"figures of {name}", figures_table(folder, name))
    return text


def _with_block(text: str, name: str, block: str) -> str:
    """Return the text with a new block between two comments, if it has the comments."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text:
        return text
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block}\n\n{rest[rest.index(end) :]}"


def main(name: str, seed: str, *files: str) -> None:
    """Measure one seed of a task, and print the attempt as JSON."""
    data = Path(files[0]) if files else None
    try:
        attempt = measure_here(TASKS[name], int(seed), data)
    except gputune.InputError as error:  # such as a missing package
        raise SystemExit(f"error: {error}") from None
    print(json.dumps(asdict(attempt)))


if __name__ == "__main__":
    main(*sys.argv[1:])
