"""Presets: named choices of model, portfolio, epochs and final model for a table.

A preset chooses from the table and the timeout, never from the speed of the machine. The same call
therefore makes the same choices on every machine.

A study stores the choices of its preset. A later call with the same preset and study takes them from
there, so that a stopped search can be resumed with another timeout.
"""

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gputune.data.columns import AnyRows
from gputune.data.folds import TimeSplit, check_groups
from gputune.data.name_like import name_like_columns
from gputune.data.table import Table
from gputune.data.target import check_target
from gputune.ground.errors import (
    InputError,
    StudyCorruptError,
    StudyVersionError,
    Verbatim,
    option,
    per_interface,
)
from gputune.ground.text import count, did_you_mean
from gputune.ground.types import Json
from gputune.study.record import SearchRecord
from gputune.study.store import Store
from gputune.tuning.choices import ModelChoice, choose_model
from gputune.tuning.options import RULES, make_options
from gputune.tuning.preset_table import ALIASES, PRESETS, ModelName, Preset
from gputune.tuning.record import SearchCall
from gputune.tuning.task_choice import chosen_task

AUTO = "auto"
"""The model of a call whose preset chooses the model."""

_SECONDS: Mapping[ModelName, tuple[float, float, float]] = {
    "mlp": (2.0, 4e-6, 0.28e-6),
    "realmlp": (20.0, 18e-6, 0.55e-6),
}
"""CPU seconds of a search, for each model:

- the seconds before the first epoch,
- the seconds of one epoch of one network, for each row,
- and more of these seconds, for each column.

They were measured on an EPYC core. The figures of realmlp are from searches of realmlp-large on 10,000
to 17,000 rows of 8 to 16 columns, while the other core was busy, and are rounded up. The figures of
mlp are from the first eight trials of the space mlp, on 5,000 rows of 10 and of 60 numeric columns."""
_FINAL_SHARE = 0.5
"""The share of the trials that the final ensemble trains again, on all rows, for the estimate.

On 10,000 rows of california, the ensemble took 29 s after a search of 182 s in three folds, which is a
share of 0.32."""
_MANY_ROWS = 10_000
"""With more rows, three folds instead of five are enough, and a preset may have another space."""
_MOST_NETWORKS = (8, 4, 2)
"""Numbers of networks per trial for a timeout that leaves time. AutoGluon's portfolio has 8."""
_ROWS_PER_NETWORK = 10
"""Fewest rows of a table for each of these networks. The search refuses more networks than rows."""


def check_preset(name: object, model: object) -> str:
    """Return the short name of a preset.

    Raises InputError for an unknown name, and for a model between which presets do not choose.
    """
    short = ALIASES.get(str(name), str(name))
    if short not in PRESETS:
        raise InputError(
            "preset",
            f"must be one of {', '.join(PRESETS)}",
            got=name,
            remedy=did_you_mean(name, (*PRESETS, *ALIASES)).strip(),
        )
    if model not in (AUTO, "mlp", "realmlp"):
        module = getattr(model, "__name__", None) or type(model).__name__
        raise InputError(
            option("preset", name),
            "chooses the settings of mlp and realmlp for a table, and has none for another model",
            got=Verbatim(f"the model {model if isinstance(model, str) else module}"),
            remedy=f"Leave {option('preset')} out"
            + per_interface(', or pass "auto" as the model.', ", or leave --model out."),
        )
    return short


def choose_before_preset(preset: object, model: object, optimizer: object) -> ModelChoice:
    """Return the chosen model, or the MLP in place of a model that the preset still chooses.

    ``preset`` is None for a call without a preset. Raises InputError for an unknown preset, for a
    model between which presets do not choose, and for a bad model or optimizer.
    """
    if preset is not None:
        check_preset(preset, model)
        if model == AUTO:
            model = "mlp"
    return choose_model(model, optimizer)


