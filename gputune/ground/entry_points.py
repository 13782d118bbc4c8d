"""The integrations with other libraries, found by kind and name, and imported on first use.

An integration is one module in a folder of ``gputune/integrations/``. The folder says what the
module adds to gputune, and the module has the name that users write. No list of them exists, so a
new module in such a folder needs no other change.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Literal

from gputune.ground.errors import MissingExtraError

IntegrationKind = Literal["clusters", "exports", "loggers", "modules", "studies"]
"""The folder of an integration. A module must define:

- In ``clusters``: ``CLUSTER``, the subclass of ``gputune.executors.cluster.Cluster`` that
  ``tune(workers="ray")`` means for the module ``ray``.
- In ``exports``: ``write_model(model, description, path)``, which ``TunedModel.export`` calls to
  write a file with the suffix ``.onnx`` for the module ``onnx``.
- In ``loggers``: a ``Callback`` with the name of the module, in any case:
  ``gputune.callbacks.MLflow`` is in the module ``mlflow``.
- In ``modules``: ``own_training(module, horizon)`` for the modules of the Python package with this
  name. It returns the ``gputune.modules.own_training.OwnTraining`` that such a module defines.
  ``step_of(kind)`` returns the training step of a class of such modules, or None.
- In ``studies``: ``export_study(study, storage, name)``, which ``Study.to_optuna`` calls for the
  module ``optuna``.
"""


def integrations(kind: IntegrationKind) -> list[str]:
    """Return the sorted names of the integrations of one kind. The function imports none of
    them."""
    folder = import_module(f"gputune.integrations.{kind}")
    return sorted(module.name for module in iter_modules(folder.__path__))


def integration(kind: IntegrationKind, name: str) -> ModuleType:
    """Import and return an integration by its kind and name.

    Callers check a user's name against ``integrations(kind)`` first.
    """
    return import_module(f"gputune.integrations.{kind}.{name}")


def how_to_install(extra: str) -> str:
    """Return a sentence for error messages that says how to install an optional part of gputune."""
    # gputune is in no package index, so that pip finds the extra only in a clone.
    return f'Run pip install ".[{extra}]" in your clone of gputune.'


def import_extra(module: str, *, extra: str, used_by: str) -> ModuleType:
    """Import and return the module of an optional library.

    Args:
        module: name of the module.
        extra: the extra of gputune that installs it.
        used_by: name of the feature that needs it, for the error message.

    Raises:
        MissingExtraError: the module cannot be imported. The message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        library = module.partition(".")[0]
        raise MissingExtraError(
            used_by,
            f"needs {library}, which cannot be imported ({error})",
            remedy=how_to_install(extra),
        ) from error
