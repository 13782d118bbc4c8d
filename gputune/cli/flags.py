"""The flags of a search. Messages on the command line name these flags, not Python arguments."""

import ast
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from gputune.executors.cluster import cluster_class
from gputune.ground.entry_points import integrations
from gputune.ground.errors import Interface, Reference
from gputune.ground.types import OPTIMIZERS
from gputune.tuning.method import method_classes
from gputune.tuning.options import RULES
from gputune.tuning.preset_table import PRESETS
from gputune.tuning.rules import (
    COMPUTE,
    DATA,
    HYPERGRADIENTS,
    MODEL,
    OUTPUT,
    POPULATION,
    SEARCH,
    STOPPING,
    Rule,
)

METHOD_CLASSES = method_classes()
"""The search methods by name. Their flags are part of the command line."""


def _method_flags(group: str) -> dict[str, Rule]:
    """Return the flags of all search methods that belong to a group of the help."""
    rules = {}
    for kind in METHOD_CLASSES.values():
        rules.update({key: rule for key, rule in kind.flags.items() if rule.group == group})
    return rules


def _help_of_methods() -> str:
    """Return one sentence about each search method that describes itself."""
    methods = METHOD_CLASSES.values()
    return " ".join(f"{kind.name}: {kind.help}." for kind in methods if kind.help)


def _help_of_presets() -> str:
    """Return one sentence about each preset."""
    return " ".join(f"{name}: {preset.help}." for name, preset in PRESETS.items())


_FIRST_RULES: dict[str, dict[str, Rule]] = {
    DATA: {
        "target": Rule("--target <NAME>", "Column to predict", default="target of sklearn:NAME"),
        "groups": Rule(
            "--groups <NAME>", "Column with the group of each row; no group is split between folds"
        ),
        "test_size": Rule(
            "--test-size <SHARE>",
            "Share of rows to hold out",
            "These rows give one unbiased score. 0 uses all rows for the search.",
            "0.2",
            takes="number",
        ),
    },
    MODEL: {
        "model": Rule(
            "--model <NAME>",
            "Model to tune, or your own module",
            "cnn is for images and sequences, gru for sequences.",
            "mlp",
            values=("mlp", "logistic", "realmlp", "cnn", "gru", "FILE.py:NAME"),
        ),
        "optimizer": Rule(
            "--optimizer <NAME>",
            "Optimizer",
            "Optimizers whose names end in hd adapt their learning rate. A module also "
            "takes a class of torch.optim, such as RAdam.",
            "adamw; exact for logistic",
            values=(*OPTIMIZERS, "exact"),
        ),
    },
    SEARCH: {
        "preset": Rule(
            "--preset <NAME>",
            "Choice of model, trials, epochs and ensemble for a table",
            "The choices depend on the rows, the columns and --timeout. Flags that you write win over "
            f"the preset. {_help_of_presets()}",
            values=tuple(PRESETS),
        ),
        "config_file": Rule(
            "--config <FILE>",
            "TOML file with options",
            "A key is a flag without its leading dashes, or a Python argument. [space] is a "
            "TOML table. Flags on the command line override the file.",
        ),
    },
    STOPPING: _method_flags(STOPPING),
    POPULATION: _method_flags(POPULATION),
    HYPERGRADIENTS: _method_flags(HYPERGRADIENTS),
    COMPUTE: {},
    OUTPUT: {
        "study": Rule(
            "--out <FOLDER>",
            "Folder for study.db and model/",
            "Repeat the command to resume a stopped search.",
            "gputune-out",
        ),
    },
}
"""Flags that set no option of a search and come first in their help group, by group title."""

_LAST_RULES: dict[str, dict[str, Rule]] = {
    SEARCH: {
        "sampler": Rule(
            "--sampler <NAME>",
            "Optuna sampler that proposes configurations in batches",
            "The sampler needs the package optuna.",
            choices=("tpe",),
        ),
    },
    COMPUTE: {},
    OUTPUT: {
        "ensemble": Rule(
            "--ensemble",
            "Also make an ensemble of the best trials",
            "The model that is better on the held-out rows is saved.",
            stored=True,
            resume=True,
        ),
        "intervals": Rule(
            "--intervals",
            "Store residuals with the model, for gputune predict --interval",
            stored=True,
            resume=True,
        ),
        "calibrate": Rule(
            "--calibrate",
            "Calibrate class probabilities by temperature scaling",
            default="only if --scoring is neg_log_loss",
            stored=True,
            resume=True,
        ),
        "compare_default": Rule(
            "--compare-default",
            "Also train the default configuration, to compare held-out scores",
            "Both models train on all rows that are not held out.",
            "only if this training takes less than a tenth of the search's steps",
            takes="yes or no",
            stored=True,
            resume=True,
        ),
        "dry_run": Rule(
            "--dry-run",
            "Print the plan of the search, and train nothing",
            "The plan shows rows, features, trials, memory, device and an estimate of the time. "
            "No file is written.",
        ),
        "json": Rule(
            "--json",
            "Print the result, or the error, as one JSON document on standard output",
            "The keys are in the page on agents and programs. Progress and warnings go to standard "
            "error.",
            resume=True,
        ),
        "profile": Rule(
            "--profile",
            "At the end, print how the time was spent",
            "Also print the speed of the training as a share of the machine's speed for matrix "
            "products.",
            resume=True,
        ),
    },
}
"""Flags that set no option of a search and come last in their help group, by group title."""