@dataclass(frozen=True)
class _Case:
    """The facts from which a preset chooses: a table, and the arguments of the user.

    ``is_table`` is False for tensors and for several inputs, whose numbers have fewer scalings.
    ``values`` are the user's arguments by name, with "model", "ensemble" and "calibrate".
    ``name_like`` are the columns of numbers that are like names.
    """

    rows: int
    columns: int
    is_table: bool
    has_classes: bool
    values: Mapping[str, Any]
    name_like: list[str]

    @property
    def folds(self) -> int:
        cv = self.values.get("cv", 3 if self.rows > _MANY_ROWS else 5)
        return cv if isinstance(cv, int) else 5

    def seconds(self, chosen: Mapping[str, Any]) -> float:
        """Return the estimated CPU seconds of the search and of the final model."""
        fixed, constant, per_column = _SECONDS[chosen["model"]]
        networks = int(chosen["n_trials"] * chosen["n_ens"] * chosen["max_epochs"])
        passes = self.folds - 1 + (_FINAL_SHARE if chosen["ensemble"] else 0)
        return fixed + networks * passes * self.rows * (constant + per_column * self.columns)

    def epochs_within(self, chosen: Mapping[str, Any], seconds: float) -> int:
        """Return the number of epochs, at most the chosen one, that fits into some seconds."""
        most: int = chosen["max_epochs"]
        if self.seconds(chosen) <= seconds:
            return most
        fixed = _SECONDS[chosen["model"]][0]
        training = self.seconds(chosen) - fixed
        return math.floor((seconds - fixed) / training * most) if training > 0 else most


def with_preset(call: SearchCall, name: str, model: object, optimizer: object) -> SearchCall:
    """Return the call of a search with the choices of a preset.

    The options that the user passed win over the preset. If the call continues a study of the same
    preset, the choices in the study replace new ones.

    Args:
        call: The call with the user's arguments, and with the model mlp if the preset chooses it.
        name: The name of the preset.
        model: The user's model, or "auto".
        optimizer: The user's optimizer, or None.

    Raises:
        InputError: the preset does not fit the model or the search method.
    """
    short = check_preset(name, model)
    options = call.options
    if options.search.differentiates:
        raise InputError(
            option("preset", name),
            "chooses a portfolio and an ensemble, which a hypergradient search does not have",
            got=Verbatim(option("method", "hypergradient")),
            remedy="Leave one of them out.",
        )
    stored = _stored_choices(options.machine.study, short, call.source.X)
    case = _case(call, model, find_names=not stored)
    chosen = {**_choices(short, case), **stored, **case.values}
    chosen = {key: value for key, value in chosen.items() if key not in _not_chosen(call)}
    # Choices that are equal to the default need no words.
    defaults = make_options().values()
    values = {
        key: chosen[key]
        for key in RULES
        if key in chosen and key not in case.values and chosen[key] != _as_written(defaults[key])
    }
    extras = {key: True for key in _EXTRAS if chosen[key]}
    to_store = {key: chosen[key] for key in _STORED if key in chosen and key not in case.values}
    verb = "keeps its choices in this study" if stored else "chooses"
    return replace(
        call,
        choice=choose_model(chosen["model"], optimizer),
        options=options.changed(**values),
        final_model={**extras, **call.final_model},
        preset=_sentence(f"{option('preset', name)} {verb}", chosen["model"], values, extras, case),
        preset_choices={"name": short, "choices": to_store},
    )


def _stored_choices(path: Path | None, name: str, X: AnyRows) -> Json:
    """Return the choices of a preset in a study file, by argument name.

    The result is empty if the file has no choices of this preset. It is also empty for a faulty
    file, because a later step reports the fault. A file may come from a stranger, so only the
    models and the arguments of presets are read from it.
    """
    if path is None or not path.exists():
        return {}
    with suppress(OSError, StudyCorruptError, StudyVersionError), Store.open(path) as store:
        preset = SearchRecord.from_json(store.meta).arguments.preset
        choices = preset.get("choices", {})
        if preset.get("name") == name and choices.get("model", "mlp") in _SECONDS:
            stored = {key: choices[key] for key in _STORED if key in choices}
            if stored:
                # A later step reports that the study has other rows.
                numbers = set[str]()
                if isinstance(X, Table):
                    numbers = {column for column in X.names if X.kind(column) == "number"}
                copies = stored.get("category_copies", ())
                stored["category_copies"] = [column for column in copies if column in numbers]
            return stored
    return {}


def _case(call: SearchCall, model: object, *, find_names: bool) -> _Case:
    """Return the table and the user's arguments of a call.

    ``find_names`` is False if a study already has the columns that are like names.
    """
    source = call.source
    X = source.X
    options = call.options
    task = chosen_task(source, call.choice, options)
    target = check_target(source.y, task=task, n_rows=len(X), name=source.target)
    columns = 1
    if isinstance(X, Table):
        columns = len(X.names)
    elif isinstance(X, Tensor):
        columns = X.shape[1] if X.dim() > 1 else 1
    values = call.chosen_by_user()
    if model != AUTO:
        values["model"] = model
    has_classes = target.task in ("binary", "multiclass")
    name_like = list[str]()
    # Validation rows that a split sets apart, such as later rows, must not choose features.
    cv = options.rows.cv
    has_random_folds = isinstance(cv, int | np.integer)
    is_asked = find_names and "category_copies" not in values
    if isinstance(X, Table) and is_asked and has_random_folds:
        name_like = name_like_columns(X, target.values, check_groups(source.groups, len(X)))
    return _Case(len(X), columns, isinstance(X, Table), has_classes, values, name_like)


