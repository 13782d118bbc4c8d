"""Images, sequences and several inputs, targets and losses of one's own: fused searches beside
scikit-learn's."""

import functools
import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn import model_selection
from sklearn.base import clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.metrics import r2_score
from torch import nn

from face_modules import (
    Conv,
    GatedConv,
    OneNumber,
    Recurrent,
    TwoInputs,
    make_conv,
    weighed_squares,
)
from gputune.ground.errors import InputError
from gputune.sklearn import (
    GridSearchCV,
    HalvingRandomSearchCV,
    HypergradientSearchCV,
    MLPClassifier,
    NeuralNet,
    NeuralNetClassifier,
    NeuralNetRegressor,
    RandomizedSearchCV,
    SliceDict,
    nested_cv,
)
from searches import assert_same_results, both

# A GPU trains estimators in single precision, and the simulated one has no cuDNN.
pytestmark = pytest.mark.cpu

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(60, 1, 6, 6))
AGES = RNG.normal(size=(60, 2))
IDS = torch.from_numpy(RNG.integers(0, 8, (60, 5)))
CLASSES = np.array(["a", "b", "c"])[(IMAGES[:, 0, :3].mean((1, 2)) * 9).astype(int).clip(-1, 1) + 1]
NUMBERS = np.stack([IMAGES.mean((1, 2, 3)), 100 + 50 * IMAGES[:, 0, 0, 0]], 1)
LABELS = (IMAGES[:, 0, 0, :2] > 0).astype(int)
TRAINING = {"lr": 0.1, "batch_size": 16, "max_epochs": 2, "random_state": 0}
CONV = NeuralNetClassifier(Conv, **TRAINING)
RATES = {"lr": [0.03, 0.3]}
GRID = RATES | {"module__channels": [2, 4]}


def cross_entropy(module, batch):
    x, y = batch
    return nn.functional.cross_entropy(module(x), y)


def noise(x, generator):
    return x + 0.1 * torch.randn(x.shape, generator=generator)


def squares_of_maps(outputs, y):
    return (outputs - y).square().flatten(1).mean(1)


def minus_squares(estimator, X, y):
    return -float(np.square(estimator.predict(X) - y).mean())


def both_grids(estimator, grid, X, y, **options):
    ours, _, theirs, _ = both(
        GridSearchCV, model_selection.GridSearchCV, estimator, grid, X, y, cv=2, **options
    )
    assert_same_results(ours, theirs, tolerance=1e-7)
    return ours, theirs.best_estimator_


@pytest.mark.parametrize(
    "part", [{"training_step": cross_entropy}, {"augment": noise}, {"numbers": "standard"}]
)
def test_a_custom_step_augmentation_and_scaling_are_the_fits(part):
    net = clone(CONV).set_params(**part)
    images = (np.clip(IMAGES, -1, 1) * 127 + 127).astype(np.uint8) if "numbers" in part else IMAGES
    ours, _ = both_grids(net, RATES, images, CLASSES, scoring="neg_log_loss")
    plain = clone(CONV).set_params(**ours.best_params_).fit(IMAGES, CLASSES).predict_proba(IMAGES)
    same = np.allclose(plain, ours.predict_proba(images), rtol=1e-6)
    assert same == ("training_step" in part)


def test_scaling_is_that_of_a_scaler_in_front():
    scaled = (AGES - AGES.mean(0)) / AGES.std(0)
    net = NeuralNetRegressor(OneNumber, **TRAINING)
    expected = net.fit(scaled, NUMBERS[:, 0]).predict(scaled)
    found = clone(net).set_params(numbers="standard").fit(AGES, NUMBERS[:, 0]).predict(AGES)
    np.testing.assert_allclose(found, expected, rtol=1e-8)
    with pytest.raises(InputError, match="numbers must be 'none' or 'standard', got 'quantile'"):
        clone(net).set_params(numbers="quantile").fit(AGES, NUMBERS[:, 0])


def test_a_target_of_any_shape_with_a_criterion():
    net = NeuralNet(
        nn.Conv2d, module__in_channels=1, module__out_channels=1, module__kernel_size=3, **TRAINING
    )
    maps = IMAGES[:, :, 1:-1, 1:-1] * 2
    with pytest.raises(
        InputError, match=r"A custom target has no default loss. Give criterion=callable"
    ):
        net.fit(IMAGES, maps)
    net.set_params(criterion=squares_of_maps)
    ours, _ = both_grids(net, {"lr": [0.01, 0.1]}, IMAGES, maps, scoring=lambda: minus_squares)
    assert ours.predict(IMAGES).shape == maps.shape and -ours.best_score_ < np.square(maps).mean()


