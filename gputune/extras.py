"""Libraries that only some uses need: imported when they are, and named with their extra where they are missing."""

from importlib import import_module
from types import ModuleType

from gputune.errors import MissingExtraError


def import_extra(module: str, *, extra: str, used_by: str) -> ModuleType:
    """Return the module; MissingExtraError, which says what to install, where it cannot be imported.

    used_by: what the user asked for, as the error calls it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{used_by} needs {module.partition('.')[0]}, which cannot be imported ({error}): "
            f'pip install "gputune[{extra}]".'
        ) from error
