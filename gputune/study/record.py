"""The search record: a dataclass that describes the search of a study.

A study file stores the fields of the record as named options. Each field declares its purpose:
whether a resumed search must have the same value, whether the result of training depends on it, and
which argument of ``tune`` it stores. All code that compares, digests or repeats a search takes its
list of fields from here.

Each field also has a form. If a value in a file has another form, the file is damaged. A form is

- a type (int and float: of 64 bits), None, or a text,
- a tuple of forms to choose from,
- [form] for a list,
- {"": form} for an object with such values,
- an object of forms by key. Keys that end in "?" are optional, and other keys are allowed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from gputune.ground.errors import StudyCorruptError, option
from gputune.ground.text import Measure, measure_of
from gputune.ground.types import Json

OPTION_COUNT = ""
"""The key of the option that holds the count of the other options. With this count, a repair
detects lost options."""

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
    "preset?": {
        "name": str,
        "choices": {
            "model?": str,
            "space?": str,
            "n_trials?": int,
            "cv?": int,
            "max_epochs?": int,
            "n_ens?": int,
            "patience?": (int, None),
            "category_copies?": [str],
            "ensemble?": bool,
            "calibrate?": bool,
        },
    },
    "script?": (str, None),
    "groups?": TEXT,
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments that gputune needs only to repeat a search.

    Attributes:
        kept: options of ``tune`` by name, in addition to the fields of the record.
        space: the space as plain values, see ``choices_to_json``. None if it holds a custom object.
        folds: the packed folds.
        lacking: the parts that a file cannot hold and the search needs, as text.
        callbacks: the callbacks that a resumed search will not call.
        final_model: options of the command line for the model that it saves at the end: "ensemble",
            "intervals" and "calibrate". Empty in studies made from Python or by earlier versions.
        preset: the name of the preset and its choices by argument, without the arguments that the
            user chose. Empty without a preset, and in studies of earlier versions.
        script: the path of the script that defined the module class. None for other models, and in
            studies of earlier versions.
        groups: the name of the column of the table that held the groups. None without such a
            column, and in studies of earlier versions.
    """

    kept: Json = field(default_factory=dict)
    space: Sequence[Json] | None = None
    folds: list[list[str]] = field(default_factory=list)
    lacking: Sequence[str] = ()
    callbacks: Sequence[str] = ()
    final_model: dict[str, bool] = field(default_factory=dict)
    preset: Json = field(default_factory=dict)
    script: str | None = None
    groups: str | None = None

    def updated(self, latest: Self) -> Self:
        """Return these arguments with the latest call's options for the final model and the end of
        the search.

        A search that is stopped again then resumes with the options of its last call.
        """
        kept = dict(self.kept)
        for name in _ENDING:
            if name in kept and name in latest.kept:
                kept[name] = latest.kept[name]
        return replace(self, kept=kept, final_model=latest.final_model or self.final_model)


_ENDING = ("target_score", "patience_trials")
"""Options that decide when a search ends. A resumed search may change these options."""


@dataclass(frozen=True)
class RecordField:
    """The purpose of one field of a search record.

    Attributes:
        form: its form in a file. None: the type of the field.
        label: the field's name in messages, if a resumed search must have the same value. "" if the
            value may differ.
        training: True if the results of training depend on it, in addition to the configuration.
        argument: the argument of ``tune`` with the same value. "" if no argument has the same value
            in the same form.
        logged: True if loggers receive it.
    """

    form: object = None
    label: str = ""
    training: bool = False
    argument: str = ""
    logged: bool = False


def _record_field(default: object, label: str = "", **purpose: Any) -> Any:
    """Return a dataclass field of a search record, with its purpose as metadata.

    ``default``, or its result if it is ``dict`` or ``list``, is used if a file lacks the field.
    """
    metadata = {"purpose": RecordField(label=label, **purpose)}
    if default in (dict, list):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _argument(default: object, name: str, **purpose: object) -> Any:
    """Return a field for an argument of ``tune`` that must be the same to resume the search."""
    return _record_field(default, name, argument=name, **{"training": True, **purpose})


