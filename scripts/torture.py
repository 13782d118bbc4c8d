"""Damage and disturb studies, and count the losses.

The disturbances are kills, damaged files, many processes at once and a full disk.

    python scripts/torture.py               every part; some minutes with its defaults
    python scripts/torture.py flips cuts    only these parts

The parts are kills, faults, chunks, halving, enough, workers, ray, command, crowd, cuts, flips,
disk and storing. Every search runs in separate processes, which are killed by real signals. The
table at the end is compared, bit for bit, with the table of an undisturbed search. If a damaged
file opens, it must hold a prefix of the committed data. Prints one line of counts for each part.
Ends with 1 if one of them is wrong.
"""

import argparse
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import optuna
import torch
from scipy.stats import loguniform
from sklearn.datasets import load_iris

import gputune
from gputune.cli.main import main as main_of_gputune
from gputune.engine import checkpoint
from gputune.engine.checkpoint import CheckpointFolder
from gputune.ground.errors import StudyCorruptError, StudyVersionError
from gputune.study.claims import Claims
from gputune.study.model import TunedModel
from gputune.study.repair import repair
from gputune.study.store import Candidate, PlannedChunk, Result, Store

Work = Callable[..., object]
Method = tuple[type, str]
Stopping = str | gputune.Halving
Counts = dict[str, float]

BAD = (
    "lost",
    "changed",
    "unopened",
    "unfinished",
    "different",
    "failed",
    "files left",
    "wrong values",
    "other errors",
    "trained again",
    "other models",
)
"""The counts that must be nought."""

STORE_CALLS = (
    (Store, "add_trials"),
    (Store, "add_chunks"),
    (Store, "finish"),
    (Claims, "_claim"),
    (Claims, "_delete"),
)
# Numbers of trials: of the searches killed within chunks, and of the damaged files.
LONG_TRIALS = 6
STORED_TRIALS = 12
COMMON = {"include_default": False, "workers": 1, "memory": 1024, "verbose": 0}
LIMIT = 200_000  # largest size of a file, in bytes, when the disk is full


def begin(work: Work, *arguments: object) -> int:
    """Begin some work in a separate process; return its id.

    The process ends with 0, or with 1 and a traceback.
    """
    with warnings.catch_warnings():
        # A fork with other threads causes this warning. All threads of torch are asleep here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    """Wait for a process and return its exit code, minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_well(work: Work, *arguments: object) -> bool:
    return end(begin(work, *arguments)) == 0


def watch(
    methods: Iterable[Method],
    before: Callable[[int], None],
    after: Callable[[int], None] | None = None,
) -> None:
    """Call ``before`` with n before the n-th call of these methods, and ``after`` after it.

    The calls of all methods are counted together.
    """
    numbers = itertools.count(1)

    def watched(original: Work) -> Work:
        def call(*arguments: object, **options: object) -> object:
            before(number := next(numbers))
            result = original(*arguments, **options)
            if after is not None:
                after(number)
            return result

        return call

    for owner, name in methods:
        setattr(owner, name, watched(getattr(owner, name)))


def kill(
    work: Work, *arguments: object, method: Method, least: int, most: int, pause: float
) -> None:
    """Begin some work, and kill it ``pause`` seconds after the ``least``-th call of a method.

    The work waits before it makes more than ``most`` calls, so that the kill comes in time on a
    slow machine too.
    """
    reading, writing = os.pipe()

    def watched() -> None:
        watch(
            [method],
            before=lambda number: signal.pause() if number > most else None,
            after=lambda number: os.write(writing, b"x") if number == least else None,
        )
        work(*arguments)

    child = begin(watched)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    code = end(child)
    assert code == -signal.SIGKILL, code


def search(path: Path, n_trials: int) -> None:
    """Search with tiny trials; each is a separate chunk."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": loguniform(1e-4, 0.1), "width": [4, 8]}
    options = {"n_trials": n_trials, "max_epochs": 1, "cv": 2, "checkpoint_seconds": 1}
    gputune.tune("mlp", X[::5], y[::5], space=space, study=path, **COMMON, **options)


def search_long(path: Path, method: Stopping, epochs: int, **options: object) -> None:
    """Search with a few trials; each is a separate chunk."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": [1e-4, 1e-3, 1e-2], "width": [8, 40], "optimizer": ["adamw", "adamhd"]}
    options |= {"n_trials": LONG_TRIALS, "max_epochs": epochs, "cv": 3, "method": method}
    gputune.tune("mlp", X, y, space=space, study=path, **COMMON, **options)


