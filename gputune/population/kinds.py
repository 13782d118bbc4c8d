"""The kinds of models in the engine, and the hidden layers of their configurations."""

from bisect import bisect_left
from typing import Literal

from gputune.ground.types import Config
from gputune.models.layers import per_layer

ModelKind = Literal["mlp", "linear", "module"]

_WIDTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)


def is_module(kind: ModelKind) -> bool:
    """Return whether models of a kind are the user's own modules, whose layers are unknown."""
    return kind == "module"


def padded_width(width: int) -> int:
    """Return the padded width of a hidden layer: the next width in a fixed table. Above the
    table, it is the next multiple of 512."""
    if width > _WIDTHS[-1]:
        return -(-width // 512) * 512
    return _WIDTHS[bisect_left(_WIDTHS, width)]


def hidden_widths(config: Config) -> tuple[int, ...]:
    """Return the number of units of each hidden layer of a complete configuration."""
    return tuple(per_layer(config["width"], config["depth"]))


def hidden_activations(config: Config) -> tuple[str, ...]:
    """Return the activation of each hidden layer of a complete configuration."""
    return tuple(per_layer(config["activation"], config["depth"]))


def dropout_rates(config: Config) -> tuple[float, ...]:
    """Return the dropout rate of each hidden layer of a complete configuration."""
    return tuple(per_layer(config["dropout"], config["depth"]))


def highest_dropout(config: Config) -> float:
    """Return the dropout rate of a configuration, or the highest if each layer has its own."""
    rate = config["dropout"]
    return float(max(rate) if isinstance(rate, tuple) else rate)


def hidden_layers(config: Config, kind: ModelKind) -> tuple[int, ...]:
    """Return the number of units of each hidden layer of a model, () for a model without known
    hidden layers."""
    return hidden_widths(config) if kind == "mlp" else ()


def padded_rank(rank: int) -> int:
    """Return the rank to which a LoRA's rank is padded: 16, 32, 64 and so on. Trials with one
    padded rank train together."""
    return max(16, 1 << (rank - 1).bit_length())


def adapter_arguments(config: Config) -> Config:
    """Return the arguments of a LoRA's builder that follow from a configuration.

    ``max_rank`` is the padded rank, and ``drops`` is True if the rate of dropout is not 0. The
    result is empty for other models.
    """
    if "rank" not in config:
        return {}
    arguments: Config = {"max_rank": padded_rank(config["rank"])}
    if config.get("dropout"):
        arguments["drops"] = True
    return arguments