@dataclass(frozen=True, kw_only=True)
class SearchRecord:
    """The description of a search that its study keeps.

    If the study file lacks a field, the field is "", 0, None or empty, and its name is in
    ``absent``.

    Attributes:
        face: "sklearn" for a search of the scikit-learn API, "loop" for ``gputune.search`` with a
            custom training loop. Both have only a few of the other fields.
        model: the name of the model.
        spec: the recipe to build the model again, see code.py.
        space: the space as text.
        distributions: the parts of the space that an export to Optuna supports, by key.
        method: "random", or the "name" of the method with its options.
        target_transform: a name, or the class and parameters of a scikit-learn transformer, or the
            text of another object.
        classes: the class labels; None for regression.
        source: describes how to read the rows again, and the held-out rows. None for rows in
            memory.
        fingerprint: "rows", "columns" and "sha256" of the rows.
        features: the number of columns of the encoded rows.
        notes: remarks on columns and trials.
        max_levels: the largest number of levels of a category that have their own features. Always
            32 in older versions.
        category_copies: columns of numbers that became categories too. Always empty in older
            versions.
        class_weight: the class weights as text. None if the rows were not weighted.
        sample_weight: a digest of the sample weights. None if the rows were not weighted.
        cv: the number of folds, a text such as "time:5", or the class of the splitter.
        folds: the number of folds.
        splits: the digest of the rows of the folds.
        objective: the loss, the training step and the changes to minibatches. "" for only the
            default loss of the task.
        code: digests of the user's own code, by argument; see code.py.
        scoring: the scorer that ranks.
        metrics: all scorers, if there are several: the "name" of each, its "scorer", and its
            "positive" class.
        positive: the class to which ``scoring``, or another of the metrics, refers. None if no
            metric needs a class.
        baseline: the "answer" that needs no model, as text, and its "score". None for a custom
            scorer.
        max_epochs: the number of epochs; 1 for a model that is solved.
        n_ens: the number of networks of a trial on each fold. Always 1 in older versions.
        device: the device on which it trained first. A resumed search may use another.
    """

    face: str = _record_field("")
    model: str = _record_field("", logged=True)
    spec: Json = _record_field(dict, "model", form=SPEC, training=True)
    target: str = _record_field("", "target")
    optimizer: str = _argument("", "optimizer", logged=True)
    schedule: str = _argument("", "schedule", logged=True)
    space: str = _record_field("", "space", logged=True)
    distributions: dict[str, Json] = _record_field(dict, form={"": {"kind": str}})
    method: str | Json = _record_field("", "method", form=METHOD, logged=True)
    task: str = _argument("", "task", logged=True)
    target_transform: str | Json | None = _record_field(
        None, "target_transform", form=(str, dict, None), training=True
    )
    classes: Sequence[str | bool | float] | None = _record_field(
        None, form=([(str, bool, float)], None)
    )
    source: Json | None = _record_field(None, form=(SOURCE, None))
    fingerprint: Json = _record_field(dict, "data", form=FINGERPRINT, training=True)
    features: int = _record_field(0)
    notes: Sequence[str] = _record_field(list, form=[str])
    columns: str = _argument("", "columns")
    numbers: str = _argument("", "numbers")
    max_levels: int = _record_field(32, "max_levels")
    category_copies: Sequence[str] = _record_field(list, "category_copies", form=[str])
    class_weight: str | None = _record_field(None, "class_weight", form=TEXT, training=True)
    sample_weight: str | None = _record_field(None, "sample_weight", form=TEXT, training=True)
    cv: str = _record_field("")
    folds: int = _record_field(0, logged=True)
    splits: str = _record_field("", f"folds ({option('cv')}, {option('groups')})", training=True)
    objective: str = _record_field("", "loss", training=True)
    code: dict[str, str] = _record_field(dict, "code", form={"": str})
    scoring: str = _record_field("", "scoring", training=True, logged=True)
    metrics: Sequence[Json] = _record_field(list, "scoring", form=METRICS)
    positive: str | bool | float | None = _argument(
        None, "positive", form=(str, bool, float, None), logged=True
    )
    baseline: Json | None = _record_field(None, form=({"answer": str, "score": float}, None))
    epoch: str = _argument("", "epoch", training=False)
    patience: int | None = _argument(None, "patience", form=(int, None), training=False)
    max_epochs: int = _argument(0, "max_epochs", logged=True)
    n_ens: int = _record_field(1, "n_ens", logged=True)
    seed: int | None = _argument(None, "random_state", form=int, logged=True)
    dtype: str = _argument("", "dtype")
    device: str = _record_field("")
    versions: Mapping[str, str] = _record_field(dict, form={"": str})
    arguments: Arguments = field(
        default_factory=Arguments, metadata={"purpose": RecordField(form=ARGUMENTS)}
    )
    absent: frozenset[str] = frozenset({"face"})

    @classmethod
    def from_json(cls, options: Mapping[str, Any]) -> Self:
        """Return the search record from the options of a study file. Options of later versions are
        ignored."""
        known = {name: options[name] for name in RECORD_FIELDS if name in options}
        if "arguments" in known:
            names = Arguments.__dataclass_fields__.keys() & known["arguments"].keys()
            known["arguments"] = Arguments(**{name: known["arguments"][name] for name in names})
        return cls(**known, absent=frozenset(RECORD_FIELDS.keys() - known.keys()))

    def to_json(self) -> Json:
        """Return the search record as named options for a study file."""
        options = {name: getattr(self, name) for name in RECORD_FIELDS if name not in self.absent}
        if "arguments" in options:
            arguments = dict(vars(self.arguments))
            # Left out when unset, as in studies of earlier versions.
            for name in ("script", "groups", "preset"):
                if not arguments[name]:
                    del arguments[name]
            options["arguments"] = arguments
        return options

    @property
    def lost(self) -> list[str]:
        """The names of essential options that a damaged file lacks.

        Without them, gputune cannot tell whether a call repeats this search.
        """
        # Options that files of an earlier version lack. These versions always used the loss of the
        # task, no target transformation, only one metric, no patience and 32 levels, and stored
        # neither the positive class nor digests of code.
        later = (
            "positive",
            "objective",
            "code",
            "target_transform",
            "metrics",
            "patience",
            *LATER_WITH_DEFAULTS,
        )
        return [name for name in IDENTITY if name in self.absent and name not in later]

    @property
    def group_column(self) -> str | None:
        """The name of the column of the table that held the groups, or None."""
        return self.arguments.groups or (self.source or {}).get("groups")

    @property
    def method_name(self) -> str:
        """The name of the search method, such as "halving"."""
        return self.method if isinstance(self.method, str) else str(self.method.get("name", ""))

    @property
    def is_hypergradient(self) -> bool:
        """True if the search moves hyperparameters by hypergradients, so that its trials are points
        on paths."""
        return self.method_name == "hypergradient"

    @property
    def changed_hyperparameters(self) -> list[str]:
        """The hyperparameters that a hypergradient search changes. Empty for other methods."""
        if not self.is_hypergradient or isinstance(self.method, str):
            return []
        return ["C"] if self.optimizer == "exact" else list(self.method.get("hyperparameters", ()))

    def measure(self, best: float) -> Measure:
        """Return the display format of scores, with enough decimals for the best score."""
        return measure_of(self.scoring or "score", best, self.ranked_class)

    @property
    def ranked_class(self) -> str | bool | float | None:
        """The positive class of ``scoring``, or None."""
        known: str | bool | float | None = (
            self.metrics[0]["positive"] if self.metrics else self.positive
        )
        return known

    def measures(self, best: Sequence[float]) -> dict[str, Measure]:
        """Return the display format of each metric by name, with enough decimals for its ``best``
        score."""
        formats = {}
        for metric, score in zip(self.metrics, best):
            name = metric["name"]
            formats[name] = measure_of(metric["scorer"], score, metric["positive"], name)
        return formats