@pytest.mark.parametrize("X", [IMAGES, torch.from_numpy(IMAGES)], ids=["array", "tensor"])
def test_a_search_on_images_is_scikit_learns_loop_over_fit(X, training):
    scoring = ["neg_log_loss", "accuracy"]
    ours, theirs = both_grids(CONV, GRID, X, CLASSES, scoring=scoring, refit="neg_log_loss")
    assert training == [(4, 2, (60, 1, 6, 6))]
    best = ours.best_estimator_
    np.testing.assert_allclose(best.predict_proba(X), theirs.predict_proba(X), rtol=1e-8)
    # the running statistics too
    mine = best.module_.state_dict()
    other = theirs.module_.state_dict()
    torch.testing.assert_close(dict(mine), dict(other), rtol=1e-8, atol=1e-10)
    assert best.module_.body[1].num_batches_tracked > 0 and not hasattr(best, "n_features_in_")


@pytest.mark.parametrize(
    ("net", "grid", "X"),
    [
        (NeuralNetClassifier(GatedConv, **TRAINING), {"module__channels": [2, 4]}, IMAGES),
        (NeuralNetClassifier(Recurrent, **TRAINING), {"module__layer": [nn.GRU, nn.LSTM]}, IDS),
        (NeuralNetClassifier(TwoInputs, **TRAINING), RATES, SliceDict(image=IMAGES, age=AGES)),
        (NeuralNetClassifier(make_conv, **TRAINING), {"module__channels": [2, 4]}, IMAGES),
        (NeuralNetClassifier(functools.partial(Conv, channels=2), **TRAINING), RATES, IMAGES),
    ],
    ids=["one by one", "token ids", "two inputs", "function", "partial"],
)
def test_any_module_is_searched_as_scikit_learns_loop_does(net, grid, X, training):
    both_grids(net, grid, X, CLASSES)
    assert len(training) == 1


def test_labels_are_searched_and_scored():
    grid = RATES | {"criterion": [None, nn.BCEWithLogitsLoss]}
    ours, _ = both_grids(
        CONV, grid, IMAGES, LABELS, scoring=["roc_auc", "f1_macro"], refit="roc_auc"
    )
    scores = ours.cv_results_["mean_test_roc_auc"].reshape(2, 2)
    assert (scores[0] == scores[1]).all()
    best = ours.best_estimator_
    assert [labels.tolist() for labels in best.classes_] == [[0, 1]] * 2
    chances = best.predict_proba(IMAGES)
    np.testing.assert_array_equal(best.predict(IMAGES), chances > 0.5)
    np.testing.assert_allclose(np.exp(best.predict_log_proba(IMAGES)), chances)


def test_several_numbers_come_back_in_their_own_units():
    net = NeuralNetRegressor(Conv, **TRAINING)
    ours, _ = both_grids(net, RATES | {"module__channels": [4]}, IMAGES, NUMBERS)
    best = ours.best_estimator_
    assert best.target_mean_.shape == best.target_scale_.shape == (2,)
    np.testing.assert_allclose(best.target_mean_, NUMBERS.mean(0))
    assert best.score(IMAGES, NUMBERS) == r2_score(NUMBERS, best.predict(IMAGES))


@pytest.mark.parametrize(
    ("criterion", "arguments"),
    [
        ("huber", {"criterion__delta": [0.5, 2.0]}),
        (nn.SmoothL1Loss, {"criterion__beta": [0.5, 2.0]}),
        (nn.SmoothL1Loss(beta=0.3), {"lr": [0.01, 0.1]}),
        (weighed_squares, {"criterion__power": [1.5, 2.0]}),
    ],
)
def test_a_criterion_and_its_arguments_are_searched(criterion, arguments, training):
    net = NeuralNetRegressor(Conv, criterion=criterion, **TRAINING)
    ours, _ = both_grids(net, arguments, IMAGES, NUMBERS / 100)
    assert [call[:2] for call in training] == [(2, 2)]
    scores = ours.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all() and scores[0] != scores[1]


def test_a_custom_criterion_takes_the_target_as_it_is():
    slow = {**TRAINING, "lr": 1e-4}
    net = NeuralNetRegressor(Conv, criterion=nn.MSELoss(reduction="sum"), **slow)
    net.fit(IMAGES, NUMBERS)
    assert (net.target_mean_ == 0).all() and (net.target_scale_ == 1).all()
    with torch.no_grad():
        np.testing.assert_array_equal(net.predict(IMAGES), net.module_(torch.from_numpy(IMAGES)))
    with pytest.raises(InputError, match="sample_weight .* Return row losses"):
        net.fit(IMAGES, NUMBERS, sample_weight=np.linspace(1, 2, 60))
    net = NeuralNetRegressor(
        Conv,
        training_step=lambda net, batch: nn.functional.mse_loss(net(batch[0]), batch[1]),
        **slow,
    )
    assert (net.fit(IMAGES, NUMBERS).target_scale_ == 1).all()


def test_a_class_of_torch_trains_as_the_loss_of_its_name():
    words = [
        {"criterion": c, "criterion__label_smoothing": 0.1}
        for c in ("cross_entropy", nn.CrossEntropyLoss, None)
    ]
    words.append({"criterion": nn.CrossEntropyLoss(label_smoothing=0.1)})
    nets = [clone(CONV).set_params(**each).fit(IMAGES, CLASSES) for each in words]
    for net in nets[1:]:
        np.testing.assert_allclose(
            net.predict_proba(IMAGES), nets[0].predict_proba(IMAGES), rtol=1e-10
        )