def table(path: Path) -> list[tuple]:
    """Return every trial of a study except its times, in a form that compares bits."""
    study = gputune.Study.open(path)
    return [
        (
            t.number,
            repr(t.params),
            t.state,
            np.array([t.score, *t.fold_scores]).tobytes(),
            curve.tobytes(),
        )
        for t, curve in zip(study.trials, study.curves)
    ]


@cache
def undisturbed(n_trials: int) -> list[tuple]:
    """Return the table of an undisturbed search."""
    with tempfile.TemporaryDirectory() as folder:
        assert ended_well(search, Path(folder) / "study.db", n_trials)
        return table(Path(folder) / "study.db")


def compared(path: Path, expected: list[tuple]) -> Counts:
    """Return counts that compare a finished study with the expected one."""
    rows = table(path)
    return {
        "trials": len(rows),
        "unfinished": sum(row[2] not in ("complete", "pruned") for row in rows),
        "different": sum(a != b for a, b in zip(rows, expected, strict=True)),
    }


def kills(folder: Path, count: int, n_trials: int, seed: int = 0) -> Counts:
    """Kill a search ``count`` times at random moments; each continues with the same study."""
    path = folder / "kills.db"
    draw = random.Random(seed)
    before = {}
    counts = {"kills": count, "lost": 0, "changed": 0, "unopened": 0}
    most = (n_trials - 1) // count  # most results of one run, so that no run ends before its kill
    for _ in range(count):
        least = draw.randint(1, most)
        pause = draw.uniform(0, 0.01)
        kill(search, path, n_trials, method=(Store, "finish"), least=least, most=most, pause=pause)
        try:
            now = (
                {row[0]: row for row in table(path) if row[2] != "waiting"} if path.exists() else {}
            )
        except gputune.InputError:
            counts["unopened"] += 1
            continue
        counts["lost"] += len(before.keys() - now.keys())
        counts["changed"] += sum(row != now.get(number, row) for number, row in before.items())
        before = now
    assert ended_well(search, path, n_trials)
    counts |= compared(path, undisturbed(n_trials))  # opens it, before its files are counted
    return {**counts, "files left": len(list(folder.glob("kills.db-*")))}


def fault_points(folder: Path, n_trials: int) -> Counts:
    """Kill a search before its first call of the store, before its second, and so on.

    Each search is then resumed to its end.
    """
    path = folder / "fault.db"
    different = 0

    def search_until(point: int) -> None:
        watch(
            STORE_CALLS,
            before=lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == point else None,
        )
        search(path, n_trials)

    for point in itertools.count(1):
        if (code := end(begin(search_until, point))) == 0:
            path.unlink()
            return {"fault points": point - 1, "different": different}
        assert code == -signal.SIGKILL, code
        assert ended_well(search, path, n_trials)
        different += table(path) != undisturbed(n_trials)
        left = [place.name for place in folder.iterdir() if place.name.startswith(path.name)]
        assert left == [path.name], left
        path.unlink()


