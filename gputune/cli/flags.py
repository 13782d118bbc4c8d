"""The flags that are no options of a search as Python has them: of methods, and of the command; and their parser.

Errors say what was meant, of the flags that the command has.
"""

import argparse
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from gputune.text import did_you_mean, nearest
from gputune.tuning.options import MACHINE, ROWS, SEARCH, Rule

_MIN_EPOCHS = Rule(
    "--min-epochs E",
    "with --method halving: epochs before the first rung (a 27th of --epochs); median: before the first decision (a "
    "tenth)",
    "1..",
)

METHOD_RULES: dict[str, dict[str, Rule]] = {
    "halving": {
        "factor": Rule("--factor F", "with --method halving: the best 1/F go on from a rung (3)", "number"),
        "min_epochs": _MIN_EPOCHS,
        "brackets": Rule("--brackets N", "with --method halving: brackets, each with its first rung later (1)", "1.."),
    },
    "median": {
        "min_epochs": _MIN_EPOCHS,
        "every": Rule(
            "--every E", "with --method median: epochs between two decisions (as many as before the first)", "1.."
        ),
    },
    "hypergradient": {
        "hyperparameters": Rule(
            "--descend-on KEY,KEY",
            "with --method hypergradient: some of lr (default), momentum, weight_decay, beta1, beta2; C for the "
            "solved logistic regression",
            "names",
        ),
        "outer_steps": Rule("--outer-steps N", "with --method hypergradient: steps of a descent (10)", "1.."),
        "segments": Rule(
            "--segments S", "with --method hypergradient: so many values of each over the time of training (1)", "1.."
        ),
        "per_layer": Rule("--per-layer", "with --method hypergradient: values of its own for each layer"),
    },
}
"""The options of the methods that can be typed."""

MORE_RULES: dict[str, dict[str, Rule]] = {
    "the target and the model": {
        "target": Rule("--target COL", "the column to predict (sklearn:NAME has 'target')"),
        "model": Rule(
            "--model M", "mlp (default), logistic, realmlp, cnn for images, gru for sequences, or PATH.py:NAME"
        ),
        "optimizer": Rule(
            "--optimizer O",
            "adamw (default), adam, sgd, nesterov, each with hd at its end to adapt its rate online; rmsprop, "
            "lion, muon, schedulefree; of a module also a class of torch.optim, such as RAdam; logistic: exact",
        ),
    },
    SEARCH: {
        "sampler": Rule(
            "--sampler",
            "tpe: Optuna's sampler proposes the configurations, in batches (needs optuna)",
            choices=("tpe",),
        ),
        **{name: rule for group in METHOD_RULES.values() for name, rule in group.items()},
    },
    ROWS: {
        "groups": Rule("--groups COL", "rows of one group are never split between folds"),
        "test_size": Rule(
            "--test-size SHARE", "share of the rows kept apart for one honest score (0.2); 0 uses all rows", "number"
        ),
    },
    MACHINE: {
        "study": Rule(
            "--out DIR",
            "folder for study.db and model/ (gputune-out; of train gputune-train); the same command goes on where it "
            "was stopped",
        ),
        "ray": Rule(
            "--ray ADDRESS",
            "train on a Ray cluster: local (default), auto, HOST:PORT or ray://HOST:PORT; after FILE",
            resume=True,
        ),
        "ensemble": Rule(
            "--ensemble",
            "choose an ensemble of the best trials too, and save what is better on the held-out rows",
            resume=True,
        ),
        "intervals": Rule("--intervals", "keep with the model what gputune predict --interval needs", resume=True),
        "calibrate": Rule(
            "--calibrate",
            "calibrate the probabilities of classes by temperature scaling (without being asked where --scoring is "
            "neg_log_loss)",
            resume=True,
        ),
        "profile": Rule(
            "--profile",
            "say at the end where the time went, and what share of the machine's matrix products the steps reached",
            resume=True,
        ),
    },
}
"""What can be typed and is no option of a search, beside the file, by the title of its group."""


class Parser(argparse.ArgumentParser):
    """Names in its errors what was meant; ``commands`` are the parsers of the commands, by name."""

    commands: Mapping[str, "Parser"] = MappingProxyType({})

    def error(self, message: str, hints: str = "") -> NoReturn:
        if choice := re.search(r"invalid choice: ('.*') \(choose from (.*)\)", message):
            hints = did_you_mean(choice[1][1:-1], re.findall(r"'([^']*)'", choice[2]))
        hints = hints and f".{hints}"
        self.exit(2, f"gputune: error: {message}{hints}\nTry '{self.prog} --help'.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but what a command does not know is an error of the command, not of ``gputune``."""
        typed, unknown = self.parse_known_args(args, namespace)
        if not unknown:
            return typed
        flags = {name: re.findall(r"--[\w-]+", command.format_usage()) for name, command in self.commands.items()}
        hints = ""
        for flag in (word.partition("=")[0] for word in unknown if word.startswith("--")):
            if having := [name for name, known in flags.items() if flag in known]:
                hints += f" {typed.command} has no {flag}, a flag of {', '.join(having)}."
            elif near := nearest(flag[2:], [known[2:] for known in flags[typed.command]], others=_OTHER_FLAGS):
                hints += f" Did you mean '--{near}'?"
        self.commands[typed.command].error(f"unrecognized arguments: {' '.join(unknown)}", hints)


_OTHER_FLAGS: Mapping[str, str] = {
    "epoch": "epochs",
    "lr": "space",
    "metric": "scoring",
    "metrics": "scoring",
    "random-state": "seed",
}
