"""The part of torture.py that damages files: whatever opens holds a prefix of what was committed."""

import random
from pathlib import Path

import numpy as np

from gputune.errors import StudyCorruptError, StudyVersionError
from gputune.study.repair import repair
from gputune.study.store import Candidate, Chunk, Result, Store

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


def cuts(folder: Path) -> dict[str, int]:
    """Cut a file, and another one's write-ahead log, at every 512-byte boundary."""
    whole, copy = folder / "cut.db", folder / "copy.db"
    with Store.create(whole, META) as store:
        states = fill(store)
        base, log = whole.read_bytes(), whole.with_name("cut.db-wal").read_bytes()
    raw = whole.read_bytes()
    cases = [(raw[:end], b"") for end in range(0, len(raw), 512)]
    cases += [(base, log[:end]) for end in range(0, len(log), 512)]
    return _count("cuts", cases, states, copy)


def flips(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Flip so many bits of a closed file, one at a time; repair what does not open."""
    whole, copy, draw = folder / "flip.db", folder / "copy.db", random.Random(seed)
    with Store.create(whole, META) as store:
        states = fill(store)
    raw = whole.read_bytes()
    cases = []
    for _ in range(count):
        flipped = bytearray(raw)
        flipped[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        cases.append((bytes(flipped), b""))
    return _count("flips", cases, states[-1:], copy)


def _count(word: str, cases: list[tuple[bytes, bytes]], states: list[tuple], copy: Path) -> dict[str, int]:
    found = {
        word: len(cases),
        "opened": 0,
        "clear errors": 0,
        "repaired": 0,
        "wrong values": 0,
        "other errors": 0,
    }
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
    if held is None or any(
        part not in kept for part, kept in zip(held[1:], whole[1:]) for part in part if part
    ):
        raise ValueError("a repaired study holds another value")
    return True
