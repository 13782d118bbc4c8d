"""The form of what a study file holds as JSON: a value of another type is damage, found when the file is read.

A form is a type (int and float: of 64 bits), None, a text, a tuple of forms to choose from, [form] for a list,
{"": form} for an object of such values, or an object of forms by key: those that end in "?" may be missing, further
keys are free.
"""

from typing import Any

_TEXT = (str, None)
_FINGERPRINT = {"rows": int, "columns": int, "sha256": str}
_NUMBERS: list[Any] = []  # nested lists of numbers
_NUMBERS.append((float, _NUMBERS))

OPTIONS: dict[str, Any] = {
    "": int,
    "face": str,
    "model": str,
    "spec": (
        {"kind": "module", "path": str, "class": str},
        {"kind": "module", "import": str},
        {"kind": "mlp"},
        {"kind": "logistic"},
    ),
    "optimizer": str,
    "schedule": str,
    "space": str,
    "distributions": {"": {"kind": str}},
    "method": (str, {"name": str, "hyperparameters?": ([str], (str,)), "sampler?": str}),
    "task": str,
    "target": str,
    "classes": ([(str, bool, float)], None),
    "source": (
        {
            "path": str,
            "target": str,
            "groups": _TEXT,
            "rows?": int,
            "cv?": str,
            "seed?": int,
            "test_size?": float,
            "task?": _TEXT,
            "held_out?": _FINGERPRINT,
        },
        None,
    ),
    "fingerprint": _FINGERPRINT,
    "features": int,
    "notes": [str],
    "columns": str,
    "numbers": str,
    "class_weight": _TEXT,
    "sample_weight": _TEXT,
    "cv": str,
    "folds": int,
    "splits": str,
    "scoring": str,
    "positive": (str, bool, float, None),
    "epoch": str,
    "max_epochs": int,
    "seed": int,
    "dtype": str,
    "device": str,
    "versions": {"": str},
    "arguments": {
        "kept": dict,
        "space": ([dict], None),
        "folds": [[str]],
        "lacking": [str],
        "callbacks": [str],
    },
}
DETAIL = {
    "loss?": float, "ratio?": float, "usable?": bool, "mode?": str, "rung?": int, "reason?": str,
    "slope?": {"": (float, _NUMBERS)}, "slope_error?": {"": (float, _NUMBERS)},
}  # fmt: skip


def has_form(value: Any, form: Any) -> bool:
    """Whether a value that was read has a form."""
    match form:
        case tuple():
            return any(has_form(value, one) for one in form)
        case list():
            return isinstance(value, list | tuple) and all(has_form(item, form[0]) for item in value)
        case {"": inner}:
            return isinstance(value, dict) and all(
                type(k) is str and has_form(v, inner) for k, v in value.items()
            )
        case dict():
            return isinstance(value, dict) and all(
                has_form(value[key], inner) if (key := name.rstrip("?")) in value else name.endswith("?")
                for name, inner in form.items()
            )
        case None | str():
            return bool(value == form)
    if type(value) is int and form in (int, float):
        return -(2**63) <= value < 2**63
    return type(value) is form