def lost_option(path: Path | None, name: str) -> StudyCorruptError:
    """Return the error for a damaged study file without an option that is needed to resume the
    search."""
    study = "study"
    call = ""
    if path is not None:
        study = f"study {str(path)!r}"
        call = f": gputune.Study.open({str(path)!r}).trials"
    return StudyCorruptError(
        None,
        f"{study} has lost the option {name!r} of its search",
        remedy=f"Its trials can be read{call}. Search again to train more trials.",
    )


RECORD_FIELDS: Mapping[str, RecordField] = {
    item.name: item.metadata["purpose"] for item in fields(SearchRecord) if item.metadata
}
"""The purpose of each record field, keyed by field name."""

DIRECTIONS = {"objective": "maximize", "neg_objective": "minimize"}
"""Score name of a custom training loop -> the direction of the search."""

LATER_WITH_DEFAULTS = ("max_levels", "n_ens", "category_copies")
"""Fields that files of older versions lack, because these versions always used their defaults."""
IDENTITY = {
    name: option(purpose.label) if purpose.label.isidentifier() else purpose.label
    for name, purpose in RECORD_FIELDS.items()
    if purpose.label
}
"""The options that must be the same to resume a search in a file, by name, as text for messages.

All other options may differ.
"""

OPTION_FORMS: Mapping[str, object] = {
    OPTION_COUNT: int,
    **{
        name: purpose.form or SearchRecord.__dataclass_fields__[name].type
        for name, purpose in RECORD_FIELDS.items()
    },
}
"""The type or structure of each option, keyed by option name."""


def has_form(value: object, form: object) -> bool:
    """Return True if a value from a study file has the given type or structure."""
    match form:
        case tuple():
            return any(has_form(value, choice) for choice in form)
        # A fast path: a chunk has one number per trial.
        case [kind] if kind is int and isinstance(value, list | tuple):
            if not {int}.issuperset(map(type, value)):
                return False
            return not value or _LEAST <= min(value) <= max(value) < -_LEAST
        case list():
            return isinstance(value, list | tuple) and all(
                has_form(item, form[0]) for item in value
            )
        case {"": inner}:
            if not isinstance(value, dict) or not {str}.issuperset(map(type, value)):
                return False
            return all(has_form(item, inner) for item in value.values())
        case dict():
            return isinstance(value, dict) and _has_keys(value, form)
        case None | str():
            return bool(value == form)
    if type(value) is int and form in (int, float):
        return _LEAST <= value < -_LEAST
    return type(value) is form


_LEAST = -(2**63)
"""The smallest signed 64-bit integer."""


def _has_keys(value: Json, form: Mapping[str, object]) -> bool:
    """Return True if each value of an object has the form that ``form`` gives for its key."""
    for name, inner in form.items():
        key = name.rstrip("?")
        if key in value:
            if not has_form(value[key], inner):
                return False
        elif not name.endswith("?"):
            return False
    return True