def option_groups() -> dict[str, dict[str, Rule]]:
    """Return the flags that ``gputune tune --help`` shows, keyed by the title of their group."""
    groups = {title: dict(rules) for title, rules in _FIRST_RULES.items()}
    for name, rule in RULES.items():
        if rule.flag:
            groups[rule.group][name] = rule
    method = groups[SEARCH]["method"]
    groups[SEARCH]["method"] = replace(method, details=_help_of_methods())
    for title, rules in _LAST_RULES.items():
        groups[title] |= rules
    groups[COMPUTE] |= _cluster_rules()
    return groups


def _cluster_rules() -> dict[str, Rule]:
    """Return a flag for each cluster, such as ``--ray``."""
    rules = {}
    for name in integrations("clusters"):
        cluster = cluster_class(name)
        rules[name] = Rule(
            f"--{name} [<ADDRESS>]",
            f"Train on a {cluster.title} cluster",
            f"Without an address, the cluster is {cluster.addresses[0]}.",
            values=cluster.addresses,
            resume=True,
        )
    return rules


def flags() -> dict[str, str]:
    """Return the flags by argument name, for ``gputune.tune`` and for the search methods."""
    by_name = {"verbose": "--quiet"}
    for rules in option_groups().values():
        by_name |= {name: rule.name for name, rule in rules.items()}
    return by_name


_OF_CALLS = {
    ("ranked_by", "metric"): "--by",
    ("report", "confusion"): "--confusion",
    ("report", "importance"): "--importance",
    ("export", "path"): "--out",
    ("repair", "out"): "--out",
    ("predict_interval", "level"): "--interval",
    ("load_model", "module"): "--module",
}
"""The flags that messages show for arguments of functions other than ``gputune.tune``."""

_OF_COMMANDS = {
    "search": {"objective": "FILE.py:NAME", "direction": "--direction"},
    "train": {"include": "--set", "space": "--set"},
    "check": {
        "include": "--set",
        "space": "--set",
        "model": "--module",
        "numbers": "--set numbers",
        "optimizer": "--set optimizer",
        "schedule": "--set schedule",
    },
}
"""The flags of some commands that differ from those of ``gputune tune``, by argument name."""


class CommandLine(Interface):
    """The command-line names of arguments, which messages show instead of the Python names.

    Args:
        command: Name of the command, such as "tune".
        file: The table of the command, as the user wrote it.
        typed: Other names that the user typed for flags, by flag, such as --budget for --timeout.
    """

    name = "command"

    def __init__(
        self,
        command: str = "tune",
        file: str = "FILE",
        typed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.file = file
        known = {**flags(), **_OF_COMMANDS.get(command, {})}
        self.known = {name: typed.get(flag, flag) for name, flag in known.items()}
        self.known["y"] = self.known["target"]
        self.calls = dict(_OF_CALLS)
        for name in integrations("clusters"):
            self.calls[cluster_class(name).__name__, "address"] = self.known[name]
        if command not in ("tune", "train", "search"):
            del self.known["study"]  # it is the command's FOLDER

    def argument(self, reference: Reference) -> str:
        """Return an argument in the form of the command line: ``--cv 5`` for ``cv=5``."""
        if reference.call in {kind.__name__ for kind in METHOD_CLASSES.values()}:
            flag = self.known.get(reference.name)
        elif reference.call:
            flag = self.calls.get((reference.call, reference.name))
        elif reference.name == "X":
            flag = self.file
        else:
            flag = self.known.get(reference.name)
        if flag is None:
            return str(reference)
        if reference.name == "include" and len(reference.keys) > 1:
            return _unquoted(reference.keys[-1])  # a key of one configuration
        kinds = _literal(reference.value) if reference.name == "kinds" else None
        if isinstance(kinds, dict):
            return " ".join(f"{flag} {column}={kind}" for column, kind in kinds.items())
        if reference.keys and reference.name == "space":
            flag = f"{flag} {_unquoted(reference.keys[0])}"
        return self._with_value(flag, reference)

    def _with_value(self, flag: str, reference: Reference) -> str:
        """Return a flag with the value of its argument. The path of a study becomes its folder."""
        value = reference.value
        if value in (None, "", "...", "True", "False"):
            return flag
        text = _unquoted(value)
        if value.startswith(("(", "[")):
            items = _literal(value)
            words = items if isinstance(items, list | tuple) else re.findall(r"\w+", value)
            text = ",".join(map(_in_quotes, map(str, words)))
        if reference.name == "workers" and text in self.known:
            return str(self.known[text])  # a cluster has a flag, such as --ray
        if reference.name == "study":
            # The command line takes the folder of a study.
            folder = Path(text).parent
            here = Path.cwd()
            text = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
        separator = "=" if flag.startswith("--set ") else " "  # --set KEY=VALUE
        return f"{flag}{separator}{shlex.quote(text)}"


def _in_quotes(name: str) -> str:
    """Return a name for a list with commas, in quotes if it has a comma, quotes or a line break."""
    quoted = name.replace('"', '""')
    return f'"{quoted}"' if any(mark in name for mark in ',"\n') else name


def _unquoted(value: str) -> str:
    """Return the text of a Python string literal. Other Python code is returned unchanged."""
    text = _literal(value)
    return text if isinstance(text, str) else value


def _literal(value: str | None) -> object:
    """Return the value of a Python literal, or None for other code.

    A user's text, such as the name of a column, may look like a reference with any value.
    """
    try:
        return ast.literal_eval(value or "")
    except (SyntaxError, ValueError):
        return None
