"""The store compared with a dict: after any calls in any order, it has the content of the dict."""

import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gputune.study.claims import Claims
from gputune.study.repair import repair
from gputune.study.store import Candidate, PlannedChunk, Store
from refused import refused
from study_rows import bits, result

NUMBERS = st.integers(0, 7)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
PARAMS = st.dictionaries(st.text(), VALUES, max_size=3)


class StoreStates(RuleBasedStateMachine):
    """A study file with two handles, and its expected content."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "study.db"
        self.meta = {"model": "mlp", "seed": 0}
        self.handles = [Store.create(self.path, self.meta), Store.open(self.path)]
        self.trials = {}
        self.results = {}
        self.plan = {}
        self.claimed = {}
        self.claims = [Claims(self.path), Claims(self.path)]
        self.copies = 0

    def teardown(self):
        for handle in (*self.claims, *self.handles):
            handle.close()
        assert [place.name for place in self.folder.glob("study.db*")] == ["study.db"]
        shutil.rmtree(self.folder)

    @rule(who=st.integers(0, 1), numbers=st.lists(NUMBERS, min_size=1, max_size=3), params=PARAMS)
    def add(self, who, numbers, params):
        new = [Candidate(n, params, "random") for n in numbers]
        is_new = len(set(numbers)) == len(numbers) and self.trials.keys().isdisjoint(numbers)
        with nullcontext() if is_new else refused("exists already"):
            self.handles[who].add_trials(new)
        self.trials |= {candidate.number: candidate for candidate in new if is_new}

    @rule(
        who=st.integers(0, 1),
        numbers=st.lists(NUMBERS, min_size=1, max_size=3),
        stopped=st.booleans(),
    )
    def finish(self, who, numbers, stopped):
        new = [result(n, state="stopped" if stopped else "complete") for n in numbers]
        final = {n for n, found in self.results.items() if found.state != "stopped"}
        once = stopped or len(set(numbers)) == len(numbers)
        is_new = once and final.isdisjoint(numbers) and set(numbers) <= self.trials.keys()
        words = r"trial \d (exists already and is never replaced|was never added), so nothing was written"
        with nullcontext() if is_new else refused(words):
            self.handles[who].finish(new)
        self.results |= {found.number: found for found in new if is_new}

    @rule(
        who=st.integers(0, 1),
        number=NUMBERS,
        trials=st.lists(NUMBERS, min_size=1, max_size=3, unique=True),
    )
    def freeze(self, who, number, trials):
        chunk = PlannedChunk(number, 0, tuple(trials), 1)
        with refused(f"chunk {number} exists already") if number in self.plan else nullcontext():
            self.handles[who].add_chunks([chunk])
        self.plan.setdefault(number, chunk)

    @precondition(lambda self: self.plan)
    @rule(who=st.integers(0, 1), data=st.data())
    def claim(self, who, data):
        chunk = self.plan[data.draw(st.sampled_from(sorted(self.plan)))]
        final = {n for n, found in self.results.items() if found.state != "stopped"}
        free = self.claimed.get(chunk.number, who) == who and not set(chunk.trials) <= final
        assert self.claims[who].take(chunk) == free
        if free:
            self.claimed[chunk.number] = who

    @rule(who=st.integers(0, 1))
    def end_process(self, who):
        self.claims[who].close()
        self.claims[who] = Claims(self.path)
        self.claimed = {chunk: owner for chunk, owner in self.claimed.items() if owner != who}

    @rule(who=st.integers(0, 1))
    def reopen(self, who):
        self.handles[who].close()
        self.handles[who] = Store.open(self.path)

    @rule(who=st.integers(0, 1), repaired=st.booleans())
    def copy(self, who, repaired):
        self.copies += 1
        path = self.folder / f"copy{self.copies}.db"
        self.handles[who].backup(path)
        if repaired:
            repair(path, path.with_suffix(".repaired"))
            path = path.with_suffix(".repaired")
        with Store.open(path) as store:
            whole = [chunk for chunk in self._plan() if set(chunk.trials) <= self.trials.keys()]
            self._is_held(store, whole if repaired else self._plan())

    @invariant()
    def both_handles_hold_it(self):
        for handle in self.handles:
            self._is_held(handle, self._plan())

    def _plan(self):
        return [self.plan[number] for number in sorted(self.plan)]

    def _is_held(self, store, plan):
        rows = store.trials()
        assert store.meta == self.meta and store.plan() == plan
        assert repr([c for c, _ in rows]) == repr([self.trials[n] for n in sorted(self.trials)])
        assert {r.number: bits(r) for _, r in rows if r} == {
            n: bits(r) for n, r in self.results.items()
        }
        assert store.n_finished() == sum(
            found.state != "stopped" for found in self.results.values()
        )


TestStoreStates = StoreStates.TestCase
TestStoreStates.settings = settings(
    max_examples=settings.default.max_examples // 5, stateful_step_count=25
)
