"""The store alone: damaged files, of which whatever opens holds a prefix of what was committed, and its speed."""

import random
import time
from pathlib import Path

import numpy as np

from gputune.errors import StudyCorruptError, StudyVersionError
from gputune.study.claims import Claims
from gputune.study.repair import repair
from gputune.study.store import Candidate, Chunk, Result, Store

Counts = dict[str, float]
META = {"model": "mlp", "seed": 0}
TRIALS = 12


def result(number: int, epochs: int = 30, folds: int = 5) -> Result:
    """Return a result whose numbers depend on nothing but the trial."""
    curve = np.random.default_rng(number).normal(size=(epochs, folds))
    return Result(number, "complete", float(curve[-1].mean()), tuple(curve[-1].tolist()), epochs, 0.1, curve)


def content(path: Path) -> tuple | None:
    """Return all that a study holds, in a form that compares bits; None where it gives the clear error."""
    try:
        with Store.open(path) as store:
            rows = store.trials()
            numbers = [r and (r.number, r.state, r.score, r.best_epoch, r.curve.tobytes()) for _, r in rows]
            return repr(store.meta), [repr(c) for c, _ in rows], numbers, store.plan()
    except (StudyCorruptError, StudyVersionError):
        return None


def fill(store: Store) -> list[tuple]:
    """Add trials one by one; return what the study held after each commit."""
    states = [content(store.path)]
    for n in range(TRIALS):
        store.add_trials([Candidate(n, {"lr": 0.1 / (n + 1)}, "random")])
        states.append(content(store.path))
        store.add_chunks([Chunk(n, 0, (n,), 1)])
        states.append(content(store.path))
        store.finish([result(n)])
        states.append(content(store.path))
    return states


def cuts(folder: Path) -> Counts:
    """Cut a file, and another one's write-ahead log, at every 512-byte boundary."""
    whole = folder / "cut.db"
    with Store.create(whole, META) as store:
        states = fill(store)
        base, log = whole.read_bytes(), whole.with_name("cut.db-wal").read_bytes()
    raw = whole.read_bytes()
    cases = [(raw[:end], b"") for end in range(0, len(raw), 512)]
    cases += [(base, log[:end]) for end in range(0, len(log), 512)]
    return _count("cuts", cases, states, folder / "copy.db")


def flips(folder: Path, count: int, seed: int) -> Counts:
    """Flip so many bits of a closed file, one at a time; repair what does not open."""
    whole, draw = folder / "flip.db", random.Random(seed)
    with Store.create(whole, META) as store:
        states = fill(store)
    raw = whole.read_bytes()
    cases = []
    for _ in range(count):
        flipped = bytearray(raw)
        flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        cases.append((bytes(flipped), b""))
    return _count("flips", cases, states[-1:], folder / "copy.db")


def _count(word: str, cases: list[tuple[bytes, bytes]], states: list[tuple], copy: Path) -> Counts:
    words = ("opened", "clear errors", "repaired", "wrong values", "other errors")
    found = {word: len(cases), **dict.fromkeys(words, 0)}
    for base, log in cases:
        for place in copy.parent.glob("copy.db*"):
            place.unlink()
        copy.write_bytes(base)
        if log:
            copy.with_name("copy.db-wal").write_bytes(log)
        try:
            held = content(copy)
            found["clear errors" if held is None else "opened"] += 1
            found["wrong values"] += held is not None and held not in states
            if held is None:
                found["repaired"] += _is_repaired(copy, states[-1])
        except Exception:
            found["other errors"] += 1
    return found


def _is_repaired(path: Path, whole: tuple) -> bool:
    """Say whether something was saved; raises ValueError where a saved value is none of the whole study's."""
    out = path.with_name("repaired.db")
    out.unlink(missing_ok=True)
    try:
        repair(path, out)
    except StudyCorruptError:
        return False
    held = content(out)
    out.unlink()
    if held is None or any(p not in kept for part, kept in zip(held[1:], whole[1:]) for p in part if p):
        raise ValueError("a repaired study holds another value")
    return True


def storing(folder: Path, count: int, together: int = 64) -> Counts:
    """Store so many trials with curves of 50 epochs x 5 folds, chunk by chunk; milliseconds a trial."""
    curve = np.random.default_rng(0).random((50, 5))
    path = folder / "stored.db"
    numbers = [range(n, min(n + together, count)) for n in range(0, count, together)]
    chunks = [Chunk(i, 0, tuple(part), 1) for i, part in enumerate(numbers)]
    params = {"lr": 0.123456789, "batch_size": 32, "width": 64, "weight_decay": 1e-3}
    start = time.perf_counter()
    with Store.create(path, {}) as store, Claims(path) as claims:
        store.add_trials(Candidate(n, params, "random") for n in range(count))
        store.add_chunks(chunks)
        for chunk in chunks:
            claims.take(chunk)
            store.finish(Result(n, "complete", 0.5, (0.5,) * 5, 50, 0.1, curve) for n in chunk.trials)
    stored = time.perf_counter()
    with Store.open(path) as store:
        store.trials()
    read = time.perf_counter()
    each = {"to store": stored - start, "to open and read": read - stored}
    return {"trials": count, **{f"ms a trial {what}": round(1e3 * s / count, 4) for what, s in each.items()}}
