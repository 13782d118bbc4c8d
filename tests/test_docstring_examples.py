"""Every public class and function has an example in its docstring, and every example runs.

The docstring of a class runs first. The examples of its methods go on with its names.
"""

import doctest
import inspect

import pytest

import gputune
from gputune.integrations.lightning import LightningCallback
from gputune.integrations.transformers import TrainerCallback

PLACES = {
    "gputune": gputune,
    "callbacks": gputune.callbacks,
    "models": gputune.models,
    "optim": gputune.optim,
    "sklearn": gputune.sklearn,
}
INTEGRATIONS = [LightningCallback, TrainerCallback]
"""Public objects that only the pages of other libraries name."""
NEEDED = {
    "LightningCallback": "lightning",
    "MLflow": "mlflow",
    "OptunaSampler": "optuna",
    "Study": "matplotlib",
    "TensorBoard": "tensorboard",
    "TrainerCallback": "accelerate",
    "WandB": "wandb",
}
"""Objects whose example needs an optional library."""
SLOW = {"TunedModel.export"}
"""Methods whose example runs only with --all. torch.export imports for several seconds."""


def is_error(value):
    return inspect.isclass(value) and issubclass(value, BaseException)


def public_objects():
    for place, module in PLACES.items():
        for name in module.__all__:
            value = getattr(module, name)
            has_example = "Example:" in (inspect.getdoc(value) or "")
            if callable(value) and (has_example or not is_error(value)):
                yield pytest.param(value, id=f"{place}.{name}")
    for value in INTEGRATIONS:
        library = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
        yield pytest.param(value, id=f"integrations.{value.__name__}", marks=library)


def docstrings(value):
    """The docstring of a public object, and those of its methods that gputune wrote."""
    yield value.__name__, inspect.getdoc(value)
    if inspect.isclass(value):
        for name in sorted(dir(value)):
            member = inspect.getattr_static(value, name)
            member = getattr(member, "__func__", member)
            function = member.fget if isinstance(member, property) else member
            home = getattr(function, "__module__", None) or ""
            if not name.startswith("_") and home.startswith("gputune"):
                yield f"{value.__name__}.{name}", inspect.getdoc(member)


@pytest.mark.parametrize("value", list(public_objects()))
def test_the_example_of_a_public_object_runs(value, tmp_path, monkeypatch, capsys, pytestconfig):
    if value.__name__ in NEEDED:
        pytest.importorskip(NEEDED[value.__name__])
    monkeypatch.chdir(tmp_path)
    assert "Example:" in inspect.getdoc(value)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    session = {}
    for name, text in docstrings(value):
        if name in SLOW and not pytestconfig.getoption("--all"):
            continue
        example = doctest.DocTestParser().get_doctest(text or "", session, name, None, None)
        assert example.examples or name != value.__name__, f"{name} has no example"
        runner.run(example, clear_globs=False)
        session = example.globs
        assert runner.failures == 0, capsys.readouterr().out