def kills_in_chunks(
    folder: Path, count: int, method: Stopping, seed: int, epochs: int = 500
) -> Counts:
    """Kill a search ``count`` times at random moments of its training.

    The last search begins from stored states.
    """
    whole = folder / "whole.db"
    path = folder / "chunks.db"
    draw = random.Random(seed)
    assert ended_well(search_long, whole, method, epochs)
    with_a_state = 0

    def keep_states() -> None:  # after every epoch except a chunk's last one
        checkpoint._WRITING_SHARE = 0
        search_long(path, method, epochs, checkpoint_seconds=1e-9)

    shortest = method.min_epochs if isinstance(method, gputune.Halving) else epochs
    # Most states that one run may store, so that no run ends before its kill, and the first one is
    # killed within its first chunk.
    most = min((LONG_TRIALS * (shortest - 1) - 1) // count, shortest - 2)
    for _ in range(count):
        least = draw.randint(1, most)
        pause = draw.uniform(0, 0.02)
        kill(keep_states, method=(CheckpointFolder, "write"), least=least, most=most, pause=pause)
        with_a_state += any(folder.glob("chunks.db.state/*.safetensors"))
    failed = not ended_well(search_long, path, method, epochs)
    counts = {
        "kills": count,
        "with a state": with_a_state,
        "failed": int(failed),
        **compared(path, table(whole)),
    }
    left = len(list(folder.glob("chunks.db[.-]*")))
    whole.unlink()
    path.unlink()
    return {**counts, "files left": left}


def search_patiently(path: Path, **options: object) -> None:
    """Search with a few trials until ``patience_trials`` in a row do not improve the best score."""
    X, y = load_iris(return_X_y=True)
    space = {"lr": loguniform(1e-4, 0.1), "width": [4, 40], "batch_size": [16, 32]}
    common = {
        "n_trials": 40,
        "max_epochs": 3,
        "cv": 2,
        "scoring": "neg_log_loss",
        "patience_trials": 4,
    }
    gputune.tune("mlp", X[::3], y[::3], space=space, study=path, **{**COMMON, **common, **options})


def objective(params: dict[str, float], report: Callable[[float], None]) -> float:
    """A custom training loop with crossing curves."""
    for epoch in range(1, 5):
        report(params["x"] + epoch * params["slope"])
    return params["x"] + 4 * params["slope"]


def search_loop(path: Path, **options: object) -> None:
    """Search hyperparameters of a custom training loop, with an early end."""
    space = {"x": [0.0, 0.3, 0.6, 0.9, 1.2], "slope": [-0.1, 0.0, 0.1, 0.2]}
    common = {
        "direction": "maximize",
        "n_trials": 16,
        "patience_trials": 4,
        "workers": 1,
        "verbose": 0,
    }
    gputune.search(objective, space, study=path, **{**common, **options})


def proposed() -> gputune.OptunaSampler:
    """Return a method in which an Optuna sampler proposes the trials, a few at a time."""
    return gputune.OptunaSampler(optuna.samplers.TPESampler(seed=0), batch=3)


_CLUSTER = """
import ray
ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
input()
ray.shutdown()
"""


@contextmanager
def ray_cluster() -> Iterator[str]:
    """Yield the address of a Ray cluster that survives when a search that uses it is killed."""
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-this-script"}
    os.environ.update({**own, "RAY_USAGE_STATS_ENABLED": "0"})  # of the cluster and its users
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-P", "-c", _CLUSTER], text=True, **pipes) as cluster:
        yield cluster.stdout.readline().strip()
        cluster.communicate("\n")


def good_enough_on_ray(folder: Path, count: int, seed: int) -> Counts:
    """Kill searches that end early and train their trials on a Ray cluster; see ``good_enough``."""
    with ray_cluster() as address:
        workers = gputune.Ray(address)
        searches = {
            "random": partial(search_patiently, workers=workers),
            "optuna": partial(search_patiently, workers=workers, method=proposed()),
        }
        return good_enough(folder, count, searches, seed)


def good_enough_searches(workers: int) -> dict[str, Callable[[Path], None]]:
    """Return, by name, searches that end early because they are good enough."""
    halving = {"method": gputune.Halving(min_epochs=1), "max_epochs": 4}
    searches = {
        "random": partial(search_patiently, workers=workers),
        "target score": partial(
            search_patiently, workers=workers, patience_trials=None, target_score=-0.9
        ),
        "loop": partial(search_loop, workers=workers),
        "loop, halving": partial(search_loop, workers=workers, **halving),
        "optuna": partial(search_patiently, workers=workers, method=proposed()),
        "loop, optuna": partial(search_loop, workers=workers, method=proposed()),
    }
    if workers == 1:
        descent = {"method": gputune.Hypergradient(outer_steps=5), "n_trials": 2, "memory": "4MB"}
        searches["halving"] = partial(search_patiently, method="halving")
        searches["median"] = partial(search_patiently, method="median")
        searches["hypergradient"] = partial(search_patiently, **descent, patience_trials=2)
    return searches


def until_killed(
    work: Work, point: int, *arguments: object, methods: Iterable[Method] = STORE_CALLS
) -> bool:
    """Do some work in a process that is killed before the ``point``-th call of these methods.

    Returns True if the work came to this call.
    """

    def watched() -> None:
        watch(
            methods,
            before=lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == point else None,
        )
        work(*arguments)

    code = end(begin(watched))
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def seconds(path: Path) -> list[float]:
    """Return the training time of each trial of a study; a trial that was trained again has another
    time.
    """
    return [trial.seconds for trial in gputune.Study.open(path).trials]


def good_enough(
    folder: Path, count: int, searches: dict[str, Callable[[Path], None]], seed: int
) -> Counts:
    """Kill searches that end early, ``count`` times each, at random calls of the store.

    At the end the call is repeated.
    """
    draw = random.Random(seed)
    counts = {"searches": 0, "kills": 0, "trials": 0, "different": 0, "trained again": 0}
    for name, work in searches.items():
        whole = folder / "whole.db"
        path = folder / "enough.db"
        assert ended_well(work, whole), name
        expected = table(whole)
        for _ in range(count):
            counts["kills"] += until_killed(work, draw.randint(2, 12), path)
        assert ended_well(work, path), name
        counts["different"] += table(path) != expected
        before = seconds(path)
        assert ended_well(work, path), name
        counts["different"] += table(path) != expected
        counts["trained again"] += seconds(path) != before
        counts["searches"] += 1
        counts["trials"] += sum(row[2] == "complete" for row in expected)
        whole.unlink()
        path.unlink()
    return counts


COMMANDS = (
    ["sklearn:iris", "--scoring", "accuracy", "--ensemble", "--calibrate"],
    ["sklearn:diabetes", "--intervals"],
    ["sklearn:diabetes", "--ensemble", "--intervals", "--patience-trials", "3"],
)


def command(folder: Path, count: int, seed: int) -> Counts:
    """Kill commands, ``count`` times each, before their first model is saved.

    They are resumed with ``gputune resume``.
    """
    draw = random.Random(seed)
    methods = [*STORE_CALLS, (TunedModel, "save")]
    counts = {"commands": 0, "kills": 0, "different": 0, "other models": 0}

    def tune(options: list[str], out: Path) -> None:
        """Begin a search by the command line, or resume it."""
        small = "--trials 8 --epochs 3 --cv 3 --workers 1 --memory 1KB --quiet --out".split()
        words = (
            ["resume", str(out), "--quiet"]
            if (out / "study.db").exists()
            else ["tune", *options, *small, str(out)]
        )
        assert main_of_gputune(words) == 0

    def saved(out: Path) -> list[bytes]:
        return [place.read_bytes() for place in sorted((out / "model").iterdir())]

    for options in COMMANDS:
        whole = folder / "whole"
        killed = folder / "killed"
        assert ended_well(tune, options, whole)
        for _ in range(count):
            if (killed / "model").exists():
                break
            counts["kills"] += until_killed(
                tune, draw.randint(2, 12), options, killed, methods=methods
            )
        assert ended_well(tune, options, killed)
        counts["commands"] += 1
        counts["different"] += table(whole / "study.db") != table(killed / "study.db")
        counts["other models"] += saved(whole) != saved(killed)
        shutil.rmtree(whole)
        shutil.rmtree(killed)
    return counts


def crowd(folder: Path, processes: int, n_trials: int) -> Counts:
    path = folder / "crowd.db"
    children = [begin(search, path, n_trials) for _ in range(processes)]
    failed = sum(end(child) != 0 for child in children)
    return {"processes": processes, "failed": failed, **compared(path, undisturbed(n_trials))}


def full_disk(folder: Path, n_trials: int) -> Counts:
    """Search with limited file sizes until the error, then without the limit to the end."""
    path = folder / "full.db"

    def search_limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
        try:
            search(path, n_trials)
        except OSError as error:
            says = str(error)
            assert path.name in says and ("free disk space" in says or "heck the disk" in says), (
                error
            )
        else:
            raise AssertionError("the disk was never full")

    clear = ended_well(search_limited)
    with Store.open(path) as store:
        kept = store.n_finished()
    failed = not ended_well(search, path, n_trials)
    bad = {
        "failed": int(failed or not clear),
        "different": compared(path, undisturbed(n_trials))["different"],
    }
    return {"clear errors": int(clear), "results kept then": kept, **bad}


def content(path: Path) -> tuple | None:
    """Return the content of a study in a form that compares bits; None for a clear error."""
    try:
        with Store.open(path) as store:
            rows = store.trials()
            numbers = [
                r and (r.number, r.state, r.score, r.best_epoch, r.curve.tobytes()) for _, r in rows
            ]
            return repr(store.meta), [repr(c) for c, _ in rows], numbers, store.plan()
    except (StudyCorruptError, StudyVersionError):
        return None


def filled(path: Path) -> tuple[bytes, bytes, bytes, list[tuple | None]]:
    """Add trials one by one.

    Returns the closed file, the open file, its log, and the content after each commit.
    """
    with Store.create(path, {"model": "mlp"}) as store:
        states = [content(path)]
        for n in range(STORED_TRIALS):
            curve = np.random.default_rng(n).normal(size=(30, 5))
            store.add_trials([Candidate(n, {"lr": 0.1 / (n + 1)}, "random")])
            states.append(content(path))
            store.add_chunks([PlannedChunk(n, 0, (n,), 1)])
            states.append(content(path))
            score = float(curve[-1].mean())
            scores = tuple(curve[-1].tolist())
            store.finish([Result(n, "complete", score, scores, 30, 0.1, curve)])
            states.append(content(path))
        base = path.read_bytes()
        log = path.with_name(f"{path.name}-wal").read_bytes()
    return path.read_bytes(), base, log, states


def cuts(folder: Path) -> Counts:
    """Cut a file, and the write-ahead log of another one, at every 512-byte boundary."""
    raw, base, log, states = filled(folder / "cut.db")
    cases = [(raw[:end], b"") for end in range(0, len(raw), 512)]
    cases += [(base, log[:end]) for end in range(0, len(log), 512)]
    return _damaged("cuts", cases, states, folder / "copy.db")


def flips(folder: Path, count: int, seed: int) -> Counts:
    """Flip ``count`` bits of a closed file, one at a time; repair files that do not open."""
    draw, (raw, _, _, states) = random.Random(seed), filled(folder / "flip.db")

    def flipped() -> bytes:
        flipped = bytearray(raw)
        flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        return bytes(flipped)

    return _damaged(
        "flips", [(flipped(), b"") for _ in range(count)], states[-1:], folder / "copy.db"
    )


def _damaged(
    word: str, cases: list[tuple[bytes, bytes]], states: list[tuple | None], copy: Path
) -> Counts:
    """Open a copy of each file and its log; count the ones that opened, and check their content."""
    counts = {word: len(cases)} | dict.fromkeys(
        ("opened", "clear errors", "repaired", "wrong values", "other errors"), 0
    )
    for base, log in cases:
        for place in copy.parent.glob("copy.db*"):
            place.unlink()
        copy.write_bytes(base)
        if log:
            copy.with_name("copy.db-wal").write_bytes(log)
        try:
            held = content(copy)
            counts["clear errors" if held is None else "opened"] += 1
            counts["wrong values"] += held is not None and held not in states
            if held is None:
                counts["repaired"] += _is_repaired(copy, states[-1])
        except Exception:
            counts["other errors"] += 1
    return counts


def _is_repaired(path: Path, whole: tuple) -> bool:
    """Return whether something was saved.

    Raises ValueError if a saved value is not a value of the whole study.
    """
    out = path.with_name("repaired.db")
    out.unlink(missing_ok=True)
    try:
        repair(path, out)
    except StudyCorruptError:
        return False
    held = content(out)
    out.unlink()
    if held is None or any(
        p not in kept for part, kept in zip(held[1:], whole[1:]) for p in part if p
    ):
        raise ValueError("a repaired study holds another value")
    return True


def storing(folder: Path, count: int, together: int = 64) -> Counts:
    """Store ``count`` trials with curves of 50 epochs x 5 folds, chunk by chunk.

    It measures milliseconds per trial.
    """
    curve = np.random.default_rng(0).random((50, 5))
    path = folder / "stored.db"
    numbers = (range(n, min(n + together, count)) for n in range(0, count, together))
    chunks = [PlannedChunk(i, 0, tuple(part), 1) for i, part in enumerate(numbers)]
    params = {"lr": 0.123456789, "batch_size": 32, "width": 64, "weight_decay": 1e-3}
    start = time.perf_counter()
    with Store.create(path, {}) as store, Claims(path) as claims:
        store.add_trials(Candidate(n, params, "random") for n in range(count))
        store.add_chunks(chunks)
        for chunk in chunks:
            claims.take(chunk)
            store.finish(
                Result(n, "complete", 0.5, (0.5,) * 5, 50, 0.1, curve) for n in chunk.trials
            )
    stored = time.perf_counter()
    with Store.open(path) as store:
        store.trials()
    each = {"to store": stored - start, "to open and read": time.perf_counter() - stored}
    return {
        "trials": count,
        **{f"ms a trial {what}": round(1e3 * s / count, 4) for what, s in each.items()},
    }


Part = Callable[[Path, argparse.Namespace], Counts]
PARTS: dict[str, tuple[str, Part]] = {
    "kills": ("kill -9 at random", lambda f, o: kills(f, o.kills, o.trials, o.seed)),
    "faults": ("kill -9 between store calls", lambda f, o: fault_points(f, 4)),
    "chunks": (
        "kill -9 within chunks",
        lambda f, o: kills_in_chunks(f, o.chunk_kills, "random", o.seed),
    ),
    "halving": (
        "kill -9 within chunks, halving",
        lambda f, o: kills_in_chunks(f, o.chunk_kills, gputune.Halving(min_epochs=50), o.seed),
    ),
    "enough": (
        "kill -9, ends early",
        lambda f, o: good_enough(f, o.early_kills, good_enough_searches(1), o.seed),
    ),
    "workers": (
        "kill -9, ends early, 3 workers",
        lambda f, o: good_enough(f, o.early_kills, good_enough_searches(3), o.seed),
    ),
    "ray": (
        "kill -9, ends early, on Ray",
        lambda f, o: good_enough_on_ray(f, o.early_kills, o.seed),
    ),
    "command": ("kill -9 of a command", lambda f, o: command(f, o.early_kills, o.seed)),
    "crowd": ("one study, many processes", lambda f, o: crowd(f, o.processes, o.crowd_trials)),
    "cuts": ("cut at every sector", lambda f, o: cuts(f)),
    "flips": ("flipped bits", lambda f, o: flips(f, o.flips, o.seed)),
    "disk": ("full disk", lambda f, o: full_disk(f, 60)),
    "storing": ("storing", lambda f, o: storing(f, o.stored)),
}
"""What can be asked for -> its line, and the part."""

OPTIONS = {
    "--kills": (60, "times that a search is killed"),
    "--trials": (600, "trials of the search that is killed"),
    "--chunk-kills": (20, "times that long training is killed"),
    "--early-kills": (6, "times that each search that ends early, and each command, is killed"),
    "--processes": (8, "of the crowd"),
    "--crowd-trials": (4000, "trials that the crowd shares"),
    "--flips": (1000, "bits that are flipped, one at a time"),
    "--stored": (10_000, "trials whose storing is timed"),
    "--seed": (0, "of what is random"),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="default: all of them"
    )
    for option, (default, says) in OPTIONS.items():
        parser.add_argument(option, type=int, default=default, help=f"{says} ({default})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the searches run in forks of this process
    folder = Path(tempfile.mkdtemp(prefix="gputune-torture-"))
    wrong = 0
    for word in options.parts or PARTS:
        name, part = PARTS[word]
        start = time.monotonic()
        counts = part(folder, options)
        wrong += sum(bool(counts.get(word)) for word in BAD)
        words = ", ".join(f"{value} {word}" for word, value in counts.items())
        print(f"{name}: {words} ({time.monotonic() - start:.0f} s)", flush=True)
    shutil.rmtree(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
