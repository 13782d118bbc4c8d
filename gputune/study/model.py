"""A tuned model: a plain module and its preprocessing, from raw rows to predictions."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from gputune.data.array_files import ARRAY_SUFFIXES, pick_inputs
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.columns import Layout, checked_tensor
from gputune.data.containers import read_inputs
from gputune.data.dataset import first_equal
from gputune.data.encode import Statistics
from gputune.data.files import read_table
from gputune.data.kinds import text_of
from gputune.data.scaling import encode
from gputune.data.source import read_source
from gputune.data.table import Table, as_table, quoted
from gputune.data.target import check_target, refuse_missing, target_array
from gputune.engine.stop import entry
from gputune.ground.annotations import FloatArray, IntArray, StrPath
from gputune.ground.errors import InputError, InputWarning, Verbatim, option, per_interface, warn
from gputune.ground.seeding import prediction_draws
from gputune.ground.text import card, count, measure_of, short
from gputune.ground.types import Config, Task
from gputune.modules.construction import Builder
from gputune.population.outputs import call_module, first_output, two_logits
from gputune.study.adapter_files import AdapterFiles
from gputune.study.export import encoded, export
from gputune.study.model_files import ModelContent, read_fields, save_model

ROWS = 8192
NUMBERS = 2**23
"""The largest count of rows, and of encoded values, in one batch of a prediction."""


@dataclass(frozen=True, eq=False, repr=False)
class TunedModel(ModelContent, AdapterFiles):
    """A trained module with its preprocessing, which predicts from raw rows.

    ``Study.best_model``, ``Study.ensemble`` and ``load_model`` make it. It is a fitted estimator of
    scikit-learn. Use ``predict``, ``predict_proba``, ``predict_interval`` and ``score`` on raw
    rows, ``save`` to load the model again with gputune, and ``export`` to run it without gputune.

    Attributes:
        module: plain ``nn.Module``. It returns logits (n, K), or (n, 1) or (n,) for two classes.
            For a regression it returns values (n, 1) or (n,) of the standardized target.
        task: "binary", "multiclass", "multilabel", "regression" or "custom".
        layout: the columns of the table and their features, or the shapes of the arrays.
        statistics: the numbers that scale the inputs, fitted on the training rows.
        dtype: the dtype in which the module computes, ``torch.float32`` or ``torch.float64``.
        classes: (K,) the labels in their own type, or None without classes.
        center: the regression target is ``value * scale + center``. A float, or (K,) for a target
            of K values per row. 0 for other tasks.
        scale: see ``center``. 1 for other tasks.
        transform: the transformation of the target before it was standardized, or None. Predictions
            are its inverse.
        residuals: absolute errors of the folds' models on validation rows, ascending, before the
            target is transformed back. ``predict_interval`` needs them. None if they were not kept.
        temperature: the logits are divided by it. 1 if the model was not calibrated.
        target: name of the target's column.
        spec: the recipe to build the module again: {"kind": "mlp" or "logistic", "kwargs": {...}}.
            For a user's class it is {"kind": "module", "kwargs": {...}} with the keys that
            code.py writes. ``n_features`` and ``n_outputs`` follow from layout and classes
            and need not be in ``kwargs``.
        info: facts for later: score, held-out score, parameters, versions.

    Example:
        The examples of the methods continue this one.

        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True, as_frame=True)
        >>> study = gputune.tune("mlp", X, y, n_trials=4, max_epochs=20, verbose=0)
        >>> model = study.best_model()
        >>> model.task, model.classes
        ('multiclass', array([0, 1, 2]))
    """

    def predict(self, X: object) -> np.ndarray:
        """Return class labels in their own type, or values in original units (float64).

        Args:
            X: a file, a data frame, an array or a tensor with the columns of the training data.
                Other columns are ignored. If the model was trained on arrays of other shapes, X is
                arrays of the same form, or a torch Dataset with them; its targets are ignored.

        Returns:
            The predictions, by task:

            - classes: labels (n,).
            - regression: values (n,), or (n, K) for a target of K values per row.
            - several labels: 0 or 1 for each label, (n, K).
            - custom target: the outputs of the module, (n, ...).

        Raises:
            InputError: a column is missing, a shape differs, or X is not a table.

        Example:
            >>> model.predict(X.head(3))
            array([0, 0, 0])
        """
        return self._predict(self._outputs(X))

    def _predict(self, outputs: Tensor) -> np.ndarray:
        """Return the predictions for rows from the outputs of the module."""
        if self.task in ("custom", "multilabel"):
            return (outputs if self.task == "custom" else (outputs > 0).long()).numpy()
        if self.classes is None:
            return self._in_units(outputs.numpy() * self.scale + self.center)
        labels: np.ndarray = self.classes[outputs.argmax(1).numpy()]
        return labels

    def predict_interval(self, X: object, level: float = 0.9) -> tuple[FloatArray, FloatArray]:
        """Return intervals that contain about a share ``level`` of the true values.

        The interval is the prediction plus and minus the ceil((m + 1) level)-th smallest of the m
        residuals. The prediction and the residual are computed before the target is transformed
        back. This model is trained on all rows, so the coverage has no guarantee. In practice it is
        close to ``level``.

        Source: Barber et al. (2021), Predictive inference with the jackknife+, arXiv:1905.02928,
        section 1: the K-fold form of the jackknife. CV+ would need the members of all folds.

        Args:
            X: the rows, as for ``predict``.
            level: the share of values within the intervals, above 0 and below 1 [default: 0.9].
                With m residuals it must be at most m / (m + 1).

        Returns:
            The lower and the upper ends, (n,) each.

        Raises:
            InputError: the model predicts classes or several numbers per row, has no residuals, or
                has too few residuals for ``level``.

        Example:
            >>> search = {"n_trials": 2, "max_epochs": 5, "task": "regression", "verbose": 0}
            >>> regression = gputune.tune("mlp", X, y, **search)
            >>> numbers = regression.best_model(intervals=True)
            >>> low, high = numbers.predict_interval(X.head(3), level=0.9)
            >>> bool((low < high).all())
            True
        """
        half = half_width(self, level)
        return self._ends(self._outputs(X), half)

    def _ends(self, outputs: Tensor, half: float) -> tuple[FloatArray, FloatArray]:
        """Return the lower and upper ends of prediction intervals from the outputs of the module.

        Each interval extends by ``half`` to both sides of the prediction.
        """
        middle = outputs.numpy() * self.scale + self.center
        ends = np.stack([self._in_units(middle + part) for part in (-half, half)])
        return ends.min(0), ends.max(0)  # a decreasing transformation swaps the ends

    def _in_units(self, values: FloatArray) -> FloatArray:
        """Return predicted values in the units of the target: (n, K), or (n,) if K is 1."""
        if self.transform is not None:
            values = self.transform.inverse(torch.from_numpy(values)).numpy()
        return values[:, 0] if values.shape[1] == 1 else values

    def predict_proba(self, X: object) -> FloatArray:
        """Return the probability of each class: the softmax of the logits divided by
        ``temperature``.

        Args:
            X: the rows, as for ``predict``.

        Returns:
            (n, K) in the order of ``classes``. For several labels, the probability of each label.

        Raises:
            InputError: the model is a regression.

        Example:
            >>> model.predict_proba(X.head(3)).shape
            (3, 3)
        """
        if self.task == "multilabel":
            return self._outputs(X).sigmoid().numpy()
        if self.classes is None:
            raise InputError(
                None,
                "predict_proba needs a model that predicts classes, but this model is a regression",
                remedy="Use predict.",
            )
        return self._outputs(X).softmax(1).numpy()

    def score(self, X: object, y: object, sample_weight: object = None) -> float:
        """Return the accuracy of predicted labels, or R2 of predicted values, as in scikit-learn.

        Args:
            X: the rows, as for ``predict``.
            y: the targets, one per row, or the name of their column in X. An unknown label counts
                as wrong.
            sample_weight: the weight of each row, (n,), or None.

        Raises:
            InputError: y has missing values, another length or no known label, or is text although
                the model predicts numbers.

        Example:
            >>> model.score(X, y) > 0.9
            True
        """
        from sklearn.metrics import accuracy_score, r2_score

        if isinstance(y, str):
            y = read_source(X, y, module=not isinstance(self.layout, Layout)).y
        predicted = self.predict(X)
        rows = len(predicted)
        if self.classes is not None:
            true = checked_codes(self.classes, y, rows)
            predicted = checked_codes(self.classes, predicted, rows)
        else:
            true = checked_numbers(y, self.task, rows)
        metric = r2_score if self.task == "regression" else accuracy_score
        return float(metric(true, predicted, sample_weight=sample_weight))

    def fit(self, X: object, y: object = None) -> Self:
        """Raise InputError, because this estimator is already fitted.

        scikit-learn requires that an estimator has a ``fit`` method.
        """
        raise InputError(
            None,
            "A TunedModel is already fitted",
            remedy="Wrap the model in sklearn.frozen.FrozenEstimator if scikit-learn would fit it "
            "again, or search again with gputune.tune.",
        )

    @property
    def params(self) -> Config:
        """The configuration that the model was trained with: the ``params`` of its trial.

        {} for an ensemble, which holds models of several trials.
        """
        return dict(self.info.get("params", {}))

    @property
    def classes_(self) -> np.ndarray:
        """The class labels, under scikit-learn's attribute name.

        Raises:
            AttributeError: the model has no classes.
        """
        if self.classes is None:
            raise AttributeError("classes_: this model does not predict classes")
        return self.classes

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> object:
        from sklearn.utils import ClassifierTags, RegressorTags, Tags, TargetTags

        several = self.task == "multilabel" or not isinstance(self.center, float)
        classes = self.task in ("binary", "multiclass", "multilabel")
        return Tags(
            estimator_type="classifier" if classes else "regressor",
            target_tags=TargetTags(required=True, multi_output=several),
            classifier_tags=ClassifierTags(multi_label=self.task == "multilabel")
            if classes
            else None,
            regressor_tags=None if classes else RegressorTags(),
        )

    def save(self, folder: StrPath) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``.

        Each file appears complete or not at all. A model in the folder is replaced.

        Args:
            folder: the folder, which is created if it does not exist.

        Raises:
            InputError: the folder holds other files, or the state or the spec of the module cannot
                be written.

        Example:
            >>> model.save("iris-model")
        """
        save_model(self, folder)

    def export(self, path: StrPath) -> None:
        """Write the model with its numeric preprocessing to a new file that runs without gputune.

        The file takes the result of ``encoded``, with any number of rows n: (n, C) float64 for a
        table, otherwise each input (n, ...) in its dtype. It returns

        - classes: label (n,), the position in ``classes``, and probabilities (n, K).
        - several labels: label and probabilities, both (n, K).
        - regression: prediction (n,) or (n, K) in original units.
        - custom target: the outputs.

        The metadata of the file, "gputune.json", names inputs, outputs and classes.

        Args:
            path: the new file, ``.onnx`` (``torch.onnx``, needs the extra "onnx") or ``.pt2``
                (``torch.export``).

        Raises:
            InputError: the suffix is different, the file exists, its folder does not exist, or
                PyTorch cannot trace the module.
            MissingExtraError: the extra is not installed.

        Example:
            >>> import torch
            >>> model.export("iris.pt2")
            >>> program = torch.export.load("iris.pt2").module()
            >>> label, probabilities = program(torch.as_tensor(model.encoded(X.head(3))))
            >>> label.tolist()
            [0, 0, 0]
        """
        export(self, path)

    def encoded(self, X: object) -> Any:
        """Return the inputs of an exported model for some rows.

        Args:
            X: the rows, as for ``predict``.

        Returns:
            (n, C) float64 for a table. If all columns of the training data are numeric or boolean,
            the C inputs are the columns, NaN for a missing value. Otherwise the C inputs are the
            features made from text and dates, see ``Layout``. For other inputs, an array, a tuple
            or a dict of arrays in the dtypes of the training data.

        Raises:
            InputError: as in ``predict``.

        Example:
            >>> model.encoded(X.head(3)).shape
            (3, 4)
        """
        return encoded(self, self._inputs(X))

    def _outputs(self, X: object) -> Tensor:
        """Return calibrated logits or standardized values, (n, K) float64 on the CPU.

        Equal rows of a batch have equal outputs.
        """
        self.module.eval()  # the caller may have continued its training
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        names = None if isinstance(self.layout, Layout) else self.layout.names
        outputs = list[Tensor]()
        first_row = 0
        # Not torch.inference_mode: TorchScript fails on its tensors, and later training fails on
        # activations that a forward kept.
        with prediction_draws(device, draws=bool(self.info.get("draws"))), torch.no_grad():
            for part in self._batches(self._inputs(X)):
                rows = encode(part, self.layout, self.statistics, self.dtype)
                if isinstance(part, Table) and not rows[0].isfinite().all():
                    raise self._too_large(part, rows[0], first_row=first_row)
                inputs = [x.to(device) for x in rows]
                try:
                    # Copies, because a forward may write into its inputs. Arrays may be the
                    # caller's own rows, and the rows of a table are read again below.
                    copies = [x.clone() for x in inputs]
                    output = call_module(self.module, copies, names)
                    output = self._check_output(output, len(part))
                except (IndexError, RuntimeError) as error:
                    raise InputError(
                        None,
                        f"{type(self.module).__name__} raised {type(error).__name__}: {error}",
                        remedy="These rows differ from the rows on which it was trained. For "
                        "example, an embedding must have an entry for every id.",
                    ) from error
                if isinstance(self.layout, Layout):
                    # Equal rows get the output of the first of them, see ``first_equal``.
                    first = first_equal(inputs[0])
                    output = output if first is None else output[first]
                outputs.append(output.double().cpu())
                first_row += len(part)
        return torch.cat(outputs) / self.temperature

    def _too_large(self, table: Table, x: Tensor, *, first_row: int) -> InputError:
        """Return the error for a table with module inputs x (n, D') that are not all finite."""
        assert isinstance(self.layout, Layout)
        row = int((~x.isfinite().all(1)).nonzero()[0])
        sizes = np.nan_to_num(np.abs(self.layout.raw(table.select(np.array([row])))[0]))
        name = self.layout.feature_names[sizes.argmax()]
        dtype = str(self.dtype).removeprefix("torch.")
        return InputError(
            None,
            f"column {name!r} has a number of size {sizes.max():.4g} in row {first_row + row}, "
            f"too large for the {dtype} in which the model computes",
            remedy="Correct the value, or leave the row out.",
        )

    def _inputs(self, X: object) -> Table | Arrays:
        """Return X, or the inputs in a file, as a table or as arrays in the layout of the training
        data.

        A tensor with the rows of a table becomes a table too, so that equal tensors and arrays have
        equal predictions.
        """
        is_table = isinstance(self.layout, Layout)
        if isinstance(X, str | Path) and (Path(X).suffix.lower() in ARRAY_SUFFIXES or not is_table):
            X = self._inputs_of_file(Path(X))
        if not isinstance(self.layout, Layout):
            if isinstance(X, Dataset):
                X = read_inputs(X, len(self.layout.shapes))
            return self.layout.raw(X)
        if isinstance(X, Tensor):
            return as_table(checked_tensor(X).cpu().numpy())
        # As text, "007" and "7" are two levels. As numbers they would be equal.
        texts = [column.name for column in self.layout.columns if column.kind == "category"]
        reads = {column.name for column in self.layout.columns}.__contains__
        table = read_table(X, texts, reads) if isinstance(X, str | Path) else as_table(X, reads)
        # No warning if a file still has its target, or columns that the search left out.
        unread = self._unread - {*self.layout.inputs}
        extra = [name for name in table.names if name in unread]
        table = table.drop(*extra) if len(extra) < len(table.names) else table
        unseen = self.layout.unseen(table)
        if unseen:
            columns = [f"column {name!r}: {quoted(levels)}" for name, levels in unseen.items()]
            warn(
                f"{option('X')} has categories that the training data did not have. The model has "
                f"no feature for them: {'; '.join(columns)}.",
                InputWarning,
            )
        return table

    @property
    def _unread(self) -> set[str]:
        """The names of the target and of the columns that the search left out."""
        return {self.target, *self.info.get("drop", ())}

    def _inputs_of_file(self, path: Path) -> Any:
        """Return the inputs from a file of arrays, without the target and the arrays that the
        search left out."""
        if isinstance(self.layout, Layout):
            return pick_inputs(path, None, [(len(self.layout.inputs),)], self._unread)
        return pick_inputs(path, self.layout.names, self.layout.shapes, self._unread)

    def _batches(self, table: Table | Arrays) -> Iterator[Table | Arrays]:
        """Yield the rows to predict in batches, so that a large file needs no more memory than a
        small file."""
        if isinstance(self.layout, ArrayLayout):
            numbers = self.layout.row_numbers
        else:
            assert isinstance(self.statistics, Statistics)
            numbers = self.statistics.n_inputs
        rows = min(ROWS, max(1, NUMBERS // numbers))
        for start in range(0, len(table), rows):
            yield table.select(np.arange(start, min(start + rows, len(table))))

    def _check_output(self, outputs: object, rows: int) -> Tensor:
        output = first_output(outputs)
        K = self.spec["kwargs"].get("n_outputs", 1) if self.classes is None else len(self.classes)
        if isinstance(output, Tensor):
            if self.task == "custom" and len(output) == rows:
                return output
            if output.shape == (rows,) and (self.classes is None or K == 2):
                output = output[:, None]
            if self.task == "binary" and output.shape == (rows, 1):
                return two_logits(output)
            if output.shape == (rows, K):
                return output
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            None,
            f"{type(self.module).__name__} must return a tensor of shape {(rows, K)}, got {got}",
            remedy="Correct its forward().",
        )

    def _repr_html_(self) -> str:
        """Return the HTML of the model for notebooks: target, inputs, scores and parameters."""
        info = self.info
        rows = [("predicts", self.target), ("from", self.layout.in_words())]
        if self.classes is not None:
            labels = list(map(str, self.classes[:8].tolist()))
            if len(self.classes) > 8:
                labels.append("...")
            rows.append(("classes", f"{len(self.classes)}: {', '.join(labels)}"))
        if "score" in info:
            scoring = str(info.get("scoring") or "score")
            measure = measure_of(scoring, info["score"], info.get("positive"))
            rows.append((f"cross-validated {measure.title}", measure.text(info["score"])))
            score = info.get("held_out_score")
            if score is not None:
                held_out = f"{measure.text(score)} on {count(info['held_out_rows'], 'row')}"
                rows.append((f"held-out {measure.name}", held_out))
        if self.temperature != 1:
            rows.append(("temperature", short(self.temperature)))
        rows += [(name, short(value)) for name, value in self.params.items()]
        return card(f"TunedModel: {type(self.module).__name__}", rows)

    def __repr__(self) -> str:
        task = self.task if self.classes is None else f"{len(self.classes)} classes"
        return (
            f"TunedModel({type(self.module).__name__}, {task}, {self.target!r} from "
            f"{self.layout.in_words()})"
        )


@entry
def load_model(
    folder: StrPath,
    module: Builder | None = None,
    *,
    base: nn.Module | None = None,
    trust_code: bool = False,
) -> TunedModel:
    """Return the model that ``TunedModel.save`` wrote into ``folder``, on the CPU and ready to
    predict.

    Nothing is unpickled. A class or function outside of ``gputune.models`` comes from the running
    program, which has imported or trained it, or from the argument ``module``. Otherwise gputune
    runs the file or imports the package that the folder names, but only with ``trust_code=True``.

    Warns if the source has changed and the state still fits.

    Args:
        folder: the folder of the model.
        module: the class, given directly. Then nothing is imported. This is the safe way to open a
            folder from someone else.
        base: the pretrained module of a LoRA, which the folder does not contain. gputune checks
            that its weights are those of the training, and imports nothing.
        trust_code: True to run the code that the folder names, for this call.

    Returns:
        The model, with the predictions that it had when it was saved.

    Raises:
        FileNotFoundError: the folder does not exist.
        InputError: the folder is incomplete, damaged or of a newer gputune, or the class
            is missing or does not fit the state. The message names the file and the remedy.
        UntrustedCodeError: the class is in code that this program has not imported. It is an InputError.

    Example:
        >>> import gputune
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> study = gputune.tune("mlp", X, y, n_trials=2, max_epochs=5, verbose=0)
        >>> model = study.best_model()
        >>> model.save("saved-model")
        >>> loaded = gputune.load_model("saved-model")
        >>> bool((loaded.predict(X) == model.predict(X)).all())
        True
    """
    return TunedModel(**read_fields(Path(folder), module, base=base, trust_code=trust_code))


_USE_PROBA = per_interface(python="Use predict_proba.", command="Use --proba.")
_NO_INTERVAL = {
    "regression": ("several numbers", "Run a separate search for each column."),
    "custom": ("custom outputs", "Use predict."),
    "multilabel": ("labels", _USE_PROBA),
}
"""For errors: the predictions of each task without intervals, and the remedy."""


def half_width(model: "TunedModel", level: float) -> float:
    """Return the half width of prediction intervals that contain about a share ``level`` of the
    true values.

    The half width is in units of the residuals; see ``TunedModel.predict_interval``.

    Raises:
        InputError: the model has no intervals, the level is not between 0 and 1, or the residuals
            are too few for this level.
    """
    interval = per_interface(python="predict_interval", command="--interval")
    if model.task != "regression" or not isinstance(model.center, float):
        predictions, remedy = _NO_INTERVAL.get(model.task, ("classes", _USE_PROBA))
        raise InputError(
            interval,
            f"is only for regression with one target, but this model predicts {predictions}",
            remedy=remedy,
        )
    is_number = isinstance(level, float | int | np.number) and not isinstance(level, bool)
    if not is_number or not 0 < level < 1:
        raise InputError(
            f"predict_interval(level={level!r})",
            "must be a share between 0 and 1, such as 0.9 for 90%",
        )
    if model.residuals is None:
        resume = "gputune resume FOLDER --intervals"
        raise InputError(
            interval,
            "needs the residuals of the folds, but this model does not have them",
            remedy=per_interface(
                python=f"Make the model with study.best_model(intervals=True), or with {resume}.",
                command=f"Make the model with {resume}.",
            ),
        )
    rows = len(model.residuals)
    # 1e-9 absorbs the rounding of the product.
    rank = math.ceil((rows + 1) * level - 1e-9)
    if rank > rows:
        raise InputError(
            f"predict_interval(level={level})",
            f"needs more than the {rows} rows on which the folds validated",
            remedy=f"Pass a level of at most {rows / (rows + 1):.4g}.",
        )
    return float(model.residuals[rank - 1])


def _without_column_axis(labels: np.ndarray) -> np.ndarray:
    """Return labels (n, 1) as labels (n,), and labels of any other shape unchanged."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def class_codes(classes: np.ndarray, y: object) -> tuple[list[object], IntArray]:
    """Return the classes of a model and y as class codes, (n,).

    Classes that occur only in y follow the classes of the model.

    Raises:
        InputError: y is neither (n,) nor (n, 1).
    """
    array = _without_column_axis(np.asarray(y))
    if array.ndim != 1:
        raise InputError(
            None,
            f"the true labels have the shape {array.shape}, but the model predicts one class for "
            "each row",
            remedy="Give one class for each row.",
        )
    known = classes.tolist()
    labels = array.tolist()
    if classes.dtype.kind == "U":
        labels = list(map(text_of, labels))
    else:  # one text among numbers makes the whole column text
        of_text = {text_of(label): label for label in known}
        labels = [
            of_text.get(label, label) if isinstance(label, str) else label for label in labels
        ]
    # by text, because labels of different types cannot be compared
    known += sorted({*labels} - {*known}, key=str)
    codes = {label: code for code, label in enumerate(known)}
    return known, np.array([codes[label] for label in labels], dtype=np.int64)


def refuse_unknown(classes: list[object], codes: IntArray, K: int, name: str) -> None:
    """Raise InputError if no label is one of a model's K classes, the first K of ``classes``."""
    if (codes >= K).all():
        raise InputError(
            None,
            f"{name} has no class of the model: it holds {quoted(map(str, classes[K:]))}, but the "
            f"model's classes are {quoted(map(str, classes[:K]))}",
            remedy="Write them as in the training data.",
        )


def checked_codes(classes: np.ndarray, y: object, rows: int) -> IntArray:
    """Return labels y as class codes, (n,), with one code per row.

    Raises:
        InputError: the labels cannot be scored.
    """
    labels = _without_column_axis(target_array(y, "y"))
    if labels.shape != (rows,):
        shape = Verbatim(f"shape {labels.shape} and {rows} rows")
        raise InputError("y", f"must have one label per row of {option('X')}", got=shape)
    refuse_missing(labels, "y", "Leave those rows out.")
    known, codes = class_codes(classes, labels)
    refuse_unknown(known, codes, len(classes), "y")
    return codes


def checked_numbers(y: object, task: Task, rows: int) -> np.ndarray:
    """Return the numeric targets y, (n,) or (n, K). Text is accepted if it spells numbers.

    Raises:
        InputError: for the same reasons as in ``tune``.
    """
    values = target_array(y, "y")
    is_object_column = values.ndim == 1 and values.dtype.kind in "OU"
    if is_object_column and any(isinstance(value, str) for value in values):
        table = as_table(values[:, None])
        y = table.columns[0] if table.kinds[0] == "number" else y
    return check_target(y, task=task, n_rows=rows).values
