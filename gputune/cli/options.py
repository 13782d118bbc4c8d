"""The options of a search as they were typed: words, KEY=VALUE and flags become what ``gputune.tune`` takes."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from gputune.cli.flags import METHOD_RULES
from gputune.data.folds import parse_cv
from gputune.errors import InputError, import_extra
from gputune.executors.ray_connection import Ray
from gputune.methods.descent import Hypergradient
from gputune.methods.optuna import OptunaSampler
from gputune.methods.space import parse_specs
from gputune.methods.stopping import Halving
from gputune.tuning.method import METHODS, Method
from gputune.tuning.options import RULES, Options
from gputune.types import Config

_DESCENTS = 8
"""Starts of descents, where the command does not say."""


def options_of(arguments: Namespace, study_file: Path) -> Options:
    """Return the options of ``gputune tune`` or ``train``. Raises InputError."""
    typed = typed_options(arguments)
    if "space" in typed:
        texts = typed["space"]
        named = len(texts) == 1 and "=" not in texts[0]
        typed["space"] = texts[0] if named else parse_specs(texts) or None
    if "cv" in typed:
        typed["cv"] = parse_cv(typed["cv"])
    if "include" in typed:
        typed["include"] = [_config(texts, "--include") for texts in typed["include"]]
    if "kinds" in typed:
        typed["kinds"] = _pairs(typed["kinds"], "--kind", "zip=category")
    if typed.get("class_weight", "balanced") != "balanced":
        typed["class_weight"] = _weights(typed["class_weight"])
    if arguments.command == "train":
        typed |= {
            "n_trials": 0,
            "include_default": False,
            "include": [_config(arguments.config or (), "--set")],
        }
    else:
        typed["method"] = _method(arguments)
        if isinstance(typed["method"], Hypergradient):
            typed.setdefault("n_trials", _DESCENTS)
    return Options(**{**typed, "study": study_file})


def typed_options(arguments: Namespace) -> Config:
    """Return the options of a search that were typed; of processes and a cluster one alone."""
    names = RULES.keys() - {"study"}
    typed = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    if arguments.ray is not None:
        if arguments.workers not in (None, "auto"):
            raise InputError(f"--workers {arguments.workers} and --ray exclude each other: leave one out.")
        typed["workers"] = Ray(arguments.ray)
    return typed


def _config(texts: Sequence[str], flag: str) -> Config:
    """Return the one configuration of several KEY=VALUE. Raises InputError for lists and ranges."""
    config = parse_specs(texts, flag)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == 1:  # a tuple
            config[key] = value = value[0]
        if isinstance(value, list) or hasattr(value, "rvs"):
            spec = next(text for text in texts if text.partition("=")[0].strip() == key)
            raise InputError(
                f"{flag} takes one value for each key, got {spec!r}; lists and ranges are for gputune tune --space."
            )
    return config


def _pairs(texts: Sequence[str], flag: str, example: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, equals, value = text.rpartition("=")
        if not key or not equals or not value:
            raise InputError(f"{flag} is written as in {flag} {example}, got {text!r}.")
        pairs[key] = value
    return pairs


def _weights(text: str) -> dict[str, float]:
    example = "left=5,stayed=1"
    pairs = _pairs(text.split(","), "--class-weight", f"{example}, or balanced")
    try:
        return {label: float(weight) for label, weight in pairs.items()}
    except ValueError:
        raise InputError(
            f"--class-weight has a number for each class, as in --class-weight {example}, got {text!r}."
        ) from None


def _method(arguments: Namespace) -> Method:
    """Return the method of the command, with its own options; those of another one are refused."""
    word = arguments.method or "random"
    legal = METHOD_RULES.get(word, {})
    for other, rules in METHOD_RULES.items():
        for name, rule in rules.items():
            if name not in legal and getattr(arguments, name) is not None:
                raise InputError(
                    f"{rule.name} belongs to --method {other}, got --method {word}; leave it out, or choose that "
                    "method."
                )
    options = {name: value for name in legal if (value := getattr(arguments, name)) is not None}
    method: Method = METHODS[word](**options) if word in METHODS else "random"
    if arguments.sampler is None:
        return method
    if not (method == "random" or isinstance(method, Halving)):
        raise InputError(
            f"--sampler {arguments.sampler} goes with --method random or halving, got --method {word}; leave one out."
        )
    samplers = import_extra("optuna.samplers", extra="optuna", used_by=f"--sampler {arguments.sampler}")
    sampler = samplers.TPESampler(seed=arguments.random_state or 0, constant_liar=True)
    return OptunaSampler(sampler, halving=method if isinstance(method, Halving) else None)
