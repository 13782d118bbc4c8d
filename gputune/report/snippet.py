"""Write Python code for the report that trains the best trial of a study again."""

import ast
import json
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

import numpy as np

from gputune.ground.text import clean
from gputune.ground.types import LARGE_TABLE, Json
from gputune.study.record import RECORD_FIELDS, SearchRecord
from gputune.study.study import Study, Trial, best_trial
from gputune.study.values import to_json
from gputune.views.scores import epochs_by

_LONGEST = 70


class _Script:
    """Collects the imports and the remarks of a Python script while its code is written."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.remarks: list[str] = []

    def use(self, line: str) -> None:
        """Add an import line to the script, unless the script has this line already."""
        if line not in self.imports:
            self.imports.append(line)

    def argument(self, name: str, remark: str = "the argument of the search") -> str:
        """Return a variable name for an object that the study does not store.

        The script gets a remark that says what the reader must define.
        """
        self.remarks.append(f"{name}: {remark}")
        return name

    def literal(self, value: object) -> str:
        """Return Python code for a value, and add the imports that this code needs to the
        script."""
        match value:
            case float() if value != value or value in (float("inf"), float("-inf")):
                return f'float("{value}")'
            case None | bool() | int() | float() | str():
                return repr(value)
            case np.ndarray():
                self.use("import numpy")
                return f"numpy.array({self.literal(value.tolist())})"
            case list():
                return f"[{', '.join(map(self.literal, value))}]"
            case tuple():
                inside = ", ".join(map(self.literal, value))
                return f"({inside},)" if len(value) == 1 else f"({inside})"
            case Mapping():
                return f"{{{', '.join(self._pairs(value))}}}"
        module, _, name = json.loads(to_json(value))["torch"].partition(":")
        self.use(f"import {module}")
        return f"{module}.{name}"

    def lines(self, values: Mapping[str, object], *, indent: int) -> str:
        """Return Python code for a dict: on one line, or one line per key if the dict is long."""
        line = self.literal(dict(values))
        if len(line) <= _LONGEST:
            return line
        edge = "\n" + " " * indent
        pairs = [f"{edge}    {pair}," for pair in self._pairs(values)]
        return f"{{{''.join(pairs)}{edge}}}"

    def _pairs(self, values: Mapping[Any, object]) -> list[str]:
        """Return Python code for each "key: value" pair of a dict."""
        return [f"{self.literal(key)}: {self.literal(value)}" for key, value in values.items()]

    def text(self, *body: str) -> str:
        """Return the whole Python script: imports, a blank line, remarks as comments, and the
        body."""
        remarks = [f"# {remark}" for remark in self.remarks]
        return "\n".join([*self.imports, "", *remarks, *body, ""])


def snippet(study: Study) -> str:
    """Return Python code that trains the best trial again, or "" if no trial has a finite score.

    Some names, such as ``X``, ``y`` and ``cv``, have no definition, because no file holds these
    arguments of the search. Comments at the top of the code list such names.
    """
    best = best_trial(study)
    record = study.record
    script = _Script()
    if best is None:
        return ""
    if record.face == "sklearn":
        script.use("from sklearn.base import clone")
        script.argument("estimator, X, y")
        params = script.literal(best.params)
        return script.text(f"model = clone(estimator).set_params(**{params}).fit(X, y)")
    if record.face == "loop":
        objective = script.argument(clean(record.model), "the objective of the search")
        script.use("import torch")
        params = script.lines(best.params, indent=0)
        return script.text(
            f"torch.manual_seed({record.seed})",
            f"score = {objective}({params}, report=lambda value: None)",
        )
    if record.lost:
        return ""
    script.use("import gputune")
    ranked = f".ranked_by({script.literal(study.metrics[0])})" if epochs_by(study) else ""
    # Only a hypergradient search trains with these values.
    is_scheduled = not {"beta1", "beta2"}.isdisjoint(best.params) or any(
        isinstance(value, list) for value in best.params.values()
    )
    # The command line holds rows out. Only the study can read the other rows again.
    holds_rows_out = "test_size" in (record.source or {})
    needs_study = best.state == "stopped" or (record.is_hypergradient and is_scheduled)
    # Population based training has changed the configuration during the training.
    schedule = best.schedule_to_best
    needs_study = needs_study or len(best.schedule) > 1
    if not needs_study and not holds_rows_out:
        return _tune(script, study, best, ranked)
    # One call of ``tune`` cannot express this. The code reads the study, and its trial trains
    # again.
    rows = script.argument("X, y", "the rows of the search") if record.source is None else ""
    for epoch, config in schedule.items():
        begin = f", from epoch {epoch} on" if len(schedule) > 1 else ""
        script.remarks.append(_comment(f"trial {best.number}{begin}: {config!r}"))
    if study.file is None:
        script.argument("study", "the result of gputune.tune, which is not saved in a file")
        return script.text(f"model = study{ranked}.best_model()")
    path = script.literal(str(study.file.resolve()))
    return script.text(
        f"study = gputune.Study.open({path}){ranked}", f"model = study.best_model({rows})"
    )


def _tune(script: _Script, study: Study, best: Trial, ranked: str) -> str:
    """Return the Python code that trains the best trial again with ``gputune.tune``."""
    arguments = [_model(script, study.record.spec), *_rows(script, study.record)]
    arguments += [f"{name}={value}" for name, value in _options(script, study, best).items()]
    lines = [f"    {argument}," for argument in arguments]
    score = f"{best.score!r}, the {_comment(study.record.scoring)} of this report, up to rounding"
    return script.text(
        "study = gputune.tune(",
        *lines,
        f"){ranked}",
        f"print(study.best_score)  # {score}",
        "model = study.best_model()",
    )


def _comment(text: str) -> str:
    """Return text on one line and without control characters, for a Python comment."""
    return clean(" ".join(text.split()))


def _model(script: _Script, spec: Json) -> str:
    """Return Python code for the ``model`` argument of ``gputune.tune``."""
    if spec["kind"] != "module":
        return script.literal(spec["kind"])
    if "path" in spec and "keywords" not in spec:
        return script.literal(f"{spec['path']}:{spec['class']}")
    # The last part of the name. No import reaches a class that was made inside a function.
    qualified = str(spec["class"]) if "path" in spec else spec["import"].partition(":")[2]
    name = qualified.rpartition(".")[2]
    if not _is_name(name):
        name = "Module"
    if "keywords" in spec:
        remark = f"the partial of {name} of the search, with {spec['keywords']!r}"
        return script.argument(name, remark)
    imported = _import_name(script, str(spec["import"]))
    return imported or script.argument(name, "the module class of the search")


def _import_name(script: _Script, place: str) -> str:
    """Add an import of "module:name" to the script and return the name.

    The result is "" if the object cannot be imported.
    """
    module, _, name = place.partition(":")
    if module == "__main__" or not (_is_name(module) and _is_name(name)):
        return ""
    script.use(f"from {module} import {name.split('.')[0]}")
    return name


def _is_name(text: str) -> bool:
    """Return True if a text is a dotted Python name, such as "models.Net"."""
    return all(part.isidentifier() and not iskeyword(part) for part in text.split("."))


def _rows(script: _Script, record: SearchRecord) -> list[str]:
    """Return Python code for the data arguments of ``gputune.tune``, such as a path and a target
    name."""
    source = record.source
    if source is None:
        script.argument("X, y", "the rows of the search; add groups= if the search had groups")
        return ["X", "y"]
    arguments = [script.literal(source["path"]), script.literal(source["target"])]
    for name in ("groups", "drop", "kinds"):
        if source.get(name):
            arguments.append(f"{name}={script.literal(source[name])}")
    return arguments


def _options(script: _Script, study: Study, best: Trial) -> dict[str, str]:
    """Return Python code for the keyword arguments of ``gputune.tune``, by argument name."""
    record = study.record
    scoring, positive = _scorings(script, study)
    recorded = {
        part.argument: script.literal(getattr(record, name))
        for name, part in RECORD_FIELDS.items()
        if part.argument
    }
    sample_weight = "None"
    if record.sample_weight is not None:
        sample_weight = script.argument("sample_weight")
    options = {
        # A space of one point gives exactly these parameters. An included trial would be completed
        # with defaults.
        "space": script.lines({name: [value] for name, value in best.params.items()}, indent=4),
        "n_trials": "1",
        "include_default": "False",
        "cv": _folds(script, record),
        "scoring": scoring,
        "max_levels": script.literal(record.max_levels),
        "category_copies": script.literal(list(record.category_copies)),
        "n_ens": script.literal(record.n_ens),
        "class_weight": _class_weight(script, record.class_weight),
        "target_transform": _transform(script, record.target_transform),
        "sample_weight": sample_weight,
        **recorded,
        "positive": script.literal(positive),
        "device": script.literal(record.device),
        "verbose": "0",
    }
    if record.is_hypergradient:
        options["epoch"] = "'last'"
    defaults = {
        **dict.fromkeys(
            ("positive", "patience", "class_weight", "sample_weight", "target_transform"), "None"
        ),
        "columns": "'keep'" if record.spec["kind"] == "module" else "'drop-constant'",
        "numbers": "'standard'",
        "max_levels": str(SearchRecord.max_levels),
        "category_copies": "[]",
        "n_ens": str(SearchRecord.n_ens),
        "schedule": "'constant'",
    }
    if record.fingerprint["rows"] > LARGE_TABLE:
        del defaults["patience"]  # the default depends on the number of rows
    return {name: value for name, value in options.items() if value != defaults.get(name)}


def _folds(script: _Script, record: SearchRecord) -> str:
    """Return Python code for the argument ``cv``, the folds of the search."""
    text = record.cv
    if text.isdigit():
        return text
    if text.startswith("time:"):
        return script.literal(text)
    return script.argument("cv", f"the {_comment(text)} of the search")


def _scorings(script: _Script, study: Study) -> tuple[str, object]:
    """Return Python code for the argument ``scoring``, and the positive class.

    If another metric than the ranking metric chose the epochs, the code lists both, ranking metric
    last.
    """

    record = study.record
    by = epochs_by(study)
    if not by:
        return _scorer(script, record.scoring), record.ranked_class
    chooser = next(metric for metric in record.metrics if metric["name"] == by)
    scorers = []
    positive = None
    for metric in (chooser, record.metrics[0]):
        scorers.append(f"{script.literal(metric['name'])}: {_scorer(script, metric['scorer'])}")
        if positive is None:
            positive = metric["positive"]
    return f"{{{', '.join(scorers)}}}", positive


def _scorer(script: _Script, name: str) -> str:
    """Return Python code for a scorer: its scikit-learn name, or an imported function."""
    if ":" not in name:
        return script.literal(name)
    return _import_name(script, name) or script.argument("scoring")


def _transform(script: _Script, recorded: str | Json | None) -> str:
    """Return Python code for the argument ``target_transform``."""
    if not isinstance(recorded, Mapping):
        return script.literal(recorded)
    if "ufunc" in recorded:
        script.use("import numpy")
        return f"numpy.{recorded['ufunc']}"
    if "params" not in recorded:
        return script.argument("target_transform")
    script.use(f"from sklearn.preprocessing import {recorded['class']}")
    params = (f"{name}={_transform(script, value)}" for name, value in recorded["params"].items())
    return f"{recorded['class']}({', '.join(params)})"


def _class_weight(script: _Script, text: str | None) -> str:
    """Return Python code for the argument ``class_weight``, from the text in the study."""
    if text is None:
        return "None"
    try:
        return script.literal(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return script.argument("class_weight")
