"""The code that trains the best trial of a study again, written from what the study knows of its search."""

import ast
import json
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

import numpy as np

from gputune.report.facts import best_trial
from gputune.study.record import PARTS, SearchRecord
from gputune.study.rows import to_json
from gputune.study.study import Study
from gputune.text import clean

_LONGEST = 70


class _Code:
    """Lines of a script: imports, what the reader must have, then the call."""

    def __init__(self) -> None:
        self.imports: list[str] = []
        self.remarks: list[str] = []

    def use(self, line: str) -> None:
        """Add an import once."""
        if line not in self.imports:
            self.imports.append(line)

    def literal(self, value: Any) -> str:
        """Return a value as Python that gives it back, with what must be imported for it."""
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
                return f"{{{', '.join(f'{self.literal(k)}: {self.literal(v)}' for k, v in value.items())}}}"
        module, _, name = json.loads(to_json(value))["torch"].partition(":")
        self.use(f"import {module}")
        return f"{module}.{name}"

    def script(self, *body: str) -> str:
        """Return the whole: imports, a blank line, remarks, the body."""
        remarks = [f"# {remark}" for remark in self.remarks]
        return "\n".join([*self.imports, "", *remarks, *body]) + "\n"


def again_code(study: Study) -> str:
    """Return Python that trains the best trial again; "" where no trial has a finite score.

    Names that it uses without defining them (``X``, ``y``, ``cv``, ...) are what the search was given and no file
    holds; its first lines say so.
    """
    best = best_trial(study)
    if best is None:
        return ""
    code, record = _Code(), study.record
    if record.face == "sklearn":
        return _sklearn(code, study)
    if record.lost:
        return ""
    if _is_scheduled(study) or best.state == "stopped":
        return _from_file(code, study)
    return _tune(code, study)


def _sklearn(code: _Code, study: Study) -> str:
    code.use("from sklearn.base import clone")
    code.remarks.append("estimator, X, y: what the search was given")
    best = best_trial(study)
    assert best is not None
    params = ", ".join(f"{code.literal(name)}: {code.literal(value)}" for name, value in best.params.items())
    return code.script(f"model = clone(estimator).set_params(**{{{params}}}).fit(X, y)")


def _is_scheduled(study: Study) -> bool:
    """Whether the best trial has values that only a descent trains with."""
    best = best_trial(study)
    assert best is not None
    return study.record.descends and any(
        isinstance(v, list) or k in ("beta1", "beta2") for k, v in best.params.items()
    )


def _from_file(code: _Code, study: Study) -> str:
    """Return code that reads the study and refits it: the way of what one call of ``tune`` cannot say."""
    code.use("import gputune")
    memory = study.record.source is None
    if memory:
        code.remarks.append("X, y: the rows of the search")
    if study.file is None:
        code.remarks.append("study: what gputune.tune returned; it was kept in no file")
        return code.script("model = study.best_model()")
    rows = "X, y" if memory else ""
    return code.script(
        f"study = gputune.Study.open({code.literal(str(study.file.resolve()))})",
        f"model = study.best_model({rows})",
    )


def _tune(code: _Code, study: Study) -> str:
    code.use("import gputune")
    best, measure = best_trial(study), study.record.scoring
    assert best is not None
    body, rows = _rows(code, study)
    lines = [f"    {_model(code, study.record.spec)},", *(f"    {row}," for row in rows)]
    lines += [f"    {name}={value}," for name, value in _options(code, study).items()]
    return code.script(
        *body,
        "study = gputune.tune(",
        *lines,
        ")",
        f"print(study.best_score)  # {best.score!r}, the {_comment(measure)} of this page, but for rounding",
        "model = study.best_model()",
    )


def _comment(text: Any) -> str:
    """Return text that stays within a comment."""
    return clean(" ".join(str(text).split()))


