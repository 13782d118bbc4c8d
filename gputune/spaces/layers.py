"""Check the hyperparameters of the MLP that have one value for each hidden layer."""

from collections.abc import Collection, Mapping, Sequence

from gputune.ground.errors import InputError, Verbatim
from gputune.ground.types import PER_LAYER, Config, fixed_depth
from gputune.spaces.distributions import Choices


def check_layers(config: Config, name: str) -> None:
    """Raise InputError if the tuples with one value per hidden layer disagree about the number of
    layers."""
    depth = fixed_depth(config)
    if depth is None:
        return
    tuples = {key: config[key] for key in PER_LAYER if isinstance(config.get(key), tuple)}
    first = next(iter(tuples))
    for key, value in tuples.items():
        if len(value) != depth:
            raise InputError(
                f"{name}[{key!r}]",
                f"must have {depth} values, one for each hidden layer, because its {first} is "
                f"{tuples[first]}",
                got=value,
                remedy=f"Give {key!r} {depth} values, or one number or word for all layers.",
            )
    if config.get("depth", depth) != depth:
        raise InputError(
            name,
            f"must have no 'depth', because its {first} {tuples[first]} sets {depth} layers",
            got=config["depth"],
            remedy="Leave 'depth' out.",
        )


def check_has_layers(config: Mapping[str, object], name: str, keys: Collection[str]) -> None:
    """Raise InputError for a tuple with one value per hidden layer, unless the model is the built-in
    MLP, whose legal keys have ``width``."""
    for key in PER_LAYER:
        if isinstance(config.get(key), tuple | list) and "width" not in keys:
            raise InputError(
                f"{name}[{key!r}]",
                "must have no tuples, because only the built-in MLP has a value for each layer",
                got=config[key],
                remedy=f"Give it numbers, or make it an argument of your module: 'module__{key}'.",
            )


def check_layer_choices(part: Mapping[str, Choices], name: str, keys: Collection[str]) -> None:
    """Check the tuples of one dict of a search space, which have one value for each hidden layer.

    Raises InputError if the model has no known layers, if tuples disagree about the number of
    layers, or if ``depth`` also sets this number.
    """
    lengths: dict[str, set[int]] = {}
    for key in PER_LAYER:
        choices = part.get(key)
        tuples = [c for c in choices if isinstance(c, tuple)] if isinstance(choices, list) else []
        if not tuples:
            continue
        lengths[key] = set(map(len, tuples))
        check_has_layers({key: tuples[0]}, name, keys)
        if "depth" in part:
            raise InputError(
                name,
                f"must have no 'depth', because a {key} that is a tuple sets the number of layers",
                got=choices,
                remedy="Write a list of spaces, one with the tuples and one with 'depth'.",
            )
    if len(lengths) > 1 and len(set().union(*lengths.values())) > 1:
        counts = [f"{key!r} for {_either(sorted(ns))}" for key, ns in lengths.items()]
        raise InputError(
            name,
            "must have tuples for one number of hidden layers",
            got=Verbatim(", ".join(counts)),
            remedy="Write a list of spaces, one for each number of layers.",
        )


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))
