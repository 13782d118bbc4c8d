"""What a study knows of its search: one typed value, kept in its file as named options.

Each field says what it is for: whether a search that goes on must have the same, whether a training
depends on it, which argument of ``tune`` it answers. All that compares, digests or repeats a search
takes its list from here.

Each has a form too, by which a value of another type is known as damage when the file is read. A
form is a type (int and float: of 64 bits), None, a text, a tuple of forms to choose from, [form]
for a list, {"": form} for an object of such values, or an object of forms by key: those that end in
"?" may be missing, further keys are free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from gputune.errors import StudyCorruptError
from gputune.text import Measure, measure_of
from gputune.types import Json

TEXT = (str, None)
FINGERPRINT = {"rows": int, "columns": int, "sha256": str}
SPEC = (
    {"kind": "module", "path": str, "class": str},
    {"kind": "module", "import": str},
    {"kind": "mlp"},
    {"kind": "logistic"},
    {"kind": "objective", "name": str},
)
METHOD = (str, {"name": str, "hyperparameters?": ([str], (str,)), "sampler?": str})
SOURCE = {
    "path": str,
    "target": str,
    "groups": TEXT,
    "rows?": int,
    "cv?": str,
    "seed?": int,
    "test_size?": float,
    "task?": TEXT,
    "held_out?": FINGERPRINT,
    "drop?": [str],
    "kinds?": {"": str},
    "missing_target?": str,
}
METRICS = [{"name": str, "scorer": str, "positive": (str, bool, float, None)}]
ARGUMENTS = {
    "kept": dict,
    "space": ([dict], None),
    "folds": [[str]],
    "lacking": [str],
    "callbacks": [str],
    "final_model?": {"": bool},
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What only makes a search again.

    kept        options of ``tune`` by name, beside those that the record has as fields
    space       as plain values, see ``choices_to_json``; None where it has an object of the user's
                own
    folds       packed
    lacking     what a file cannot hold and the search needs, in words
    callbacks   those that will not be called again
    final_model  options of the command line for the model that it saves at the end: "ensemble",
                 "intervals" and
                "calibrate"; empty in studies of Python and of earlier versions
    """

    kept: Json = field(default_factory=dict)
    space: Sequence[Json] | None = None
    folds: list[list[str]] = field(default_factory=list)
    lacking: Sequence[str] = ()
    callbacks: Sequence[str] = ()
    final_model: dict[str, bool] = field(default_factory=dict)

    def updated(self, latest: Self) -> Self:
        """Return these arguments with the latest call's options of the final model and of the end
        of the search.

        A search that is stopped again then resumes with what its last call was given.
        """
        ending = {
            name: latest.kept[name] for name in _ENDING if name in self.kept and name in latest.kept
        }
        final_model = latest.final_model or self.final_model
        return replace(self, kept={**self.kept, **ending}, final_model=final_model)


_ENDING = ("target_score", "patience_trials")
"""Options that decide where a search ends, and that a resume may change."""


@dataclass(frozen=True)
class Part:
    """What a field of a record is for.

    form       what it looks like in a file; None: as the type of the field says
    called     what it is in words, where a search that goes on must have the same; "" where it may
               differ
    training   whether the numbers of a training depend on it, beside its configuration
    argument   the argument of ``tune`` whose value it is; "" where it is none, or in another form
    logged     whether loggers are told of it
    """

    form: object = None
    called: str = ""
    training: bool = False
    argument: str = ""
    logged: bool = False


