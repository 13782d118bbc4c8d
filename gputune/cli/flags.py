"""The flags of a search, and the rendering of messages with flags instead of Python arguments."""

import ast
import re
import shlex
from pathlib import Path

from gputune.tuning.options import MACHINE, ROWS, RULES, SEARCH, Rule
from gputune.wording import Interface, Reference

_MIN_EPOCHS = Rule(
    "--min-epochs E",
    "with --method halving: epochs before the first rung [default: 1/27 of --epochs]; with "
    "median: before the first decision [default: 1/10]",
    "1..",
)

METHOD_RULES: dict[str, dict[str, Rule]] = {
    "halving": {
        "factor": Rule(
            "--factor F",
            "with --method halving: the best 1/F of the trials continue after a rung [default: 3]",
            "number",
        ),
        "min_epochs": _MIN_EPOCHS,
        "brackets": Rule(
            "--brackets N",
            "with --method halving: number of brackets, each with a later first rung [default: 1]",
            "1..",
        ),
    },
    "median": {
        "min_epochs": _MIN_EPOCHS,
        "every": Rule(
            "--every E",
            "with --method median: epochs between two decisions [default: --min-epochs]",
            "1..",
        ),
    },
    "hypergradient": {
        "hyperparameters": Rule(
            "--descend-on KEY,KEY",
            "with --method hypergradient: some of lr, momentum, weight_decay, beta1, beta2; C for "
            "the solved logistic regression [default: lr]",
            "names",
        ),
        "outer_steps": Rule(
            "--outer-steps N",
            "with --method hypergradient: steps from each starting point [default: 10]",
            "1..",
        ),
        "segments": Rule(
            "--segments S",
            "with --method hypergradient: values of each hyperparameter during a training "
            "[default: 1]",
            "1..",
        ),
        "per_layer": Rule(
            "--per-layer", "with --method hypergradient: use separate values for each layer"
        ),
    },
}
"""The options of the search methods that have a flag."""

_MORE_RULES: dict[str, dict[str, Rule]] = {
    "the target and the model": {
        "target": Rule(
            "--target COL", "the column to predict [default: 'target' for sklearn:NAME]"
        ),
        "model": Rule(
            "--model M",
            "mlp, logistic, realmlp, cnn for images, gru for sequences, or PATH.py:NAME "
            "[default: mlp]",
        ),
        "optimizer": Rule(
            "--optimizer O",
            "adamw, adam, sgd, nesterov; with the suffix hd they adapt their learning rate; "
            "rmsprop, lion, muon, schedulefree; for a module also a class of torch.optim, such as "
            "RAdam [default: adamw; exact for logistic]",
        ),
    },
    SEARCH: {
        "sampler": Rule(
            "--sampler",
            "the sampler that proposes configurations in batches: tpe, from Optuna (needs optuna)",
            choices=("tpe",),
        ),
        **{name: rule for group in METHOD_RULES.values() for name, rule in group.items()},
    },
    ROWS: {
        "groups": Rule("--groups COL", "rows of one group are never split between folds"),
        "test_size": Rule(
            "--test-size SHARE",
            "share of the rows to hold out for one honest score; 0 uses all rows [default: 0.2]",
            "number",
        ),
    },
    MACHINE: {
        "study": Rule(
            "--out DIR",
            "folder for study.db and model/; repeat the command to resume a stopped search "
            "[default: gputune-out; gputune-train for train]",
        ),
        "ray": Rule(
            "--ray ADDRESS",
            "train on a Ray cluster: local, auto, HOST:PORT or ray://HOST:PORT; type it after FILE "
            "[default: local]",
            resume=True,
        ),
        "ensemble": Rule(
            "--ensemble",
            "also make an ensemble of the best trials, and save the model that is better on the "
            "held-out rows",
            resume=True,
        ),
        "intervals": Rule(
            "--intervals",
            "store residuals with the model, for gputune predict --interval",
            resume=True,
        ),
        "calibrate": Rule(
            "--calibrate",
            "calibrate class probabilities by temperature scaling [default: only if --scoring is "
            "neg_log_loss]",
            resume=True,
        ),
        "compare_default": Rule(
            "--compare-default",
            "also train the default configuration on all rows, and compare both models on the "
            "held-out rows [default: only if that takes less than a tenth of the search's steps]",
            takes="yes or no",
            resume=True,
        ),
        "profile": Rule(
            "--profile",
            "print at the end how the time was spent, and the share of the machine's speed for "
            "matrix products that the training reached",
            resume=True,
        ),
    },
}
"""The flags that are not options of a search, by the title of their group."""


def option_groups() -> dict[str, dict[str, Rule]]:
    """Return the flags of ``gputune tune --help`` by the title of their group.

    The flags of the command itself come last in each group.
    """
    groups: dict[str, dict[str, Rule]] = {title: {} for title in _MORE_RULES}
    for name, rule in RULES.items():
        if rule.flag:
            groups[rule.group][name] = rule
    for title, rules in _MORE_RULES.items():
        groups[title] |= rules
    return groups


def flags() -> dict[str, str]:
    """Return the flag of each argument of ``gputune.tune`` or of a method, by name."""
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
    ("load_model", "module"): "--model",
    ("Ray", "address"): "--ray",
}
"""The flags for arguments of functions other than ``gputune.tune``."""

_METHOD_CLASSES = ("Halving", "Median", "Hypergradient")


class CommandLine(Interface):
    """The names that a command gives to arguments.

    Args:
        command: Name of the command, such as "tune".
        file: The table of the command, as it was typed.
    """

    name = "command"

    def __init__(self, command: str = "tune", file: str = "FILE") -> None:
        configuration = "--set" if command == "train" else "--include"
        self.file = file
        self.known = {**flags(), "include": configuration}
        if command not in ("tune", "train"):
            del self.known["study"]  # it is the command's FOLDER

    def argument(self, reference: Reference) -> str:
        """Return an argument in the form of the command line: ``--cv 5`` for ``cv=5``."""
        if reference.call in _METHOD_CLASSES:
            flag = self.known.get(reference.name)
        elif reference.call:
            flag = _OF_CALLS.get((reference.call, reference.name))
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
        """Return a flag with the value of an argument. A study becomes its folder."""
        value = reference.value
        if value in (None, "", "...", "True", "False"):
            return flag
        text = _unquoted(value)
        if value.startswith("("):
            text = ",".join(re.findall(r"\w+", value))
        if (reference.name, text) == ("workers", "ray"):
            return "--ray"
        if reference.name == "study":
            # The command line takes the folder of a study.
            folder = Path(text).parent
            here = Path.cwd()
            text = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
        return f"{flag} {shlex.quote(text)}"


def _unquoted(value: str) -> str:
    """Return the text of a Python string literal, and other code unchanged."""
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