def test_scikit_learns_tools_take_images():
    net = clone(pickle.loads(pickle.dumps(CONV)))
    scores = model_selection.cross_validate(net, IMAGES, CLASSES, cv=2)["test_score"]
    weights = np.linspace(0.5, 1, 60)
    fitted = pickle.loads(pickle.dumps(net.fit(IMAGES, CLASSES, sample_weight=weights)))
    np.testing.assert_array_equal(fitted.predict_proba(IMAGES), net.predict_proba(IMAGES))
    halving = model_selection.HalvingGridSearchCV(
        net, GRID, cv=2, resource="max_epochs", max_resources=4
    )
    assert np.isfinite([*scores, halving.fit(IMAGES, CLASSES).best_score_]).all()
    search = GridSearchCV(net, {"lr": [0.1, 0.3]}, cv=2)
    by_hand = model_selection.cross_val_score(search, IMAGES, CLASSES, cv=2)
    np.testing.assert_allclose(nested_cv(search, IMAGES, CLASSES, outer=2).scores, by_hand)


def test_halving_trains_on_with_the_running_statistics():
    options = {"n_candidates": 2, "factor": 2, "min_resources": 1, "max_resources": 2, "cv": 2}
    search = HalvingRandomSearchCV(CONV, RATES, random_state=0, **options)
    results = search.fit(IMAGES, CLASSES).cv_results_
    for params, score in zip(results["params"], results["mean_test_score"]):
        alone = clone(CONV).set_params(**params)
        assert score == pytest.approx(
            model_selection.cross_val_score(alone, IMAGES, CLASSES, cv=2).mean()
        )


def test_inputs_come_as_a_dict_or_a_tuple():
    y = torch.from_numpy(NUMBERS[:, 0])
    net = NeuralNetRegressor(TwoInputs, **TRAINING)
    named = net.fit({"image": IMAGES, "age": AGES}, y).predict({"age": AGES, "image": IMAGES})
    np.testing.assert_array_equal(net.fit((IMAGES, AGES), y).predict((IMAGES, AGES)), named)
    search = RandomizedSearchCV(net, {"lr": [0.1, 0.3]}, n_iter=2, cv=2).fit(
        {"image": IMAGES, "age": AGES}, y
    )
    assert search.predict(SliceDict(image=IMAGES, age=AGES)).shape == (60,)


def test_a_slice_dict_is_indexed_by_rows_and_by_names():
    X = SliceDict(image=IMAGES, age=torch.from_numpy(AGES))
    assert len(X) == 60 and X.shape == (60,) and X["image"] is IMAGES
    part = pickle.loads(pickle.dumps(X[np.arange(4)]))
    assert isinstance(part, SliceDict) and len(part) == 4 and len(part[:2]) == 2


def test_hypergradients_go_through_running_statistics():
    search = HypergradientSearchCV(CONV, {}, n_iter=1, outer_steps=1, cv=2).fit(IMAGES, CLASSES)
    assert np.isfinite(search.best_score_)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: SliceDict(a=IMAGES, b=AGES[:3]),
            r"SliceDict must hold inputs of equal length, got {'a': 60, 'b': 3}",
        ),
        (
            lambda: SliceDict(a=[1, 2]),
            r"SliceDict\['a'\] must be an array or tensor .*got \[1, 2\]",
        ),
        (lambda: SliceDict(), "SliceDict must hold inputs of equal length, got none"),
        (
            lambda: CONV.fit({"image": [1, 2]}, CLASSES),
            "must hold only arrays and tensors .*got {'image': list}",
        ),
        (lambda: CONV.fit((IMAGES, AGES[:3]), CLASSES), r"got 60 in X\[0\], 3 in X\[1\]"),
        (lambda: CONV.fit(IMAGES * np.nan, CLASSES), "X must be finite, got NaN .* in row 0"),
        (
            lambda: CONV.fit(IMAGES, CLASSES).predict(IMAGES[:, :, :5]),
            "X must be as in training",
        ),
        (lambda: CONV.fit(IMAGES, CLASSES).predict(AGES), "X must be as in training"),
        (
            lambda: CONV.fit(IMAGES, np.stack([CLASSES] * 2, 1)),
            r"labels of 0 and 1 .* several columns, got other values of shape \(60, 2\)",
        ),
        (
            lambda: CONV.fit(IMAGES, csr_matrix(LABELS)),
            r"y must be dense, got a sparse matrix. Pass y.toarray\(\)",
        ),
        (lambda: CONV.fit(IMAGES[:50], CLASSES), "inconsistent numbers of samples"),
        (lambda: CONV.fit(IMAGES[:, :, :2], CLASSES), "forward pass of Conv.*raised"),
        (lambda: MLPClassifier().fit(IMAGES, CLASSES), "Found array with dim 4"),
        (
            lambda: GridSearchCV(CONV, {}).fit((IMAGES, AGES), CLASSES),
            "tuple of 2 inputs.*SliceDict",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