def _part(default: object, called: str = "", **what: Any) -> Any:
    """Return a field with what it is for; ``default``, or what it makes, stands where a file does
    not have it."""
    metadata = {"part": Part(called=called, **what)}
    if default in (dict, list):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _argument(default: object, name: str, **what: object) -> Any:
    """Return a field that holds an argument of ``tune``, which must stay the same."""
    return _part(default, name, argument=name, **{"training": True, **what})


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """A search as its study keeps it. What a file lacks is "", 0, None or empty, and its name is in
    ``absent``.

    face            "sklearn" where a search of scikit-learn's face wrote it, "loop" where
                    ``gputune.search`` did of a user's own training loop; both have few of the
                    others
    model, spec     the model's name, and how it is built again (see module_source.py)
    space           as text; ``distributions`` are those of it that an export to Optuna knows, by
                    key
    method          "random", or its "name" with its options
    target_transform  a word, or the class and parameters of a transformer of scikit-learn's, or the
                      text of another
    classes         the labels; None for numbers
    source          what reads the rows again, and which were held out; None for rows in memory
    fingerprint     of the rows: "rows", "columns", "sha256"
    features        columns of the encoded rows; ``notes`` are remarks on columns and trials
    max_levels      of a category that have a feature each; 32 before there was a choice
    class_weight    as text, ``sample_weight`` as a digest; None where the rows were not weighted
    cv, folds       the number or the class of the splitter, how many folds it made, and the digest
                    of their rows
    objective       the loss, the training step and what changes minibatches; "" for the loss of the
                    task alone
    code            digests of what of it is the user's own, by argument; see code.py
    scoring         the scorer that ranks; ``metrics`` are all of them where there are several: the
                    "name" of each, its "scorer", and the "positive" class that it is of
    positive        the class that ``scoring``, or another of the metrics, is of; None: of none
    baseline        the "answer" that needs no model, in words, and its "score"; None for a scorer
                    of the user's own
    max_epochs      1 for a model that is solved
    device          where it trained first; it may go on elsewhere
    """

    face: str = _part("")
    model: str = _part("", logged=True)
    spec: Json = _part(dict, "model", form=SPEC, training=True)
    target: str = _part("", "target")
    optimizer: str = _argument("", "optimizer", logged=True)
    schedule: str = _argument("", "schedule", logged=True)
    space: str = _part("", "space", logged=True)
    distributions: dict[str, Json] = _part(dict, form={"": {"kind": str}})
    method: str | Json = _part("", "method", form=METHOD, logged=True)
    task: str = _argument("", "task", logged=True)
    target_transform: str | Json | None = _part(
        None, "target_transform", form=(str, dict, None), training=True
    )
    classes: Sequence[str | bool | float] | None = _part(None, form=([(str, bool, float)], None))
    source: Json | None = _part(None, form=(SOURCE, None))
    fingerprint: Json = _part(dict, "data", form=FINGERPRINT, training=True)
    features: int = _part(0)
    notes: Sequence[str] = _part(list, form=[str])
    columns: str = _argument("", "columns")
    numbers: str = _argument("", "numbers")
    max_levels: int = _part(32, "max_levels")
    class_weight: str | None = _part(None, "class_weight", form=TEXT, training=True)
    sample_weight: str | None = _part(None, "sample_weight", form=TEXT, training=True)
    cv: str = _part("")
    folds: int = _part(0, logged=True)
    splits: str = _part("", "folds (cv, groups)", training=True)
    objective: str = _part("", "loss", training=True)
    code: dict[str, str] = _part(dict, "code", form={"": str})
    scoring: str = _part("", "scoring", training=True, logged=True)
    metrics: Sequence[Json] = _part(list, "scoring", form=METRICS)
    positive: str | bool | float | None = _argument(
        None, "positive", form=(str, bool, float, None), logged=True
    )
    baseline: Json | None = _part(None, form=({"answer": str, "score": float}, None))
    epoch: str = _argument("", "epoch", training=False)
    patience: int | None = _argument(None, "patience", form=(int, None), training=False)
    max_epochs: int = _argument(0, "max_epochs", logged=True)
    seed: int | None = _argument(None, "random_state", form=int, logged=True)
    dtype: str = _argument("", "dtype")
    device: str = _part("")
    versions: Mapping[str, str] = _part(dict, form={"": str})
    arguments: Arguments = field(default_factory=Arguments, metadata={"part": Part(form=ARGUMENTS)})
    absent: frozenset[str] = frozenset({"face"})

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Self:
        """Return the record of a file's options; those of a later version are left out."""
        names = {part.name for part in fields(cls)} - {"absent"}
        known = {name: options[name] for name in names & options.keys()}
        if "arguments" in known:
            words = {part.name for part in fields(Arguments)} & known["arguments"].keys()
            known["arguments"] = Arguments(**{word: known["arguments"][word] for word in words})
        return cls(**known, absent=frozenset(names - known.keys()))

    def to_json(self) -> Json:
        """Return the options that a file keeps."""
        absent = {*self.absent, "absent"}
        options = {
            part.name: getattr(self, part.name) for part in fields(self) if part.name not in absent
        }
        return options | (
            {"arguments": dict(vars(self.arguments))} if "arguments" in options else {}
        )

    @property
    def lost(self) -> list[str]:
        """Names of what makes a search the one that it is, where a damaged file lacks them."""
        # Files of an earlier version do not say which class was positive, nor that the loss was the
        # task's or of which code, and knew no transformation of the target, one metric alone, no
        # patience and 32 levels.
        later = (
            "positive",
            "objective",
            "code",
            "target_transform",
            "metrics",
            "patience",
            "max_levels",
        )
        return [name for name in IDENTITY if name in self.absent and name not in later]

    @property
    def method_name(self) -> str:
        """The word for the method."""
        return self.method if isinstance(self.method, str) else str(self.method.get("name", ""))

    @property
    def descends(self) -> bool:
        """Whether its trials are the points of descents by hypergradients."""
        return self.method_name == "hypergradient"

    @property
    def descended(self) -> list[str]:
        """The hyperparameters that a search by hypergradients descends on; none of another
        search."""
        if not self.descends or isinstance(self.method, str):
            return []
        return ["C"] if self.optimizer == "exact" else list(self.method.get("hyperparameters", ()))

    def measure(self, best: float) -> Measure:
        """Return how scores are shown, with decimals for the best of them."""
        return measure_of(self.scoring or "score", best, self.ranked_class)

    @property
    def ranked_class(self) -> str | bool | float | None:
        """The class that ``scoring`` is of; None: of none."""
        known: str | bool | float | None = (
            self.metrics[0]["positive"] if self.metrics else self.positive
        )
        return known

    def measures(self, best: Sequence[float]) -> dict[str, Measure]:
        """Return how the scores of each of several metrics are shown, by its name, with decimals
        for the ``best``."""
        return {
            one["name"]: measure_of(one["scorer"], score, one["positive"], one["name"])
            for one, score in zip(self.metrics, best)
        }