def _not_chosen(call: SearchCall) -> set[str]:
    """Return the options that a preset must not set, because the search does not support them."""
    names = set()
    if call.options.search.method.decides_length or call.options.training.epoch == "last":
        names.add("patience")
    if call.choice.optimizer != "adamw":  # the portfolios were measured with AdamW
        names.add("space")
    return names


def _choices(name: str, case: _Case) -> dict[str, Any]:
    """Return the choices of a preset for a table, by argument name, with the user's arguments."""
    preset = PRESETS[name]
    chosen: dict[str, Any] = {
        "model": preset.model,
        "n_trials": preset.n_trials,
        "cv": case.folds,
        "max_epochs": preset.epochs_for(case.rows),
        "n_ens": 1,
        "patience": preset.patience,
        "timeout": preset.timeout,
        "ensemble": preset.ensemble,
        "calibrate": case.has_classes,
        "space": _space_of(preset, case),
        "category_copies": case.name_like,
    }
    chosen |= case.values
    timeout = case.values.get("timeout")
    if timeout is None:
        return chosen
    if "max_epochs" not in case.values:
        # With a timeout, the number of rows does not limit the epochs.
        fewest, most = preset.epochs
        within = case.epochs_within({**chosen, "max_epochs": most}, timeout)
        chosen["max_epochs"] = max(fewest, within)
    is_too_long = case.seconds(chosen) > timeout
    if is_too_long and preset.faster and "model" not in case.values:
        return _choices(preset.faster, case)
    if "n_ens" not in case.values and preset.ensemble:
        for n_ens in _MOST_NETWORKS:
            is_allowed = n_ens * _ROWS_PER_NETWORK <= case.rows
            if is_allowed and 2 * n_ens * case.seconds(chosen) <= timeout:
                chosen["n_ens"] = n_ens
                break
    return chosen


def _space_of(preset: Preset, case: _Case) -> str:
    """Return the name of the space that a preset chooses for a table."""
    model: str = case.values.get("model", preset.model)
    # The space for large tables chooses the scaling of the numbers.
    is_large = case.rows > _MANY_ROWS and case.is_table and "numbers" not in case.values
    if is_large and preset.large_space and model == preset.model:
        return preset.large_space
    return model  # the space of this name has a portfolio


_EXTRAS = {
    "ensemble": ("an ensemble", "--ensemble"),
    "calibrate": ("calibrated probabilities", "--calibrate"),
}
"""The choices for the final model, in words and as a flag."""
_SHOWN = (
    "model",
    "space",
    "n_trials",
    "cv",
    "max_epochs",
    "n_ens",
    "patience",
    "timeout",
    "category_copies",
)
"""The arguments that a preset may choose."""
_OF_PORTFOLIOS = ("numbers", "schedule")
"""The options that the configurations of a portfolio change, unless the user chose them."""
_STORED = tuple(key for key in (*_SHOWN, *_EXTRAS) if key != "timeout")
"""The choices that a study keeps. Each call may have another timeout."""


def _sentence(
    beginning: str,
    model: ModelName,
    values: Mapping[str, Any],
    extras: Collection[str],
    case: _Case,
) -> str:
    """Return the plan of a preset for the user, with the choices of the preset and of the user."""
    words = [] if "model" in case.values else [option("model", model)]
    words += [option(key, value) for key, value in values.items() if value is not None]
    words += [per_interface(*_EXTRAS[key]) for key in extras]
    size = f"{count(case.rows, 'row')} and {count(case.columns, 'column')}"
    text = f"{beginning} for {size}: {', '.join(words)}"
    chosen_by_user = [
        option(key, _as_written(case.values[key]))
        for key in (*_SHOWN, *_OF_PORTFOLIOS)
        if key in case.values
    ]
    if chosen_by_user:
        text += f"; you chose {', '.join(chosen_by_user)}"
    if "ensemble" in extras:
        text += per_interface("; study.ensemble() then makes the model", "")
    return text


def _as_written(value: object) -> object:
    """Return a value of an option as users write it: 60 for 60.0 seconds, "time:5" for its split,
    and a list of names."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, TimeSplit):
        return str(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
