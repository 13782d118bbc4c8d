"""The engines of the benchmark: their names, their packages, and the number of trials for each.

Each engine is a module of this folder that is imported when it runs. skorch, Ray Tune and
torch.compile are in the same module as the PyTorch loop.
"""

import shutil
from argparse import ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from benchmark.work import Outcome, Work


@dataclass(frozen=True)
class Engine:
    """One way to train the work.

    ``word`` is its name on the command line, and ``package`` is the package that it needs.
    """

    word: str
    name: str
    package: str
    module: str
    function: str = "train"

    def lacks(self) -> str | None:
        """Return the package that must be installed before the engine can run here, or None."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.word == "compile" and not (shutil.which("g++") or shutil.which("clang++")):
            return "no C++ compiler is installed"
        return None

    def load(self) -> Callable[[Work, int], Outcome]:
        """Import the engine and its package.

        Returns a function that maps a work and a number of cores to scores and times.
        """
        module = import_module(f"benchmark.engines.{self.module}")
        train: Callable[[Work, int], Outcome] = getattr(module, self.function)
        return train


ENGINES = {
    engine.word: engine
    for engine in (
        Engine("sklearn", "scikit-learn", "sklearn", "sklearn"),
        Engine("torch", "PyTorch loop", "torch", "torch"),
        Engine("compile", "PyTorch loop, torch.compile", "torch", "torch", "train_compiled"),
        Engine("optuna", "Optuna, PyTorch loop", "optuna", "optuna"),
        Engine("ray", "Ray Tune, PyTorch loop", "ray.tune", "torch", "train_ray"),
        Engine("skorch", "skorch", "skorch", "torch", "train_skorch"),
        Engine("jax", "JAX jit + vmap", "jax", "jax"),
        Engine("gputune", "gputune", "gputune", "gputune"),
    )
}


Chosen = tuple[Engine, int | None]
"""An engine and the number of trials that it trains; None for the whole list."""


def choose(text: str) -> list[Chosen]:
    """Return the engines of a list such as "sklearn,ray:64".

    gputune comes last, because all others are compared with it. Raises ArgumentTypeError for an
    unknown engine or a wrong number of trials.
    """
    found: dict[str, Chosen] = {}
    for word, colon, number in (part.strip().partition(":") for part in text.split(",")):
        if word not in ENGINES:
            raise ArgumentTypeError(f"must be of {', '.join(ENGINES)}, got {word!r}")
        if colon and not (number.isdecimal() and int(number) > 0):
            raise ArgumentTypeError(
                f"{word}: must have a number of trials of at least 1 after it, got {number!r}"
            )
        if word == "gputune" and colon:
            raise ArgumentTypeError(
                "gputune trains the whole list, and a part of it where another engine does"
            )
        found[word] = ENGINES[word], int(number) if colon else None
    found.pop("gputune", None)
    return [*found.values(), (ENGINES["gputune"], None)]


def split_by_lack(chosen: list[Chosen]) -> tuple[list[Chosen], dict[str, str]]:
    """Return the engines that can run here, and the missing packages of the others by engine.

    The missing packages are also printed.
    """
    lacks = {engine.name: lack for engine, _ in chosen if (lack := engine.lacks()) is not None}
    for name, lack in lacks.items():
        print(f"{name} is left out: {lack}")
    return [one for one in chosen if one[0].name not in lacks], lacks


def versions(chosen: list[Chosen]) -> dict[str, str]:
    """Return the versions of the packages that these engines use in addition to the common ones."""
    packages = {engine.package.partition(".")[0] for engine, _ in chosen} - {
        "sklearn",
        "torch",
        "gputune",
    }
    return {package: version(package) for package in sorted(packages)}