def _model(code: _Code, spec: Mapping[str, Any]) -> str:
    if spec["kind"] != "module":
        return code.literal(spec["kind"])
    if "path" in spec:
        return code.literal(f"{spec['path']}:{spec['class']}")
    module, _, name = str(spec["import"]).partition(":")
    if module != "__main__" and _is_name(module) and _is_name(name):
        code.use(f"from {module} import {name.split('.')[0]}")
        return name
    last = name.rpartition(".")[2]  # of a class that was made within a function, which no import reaches
    last = last if _is_name(last) else "Module"
    code.remarks.append(f"{last}: the module class of the search")
    return last


def _is_name(text: str) -> bool:
    return all(part.isidentifier() and not iskeyword(part) for part in text.split("."))


def _rows(code: _Code, study: Study) -> tuple[list[str], list[str]]:
    """Return lines before the call, and its arguments that are the rows."""
    source = study.record.source
    if source is None:
        code.remarks.append("X, y: the rows of the search; add groups= where it had them")
        return [], ["X", "y"]
    if "test_size" in source:
        code.use("from gputune.data.source import read_again")
        origin = _over_lines(code, source, indent=0)
        lines = ["# the rows of the search, without those that were held out", f"rows = read_again({origin})"]
        return lines, ["rows.X", "rows.y", "groups=rows.groups"]
    groups = [f"groups={code.literal(source['groups'])}"] if source.get("groups") else []
    return [], [code.literal(source["path"]), code.literal(source["target"]), *groups]


def _options(code: _Code, study: Study) -> dict[str, str]:
    record, best = study.record, best_trial(study)
    assert best is not None
    options = {
        # A space of one point gives these very parameters; an included trial would be filled up with defaults.
        "space": _over_lines(code, {name: [value] for name, value in best.params.items()}, indent=4),
        "n_trials": "1",
        "include_default": "False",
        "cv": _folds(code, record),
        "scoring": _scoring(code, record.scoring),
        "class_weight": _class_weight(code, record.class_weight),
        "sample_weight": _given(code, "sample_weight") if record.sample_weight is not None else "None",
        **{
            part.argument: code.literal(getattr(record, name))
            for name, part in PARTS.items()
            if part.argument
        },
        **({"epoch": "'last'"} if record.descends else {}),
        "device": code.literal(record.device),
        "verbose": "0",
    }
    absent = {
        "None": ("positive", "class_weight", "sample_weight"),
        "'drop-constant'" if record.spec["kind"] != "module" else "'keep'": ("columns",),
        "'standard'": ("numbers",),
        "'constant'": ("schedule",),
    }
    left_out = {name for value, names in absent.items() for name in names if options[name] == value}
    return {name: value for name, value in options.items() if name not in left_out}


def _over_lines(code: _Code, values: Mapping[str, Any], *, indent: int) -> str:
    """Return a dict on one line, or with a line for each key where that is too long."""
    line = code.literal(dict(values))
    if len(line) <= _LONGEST:
        return line
    edge = "\n" + " " * indent
    inside = "".join(
        f"{edge}    {code.literal(key)}: {code.literal(value)}," for key, value in values.items()
    )
    return f"{{{inside}{edge}}}"


def _given(code: _Code, name: str) -> str:
    code.remarks.append(f"{name}: what the search was given")
    return name


def _folds(code: _Code, record: SearchRecord) -> str:
    text, source = record.cv, record.source or {}
    if text.isdigit():
        return text
    if str(source.get("cv", "")).startswith("time:"):
        code.use("from gputune.data.folds import parse_cv")
        return f"parse_cv({code.literal(source['cv'])})"
    code.remarks.append(f"cv: the {_comment(text)} of the search")
    return "cv"


def _scoring(code: _Code, name: str) -> str:
    module, colon, function = name.partition(":")
    if not colon:
        return code.literal(name)
    if module == "__main__" or not (_is_name(module) and _is_name(function)):
        return _given(code, "scoring")
    code.use(f"from {module} import {function.split('.')[0]}")
    return function


def _class_weight(code: _Code, text: str | None) -> str:
    """Return the weights of the classes, which a study holds as the text of their value."""
    if text is None:
        return "None"
    try:
        return code.literal(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return _given(code, "class_weight")
