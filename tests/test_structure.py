"""Reading order is import order: a file imports only from files above it, and the public names are these."""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import gputune

PACKAGE = Path(gputune.__file__).parent

LAYERS = """
version errors extras types seeding scratch memory report/text native/library native/work
data/kinds data/columns data/table data/quantiles data/normal_scores data/tensors data/encode data/target data/weights
data/dataset data/folds data/packed data/holdout data/fingerprint data/source
engine/losses engine/scores engine/scoring engine/optim engine/blocks engine/update engine/online engine/population
engine/backend engine/batches engine/cost engine/network engine/validation engine/backprop engine/stateless
engine/vmap engine/eager
engine/compiled engine/stand_in engine/capture engine/graph_batches engine/graph_update engine/graph engine/train
engine/stopping engine/entry engine/checkpoint engine/fits engine/chunk
engine/precision engine/out_of_memory engine/measured engine/rung engine/plan engine/packing engine/processes
engine/workers
engine/ray_task engine/ray_workers engine/ray_connection engine/logistic engine/quadratic engine/newton
engine/proximal engine/exact engine/solved
hypergradients/online_arguments hypergradients/online hypergradients/inner hypergradients/coordinates
hypergradients/guard hypergradients/held_out
hypergradients/dual hypergradients/unrolled hypergradients/differences hypergradients/memory
hypergradients/arguments hypergradients/curvature hypergradients/module_training hypergradients/implicit
hypergradients/result hypergradients/convex hypergradients/hypergradient hypergradients/population_training
hypergradients/chunk hypergradients/plan optim
study/values study/forms study/score study/rows study/database study/new_file study/store study/cards study/views
study/study study/claims study/ledger study/repair
study/trusted study/code_files study/module_source study/folder study/model study/model_files study/whole_model
study/export
search/distributions search/config search/spec search/optuna_space search/space search/space_again search/random
search/halving search/median search/hypergradient search/optuna_sampler search/asking search/optuna_export
callbacks/callback callbacks/plain callbacks/tensorboard callbacks/mlflow callbacks/wandb
options model_choice profile progress interrupting problem again refit study_meta wanted
methods/context methods/resuming methods/frozen methods/company methods/rungs methods/full methods/halving
methods/median methods/descent methods/sampling pipeline
sklearn/words sklearn/foreign sklearn/dataset sklearn/fitting sklearn/solving sklearn/fused sklearn/trained sklearn/mlp
sklearn/logistic sklearn/user_module sklearn/net_words sklearn/net sklearn/layout sklearn/tape sklearn/pipelines
sklearn/held_out sklearn/asking sklearn/search_file sklearn/running sklearn/search sklearn/nested
sklearn/halving sklearn/moving sklearn/slopes sklearn/descending sklearn/descended_loss sklearn/hypergradient
analysis/scores analysis/parameters analysis/importance analysis/curves analysis/descents
plots/canvas plots/history plots/curves plots/slices plots/parallel plots/importance plots/contour plots/path
report/arguments report/facts report/trials report/held_out report/closing report/predicting report/exporting
report/places report/tuning
report/scale report/svg report/charts/curves report/charts/slices report/charts/importance report/charts/paths
report/charts/parallel report/endings report/rows report/again report/page report/reporting report/status
report/cli
__main__
""".split()


@pytest.fixture(scope="module")
def trees():
    """The syntax tree of every file, by its layer."""
    return {layer: ast.parse((PACKAGE / f"{layer}.py").read_text()) for layer in LAYERS}


def imported(tree):
    """Modules of gputune that a file imports when it is loaded, as names of layers."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gputune"):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("gputune.").replace(".", "/")
                yield whole if whole in LAYERS else node.module.removeprefix("gputune.").replace(".", "/")


def test_a_file_imports_only_files_above_it(trees):
    place = {"models": -1, **{layer: i for i, layer in enumerate(LAYERS)}}
    below = [
        f"{layer} imports {name}"
        for layer, tree in trees.items()
        for name in imported(tree)
        if place.get(name, len(LAYERS)) >= place[layer]
    ]
    assert below == []


def test_every_file_is_a_layer():
    found = {str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py")}
    assert {
        name for name in found if not name.endswith("__init__") and not name.startswith("models/")
    } == set(LAYERS)


def test_the_first_line_says_the_idea(trees):
    assert [layer for layer, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_models_import_no_gputune():
    for name in ("stacked", "mlp", "logistic_regression"):
        module = importlib.import_module(f"gputune.models.{name}")
        assert "gputune" not in Path(inspect.getfile(module)).read_text()


def test_public_names():
    assert gputune.__all__ == sorted(gputune.__all__)
    for name in gputune.__all__:
        assert getattr(gputune, name) is not None
    assert set(gputune.__all__) <= set(dir(gputune))
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        gputune.tuna  # noqa: B018


def test_a_public_name_stays_itself_whatever_is_imported():
    before = {name: getattr(gputune, name) for name in gputune.__all__}
    for module in pkgutil.walk_packages(gputune.__path__, "gputune."):
        importlib.import_module(module.name)
    assert {name: getattr(gputune, name) for name in gputune.__all__} == before
    assert callable(gputune.tune)


def test_the_signature_of_tune():
    expected = (
        "model X y space n_trials include include_default method cv groups scoring positive task class_weight "
        "sample_weight columns numbers optimizer schedule max_epochs epoch timeout study checkpoint_seconds device "
        "backend dtype tf32 memory workers random_state callbacks verbose"
    )
    assert " ".join(inspect.signature(gputune.tune).parameters) == expected
