"""Packages are layers: a package imports only packages below it; the public names are these."""

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import gputune

PACKAGE = Path(gputune.__file__).parent

LAYERS = """
ground native data optimizers population scoring modules engine solver executors hypergradients study spaces
tuning methods integrations views report api sklearn check cli
""".split()
"""From the ground up. A folder is a layer. The files at the top level are the ground, except
those of ``_TOP``."""

_TOP = {"callbacks": "api", "optim": "api", "__init__": "api", "__main__": "cli"}


def modules():
    """Every module of gputune, but for the mapped models: dotted name -> path."""
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.startswith("models."):
            yield name, path


def layer_of(module):
    first, _, rest = module.partition(".")
    return first if rest or first in LAYERS else _TOP.get(first, "ground")


def imports(path):
    """The imports of gputune in a file, when it is loaded and later: (line, module)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gputune":
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}".removeprefix("gputune.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("gputune."):
                    yield node.lineno, alias.name.removeprefix("gputune.")


FILES = dict(modules())


def file_of(imported):
    """The module that an imported name is, or is in; None for one of the models."""
    inside = imported.rpartition(".")[0]
    return next((name for name in (imported, inside, f"{inside}.__init__") if name in FILES), None)


ARROWS = [
    (name, line, target)
    for name, path in FILES.items()
    for line, imported in imports(path)
    if (target := file_of(imported)) and target != name
]


def test_a_layer_imports_only_layers_below_it():
    level = {layer: i for i, layer in enumerate(LAYERS)}
    up = [
        f"{name}:{line} imports {target}"
        for name, line, target in ARROWS
        if level[layer_of(target)] > level[layer_of(name)] and name != "__init__"
    ]
    assert not up, "\n".join(up)


def test_the_core_imports_no_integration():
    """gputune/ground/entry_points.py imports them by name. Two public tables hold their names."""
    public = {"__init__", "callbacks"}
    core = {name for name in FILES if layer_of(name) != "integrations"} - public
    wrong = [
        f"{name}:{line} imports {target}"
        for name, line, target in ARROWS
        if name in core and layer_of(target) == "integrations"
    ]
    assert not wrong, "\n".join(wrong)
    named = {name for name in core if "gputune.integrations" in FILES[name].read_text()}
    assert named == {"ground.entry_points"}
    # an import of a library of theirs, or its name for import_extra()
    library = re.compile(
        r"^ *(import|from) (ray|mlflow|wandb|tensorboard|onnx|onnxscript)\b"
        r"|import_extra\(\"(ray|mlflow|wandb|tensorboard|onnx|onnxscript)\b",
        re.MULTILINE,
    )
    assert not [name for name in core if library.search(FILES[name].read_text())]
    assert library.search(FILES["integrations.ray_tasks"].read_text())


def test_no_files_import_each_other_in_a_circle():
    above = {name: {target for source, _, target in ARROWS if source == name} for name in FILES}
    while free := above.keys() - {
        name
        for name in above
        if above[name] & above.keys() and any(name in above[other] for other in above)
    }:
        for name in free:
            del above[name]
    assert not above, f"a circle among {sorted(above)}"


def test_a_worker_process_loads_no_library_that_takes_as_long_as_torch():
    """scikit-learn imports scipy.stats and pandas; a worker imports them only when needed."""
    waiting = ["executors.processes"]
    loaded = set()
    libraries = set()
    while waiting:
        loaded.add(name := waiting.pop())
        for node in ast.parse(FILES[name].read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                start = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for imported in (start + alias.name for alias in node.names):
                    libraries.add(imported.partition(".")[0])
                    waiting += {file_of(imported.removeprefix("gputune."))} - {None} - loaded
    assert "engine.train" in loaded and "torch" in libraries
    assert libraries & {"sklearn", "scipy", "pandas", "polars"} == set()


def test_every_folder_is_a_layer():
    assert {layer_of(name) for name in FILES} == set(LAYERS)


def test_the_first_line_says_the_idea():
    silent = [
        name
        for name, path in FILES.items()
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not silent


def test_models_import_no_gputune():
    for name in ("cnn", "gru", "layers", "mlp", "logistic_regression", "realmlp"):
        module = importlib.import_module(f"gputune.models.{name}")
        imported = set()
        for node in ast.walk(ast.parse(Path(inspect.getfile(module)).read_text())):
            if isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
            elif isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
        assert "torch" in imported and "gputune" not in imported


def test_public_names():
    assert gputune.__all__ == sorted(gputune.__all__)
    for name in gputune.__all__:
        assert getattr(gputune, name) is not None
    assert set(gputune.__all__) <= set(dir(gputune))
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        gputune.tuna  # noqa: B018


def test_public_names_of_callbacks():
    names = ["Callback", "MLflow", "StopSearch", "TensorBoard", "WandB"]
    assert gputune.callbacks.__all__ == names
    for name in names:
        assert getattr(gputune.callbacks, name).__name__ == name
    with pytest.raises(AttributeError, match="'gputune.callbacks' has no attribute 'mlflow'"):
        gputune.callbacks.mlflow  # noqa: B018


def test_a_public_name_stays_itself_whatever_is_imported():
    before = {name: getattr(gputune, name) for name in gputune.__all__}
    for module in pkgutil.walk_packages(gputune.__path__, "gputune."):
        if ".native._" not in module.name:  # a library without Python in it
            importlib.import_module(module.name)
    assert {name: getattr(gputune, name) for name in gputune.__all__} == before
    assert callable(gputune.tune)


def test_the_signature_of_tune():
    expected = (
        "model X y preset space n_trials include include_default warm_start method cv groups scoring "
        "positive task missing_target target_transform loss training_step augment class_weight "
        "sample_weight drop kinds max_levels category_copies columns numbers optimizer schedule max_epochs "
        "n_ens patience epoch timeout target_score patience_trials study checkpoint_seconds device "
        "backend dtype tf32 precision memory workers keep_predictions random_state callbacks "
        "verbose"
    )
    assert " ".join(inspect.signature(gputune.tune).parameters) == expected