def lost_option(path: Path | None, name: str) -> StudyCorruptError:
    """Return the error of a study whose file has lost an option that is needed."""
    place, call = (
        ("", "")
        if path is None
        else (f" {str(path)!r}", f": gputune.Study.open({str(path)!r}).trials")
    )
    return StudyCorruptError(
        f"study{place} has lost the option {name!r} of its search. Its trials can be read{call}; "
        "search again for more."
    )


PARTS: Mapping[str, Part] = {
    one.name: one.metadata["part"] for one in fields(SearchRecord) if "part" in one.metadata
}
"""What each field is for."""

DIRECTIONS = {"objective": "maximize", "neg_objective": "minimize"}
"""The score of a user's own loop -> what a search does with its objective."""

IDENTITY = {name: part.called for name, part in PARTS.items() if part.called}
"""What must be the same for a search to go on in a file, in words. Anything else may differ."""

OPTION_FORMS: Mapping[str, object] = {
    "": int,
    **{
        one.name: PARTS[one.name].form or one.type
        for one in fields(SearchRecord)
        if one.name in PARTS
    },
}
"""The form of each option, and of the number of options, which has no name."""


def has_form(value: object, form: object) -> bool:
    """Whether a value that was read has a form."""
    match form:
        case tuple():
            return any(has_form(value, one) for one in form)
        # a chunk has as many as it has trials
        case [kind] if kind is int and isinstance(value, list | tuple):
            whole = {int}.issuperset(map(type, value))
            return whole and (not value or -(2**63) <= min(value) <= max(value) < 2**63)
        case list():
            return isinstance(value, list | tuple) and all(
                has_form(item, form[0]) for item in value
            )
        case {"": inner}:
            return isinstance(value, dict) and all(
                type(k) is str and has_form(v, inner) for k, v in value.items()
            )
        case dict():
            return isinstance(value, dict) and all(
                has_form(value[key], inner)
                if (key := name.rstrip("?")) in value
                else name.endswith("?")
                for name, inner in form.items()
            )
        case None | str():
            return bool(value == form)
    if type(value) is int and form in (int, float):
        return -(2**63) <= value < 2**63
    return type(value) is form
