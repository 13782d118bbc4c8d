"""The error for a class of transformers that is passed in place of a function that makes a model."""

from gputune.ground.errors import InputError


def refuse_transformers_class(kind: object) -> None:
    """Raise InputError if ``kind`` is a class of transformers, such as BertForSequenceClassification
    or AutoModelForSequenceClassification."""
    if not isinstance(kind, type) or not _is_of_transformers(kind):
        return
    name = kind.__name__
    config = getattr(kind, "config_class", None)
    call = "AutoModelForSequenceClassification.from_config(config)"
    if name.startswith("Auto"):
        call = f"{name}.from_pretrained(..., num_labels=n_outputs)"
    elif isinstance(config, type):
        call = f"{name}({config.__name__}(num_labels=n_outputs))"
    raise InputError(
        "model",
        f"is the class {name} of transformers, which gputune cannot call without a config or "
        "pretrained weights",
        remedy=f"Pass a function that returns the model: def make_model(n_outputs): return {call}.",
    )


def _is_of_transformers(kind: type) -> bool:
    """Return whether a class or one of its bases is defined by transformers."""
    return any(base.__module__.partition(".")[0] == "transformers" for base in kind.__mro__)
