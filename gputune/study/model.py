"""A tuned model: a plain module and its preprocessing, from raw rows to predictions."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gputune.data.array_files import ARRAY_SUFFIXES, pick_inputs
from gputune.data.arrays import ArrayLayout, Arrays
from gputune.data.columns import Layout, checked_tensor
from gputune.data.dataset import first_equal
from gputune.data.encode import Statistics
from gputune.data.files import read_table
from gputune.data.scaling import encode
from gputune.data.table import Table, as_table, quoted
from gputune.data.torch_dataset import read_inputs
from gputune.engine.stop import entry
from gputune.errors import InputError, InputWarning, warn
from gputune.modules.construction import Builder
from gputune.population.population import call_module, first_output, two_logits
from gputune.seeding import prediction_draws
from gputune.study.export import encoded, export
from gputune.study.labels import checked_codes, checked_numbers
from gputune.study.model_files import ModelContent, read_fields, save_model
from gputune.text import card, count, measure_of, short

ROWS = 8192
NUMBERS = 2**23
"""Most rows, and most encoded numbers, that one batch of a prediction holds."""


@dataclass(frozen=True, eq=False, repr=False)
class TunedModel(ModelContent):
    """A trained module with all that is needed to predict from raw rows: for scikit-learn, an
    estimator that is fitted.

    module    plain ``nn.Module``, returning logits (n, K), of two classes also one, (n, 1) or (n,),
              or values (n, 1) or (n,) of a standardised target
    classes   (K,) the labels, in their own type; None where there are none to choose from
    center, scale   the regression target is ``value * scale + center``, for several numbers (K,); 0
                    and 1 otherwise
    transform  what was done to the target before, of which predictions are the inverse; None:
               nothing
    residuals  ascending, how far off its folds' members were on rows that they had not seen, before
               the target is
              transformed back: what ``predict_interval`` needs; None: not kept
    temperature  by which logits are divided, of a model that was calibrated; 1: of one that was not
    target    name of the target's column
    spec      how the module is built again: {"kind": "mlp" or "logistic", "kwargs": {...}}, or for
              a class of the user {"kind": "module", "kwargs": {...}} with what module_source.py
              writes about the class; ``n_features`` and ``n_outputs`` follow from layout and
              classes and need not be in ``kwargs``
    info      what is worth knowing later: score, held-out score, parameters, versions
    """

    def predict(self, X: object) -> np.ndarray:
        """Return class labels in their own type, or values in original units (float64), (n,),
        several (n, K).

        Of several labels 0 or 1 each, (n, K); for a custom target the outputs of the module, (n,
        ...).

        ``X`` is a file, a data frame, an array or a tensor with the columns of the training data;
        more columns are ignored. Where the training data were arrays of other shapes, it is such
        arrays, or a Dataset of torch's with them, whose targets are left out. Raises InputError for
        missing columns, other shapes, and for what is no table.
        """
        return self._predict(self._outputs(X))

    def _predict(self, outputs: Tensor) -> np.ndarray:
        """Return what ``predict`` does of rows with these outputs."""
        if self.task in ("custom", "multilabel"):
            return (outputs if self.task == "custom" else (outputs > 0).long()).numpy()
        if self.classes is None:
            return self._in_units(outputs.numpy() * self.scale + self.center)
        labels: np.ndarray = self.classes[outputs.argmax(1).numpy()]
        return labels

    def predict_interval(
        self, X: object, level: float = 0.9
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the lower and the upper ends, (n,) each, of intervals that hold about a share
        ``level`` of the values.

        The prediction before the target is transformed back, plus and minus the ceil((m + 1)
        level)-th smallest of the m residuals. Of a model that was trained on all rows this has no
        guarantee, and is near ``level`` in practice.
        Source: Barber et al. (2021), Predictive inference with the jackknife+, arXiv:1905.02928,
        section 1: the K-fold form of the jackknife; CV+ would keep the members of all folds.

        Raises InputError for classes, several numbers a row, a model without residuals, and too
        high a level.
        """
        half = self._half_width(level)
        return self._ends(self._outputs(X), half)

    def _ends(
        self, outputs: Tensor, half: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the ends of intervals of so much to both sides, of rows with these outputs."""
        middle = outputs.numpy() * self.scale + self.center
        ends = np.stack([self._in_units(middle + part) for part in (-half, half)])
        return ends.min(0), ends.max(0)  # a transformation may turn them round

    def _half_width(self, level: float) -> float:
        if self.task != "regression" or not isinstance(self.center, float):
            words = {
                "regression": "several: search for one column at a time",
                "custom": "its own: use predict",
            }
            what = words.get(
                self.task,
                f"{'labels' if self.task == 'multilabel' else 'classes'}: use predict_proba",
            )
            raise InputError(
                "predict_interval is for a model of one number a row, and this one predicts "
                f"{what}."
            )
        if (
            isinstance(level, bool)
            or not isinstance(level, float | int | np.number)
            or not 0 < level < 1
        ):
            raise InputError(
                f"predict_interval(level={level!r}) must be a share between 0 and 1, such as 0.9 "
                "for 90 %."
            )
        if self.residuals is None:
            raise InputError(
                "predict_interval needs the residuals of the folds, which this model was made "
                "without: make it with study.best_model(intervals=True), or with gputune resume "
                "FOLDER --intervals."
            )
        rows = len(self.residuals)
        rank = math.ceil((rows + 1) * level - 1e-9)
        if rank > rows:
            raise InputError(
                f"predict_interval(level={level}) needs more than the {rows} rows that the folds "
                f"validated on; give a level of at most {rows / (rows + 1):.4g}."
            )
        return float(self.residuals[rank - 1])

    def _in_units(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return values (n, K) in the target's own units, (n,) of one number."""
        if self.transform is not None:
            values = self.transform.inverse(torch.from_numpy(values)).numpy()
        return values[:, 0] if values.shape[1] == 1 else values

    def predict_proba(self, X: object) -> NDArray[np.float64]:
        """Return the probability of each class, (n, K) in the order of ``classes``: the softmax of
        the logits.

        These are divided by the ``temperature``. Of several labels that of each. Raises InputError
        for a regression.
        """
        if self.task == "multilabel":
            return self._outputs(X).sigmoid().numpy()
        if self.classes is None:
            raise InputError(
                "predict_proba needs a model of classes, and this is a regression; use predict."
            )
        return self._outputs(X).softmax(1).numpy()

    def score(self, X: object, y: object, sample_weight: object = None) -> float:
        """Return the accuracy of the labels y, or R2 of numbers, as estimators of scikit-learn do.

        A label that the model does not know counts as wrong. Raises InputError for a y with missing
        values, of another length, with no known label at all, or of text where the model predicts
        numbers.
        """
        from sklearn.metrics import accuracy_score, r2_score

        guess = self.predict(X)
        if self.classes is not None:
            true, guess = (checked_codes(self.classes, labels, len(guess)) for labels in (y, guess))
        else:
            true = checked_numbers(y, self.task, len(guess))
        metric = r2_score if self.task == "regression" else accuracy_score
        return float(metric(true, guess, sample_weight=sample_weight))

    def fit(self, X: object, y: object = None) -> Self:
        """Raise InputError: scikit-learn asks of an estimator that it has a fit, and this one is
        fitted."""
        raise InputError(
            "a TunedModel is fitted already: wrap it in sklearn.frozen.FrozenEstimator where "
            "scikit-learn would fit it again, or search anew with gputune.tune."
        )

    @property
    def classes_(self) -> np.ndarray:
        """``classes``, as scikit-learn calls them; AttributeError where there are none."""
        if self.classes is None:
            raise AttributeError("classes_: the model is none of classes")
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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``model.safetensors`` and ``model.json`` into ``folder``, which is made where it is
        missing.

        Each file appears whole or not at all. A model saved there before is replaced. Warns where
        ``load_model`` will not find the class from elsewhere: one of a script, a notebook or a
        function. Raises InputError for a folder that holds anything else, and for a module whose
        state or spec cannot be written.
        """
        save_model(self, folder)

    def export(self, path: str | os.PathLike[str]) -> None:
        """Write the model, with all its numeric preprocessing, to a new file that runs without
        gputune.

        ``.onnx`` (with ``torch.onnx``; extra "onnx") or ``.pt2`` (with ``torch.export``). It takes,
        for any n, what
        ``encoded`` gives: of a table X, float64 (n, C), of other inputs each of them (n, ...) in
        its dtype. It gives label (n,), the position in ``classes``, and probabilities (n, K), of
        several labels both (n, K); for a regression prediction (n,) or (n, K) in original units,
        for a custom target the outputs. The file's metadata, "gputune.json", names inputs, outputs
        and classes.

        Raises InputError for another suffix, a file that exists, a folder that does not, and a
        user's module that PyTorch cannot trace; MissingExtraError where the extra is missing.
        """
        export(self, path)

    def encoded(self, X: object) -> Any:
        """Return what an exported model takes of these rows, of a table float64 (n, C).

        Of inputs that are no table it is an array, a tuple or a dict of them, in the dtypes of the
        training data. Where all columns of the training data are numbers or booleans: these
        columns, NaN where a value is missing. Else the features that text and dates are made into,
        see ``Layout``. Raises InputError as ``predict``.
        """
        return encoded(self, self._inputs(X))

    def _outputs(self, X: object) -> Tensor:
        """Return calibrated logits, or standardised values, (n, K) float64 on the CPU.

        Equal rows of a batch have equal ones.
        """
        self.module.eval()  # the caller may have trained it on
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        names = None if isinstance(self.layout, Layout) else self.layout.names
        outputs = list[Tensor]()
        # Not torch.inference_mode: TorchScript fails on its tensors, and so does training on what a
        # forward kept.
        with prediction_draws(device, draws=bool(self.info.get("draws"))), torch.no_grad():
            for part in self._batches(self._inputs(X)):
                rows = encode(part, self.layout, self.statistics, self.dtype)
                if isinstance(part, Table) and not rows[0].isfinite().all():
                    raise self._too_large(
                        part, rows[0], first_row=sum(len(output) for output in outputs)
                    )
                inputs = [x.to(device) for x in rows]
                try:
                    # Copies: of arrays they may be the caller's own rows, and those of a table are
                    # read below.
                    own = [x.clone() for x in inputs]
                    output = self._check_output(call_module(self.module, own, names), len(part))
                except (IndexError, RuntimeError) as error:
                    raise InputError(
                        f"{type(self.module).__name__} raised {type(error).__name__}: {error}, on "
                        "rows unlike those that it was trained on; an embedding must have a "
                        "place for every id."
                    ) from error
                first = first_equal(inputs[0]) if isinstance(self.layout, Layout) else None
                outputs.append((output if first is None else output[first]).double().cpu())
        return torch.cat(outputs) / self.temperature

    def _too_large(self, table: Table, x: Tensor, *, first_row: int) -> InputError:
        """Return what to raise for rows of which some inputs x (n, D') are no finite numbers."""
        assert isinstance(self.layout, Layout)
        row = int((~x.isfinite().all(1)).nonzero()[0])
        sizes = np.nan_to_num(np.abs(self.layout.raw(table.select(np.array([row])))[0]))
        name = self.layout.feature_names[sizes.argmax()]
        dtype = str(self.dtype).removeprefix("torch.")
        return InputError(
            f"column {name!r} has a number of size {sizes.max():.4g} in row {first_row + row}, "
            f"too large for the {dtype} in which the model computes; correct it, or leave the row "
            "out."
        )

    def _inputs(self, X: object) -> Table | Arrays:
        """Return X, or what a file has beside the target, as a table or as arrays like those of the
        training.

        A tensor of a table's rows becomes a table too, so that tensors and arrays are predicted
        alike.
        """
        is_table = isinstance(self.layout, Layout)
        if isinstance(X, str | Path) and (Path(X).suffix.lower() in ARRAY_SUFFIXES or not is_table):
            X = self._inputs_of_file(Path(X))
        if not isinstance(self.layout, Layout):
            return self.layout.raw(
                read_inputs(X, len(self.layout.shapes)) if isinstance(X, Dataset) else X
            )
        if isinstance(X, Tensor):
            return as_table(checked_tensor(X).cpu().numpy())
        # "007" and "7" are two levels, and one number.
        texts = [column.name for column in self.layout.columns if column.kind == "category"]
        table = read_table(X, texts) if isinstance(X, str | Path) else as_table(X)
        # That a file still has its target, or what the search left out, is no surprise that a
        # warning must tell.
        known = {self.target, *self.info.get("drop", ())} - {*self.layout.inputs}
        unread = [name for name in table.names if name in known]
        table = table.drop(*unread) if len(unread) < len(table.names) else table
        if unseen := self.layout.unseen(table):
            words = "; ".join(
                f"column {name!r}: {quoted(levels)}" for name, levels in unseen.items()
            )
            warn(
                "X has categories that were not there in training, which no feature stands for: "
                f"{words}.",
                InputWarning,
            )
        return table

    def _inputs_of_file(self, path: Path) -> Any:
        """Return the inputs from a file of arrays, without the target and what the search left
        out."""
        unread = {self.target, *self.info.get("drop", ())}
        if isinstance(self.layout, Layout):
            return pick_inputs(path, None, [(len(self.layout.inputs),)], unread)
        return pick_inputs(path, self.layout.names, self.layout.shapes, unread)

    def _batches(self, table: Table | Arrays) -> Iterator[Table | Arrays]:
        """Cut the rows, so that the encoded numbers need no more memory for a large file than for a
        small one."""
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
            f"{type(self.module).__name__} must return a tensor of shape {(rows, K)}, got {got}; "
            "correct its forward()."
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: what it predicts from what, and the scores it was chosen by."""
        info = self.info
        rows = [("predicts", self.target), ("from", self.layout.in_words())]
        if self.classes is not None:
            words = [
                *map(str, self.classes[:8].tolist()),
                *(["..."] if len(self.classes) > 8 else []),
            ]
            rows.append(("classes", f"{len(self.classes)}: {', '.join(words)}"))
        if "score" in info:
            measure = measure_of(
                str(info.get("scoring") or "score"), info["score"], info.get("positive")
            )
            rows.append((f"cross-validated {measure.title}", measure.text(info["score"])))
            if (score := info.get("held_out_score")) is not None:
                held_out = f"{measure.text(score)} on {count(info['held_out_rows'], 'row')}"
                rows.append((f"held-out {measure.name}", held_out))
        rows += [("temperature", short(self.temperature))] * (self.temperature != 1)
        rows += [(name, short(value)) for name, value in info.get("params", {}).items()]
        return card(f"TunedModel: {type(self.module).__name__}", rows)

    def __repr__(self) -> str:
        what = self.task if self.classes is None else f"{len(self.classes)} classes"
        return (
            f"TunedModel({type(self.module).__name__}, {what}, {self.target!r} from "
            f"{self.layout.in_words()})"
        )


@entry
def load_model(
    folder: str | os.PathLike[str], module: Builder | None = None, *, trust_code: bool = False
) -> TunedModel:
    """Return the model that ``TunedModel.save`` wrote into ``folder``, on the CPU and ready to
    predict.

    Runs the file or package of a user's own class or function, if this user has trained or saved
    that class or function from that file on this machine, if the running program defines the class,
    or with ``trust_code=True``. ``module=`` gives the class instead and imports nothing, the safe
    way to open a folder from someone else. Nothing is unpickled. Warns where the source has changed
    and the state still fits.

    Raises InputError, saying which file and what to do, for a folder that is missing, incomplete,
    damaged or of a newer gputune, and for a class that is gone, not trusted, or that the state does
    not fit.
    """
    return TunedModel(**read_fields(Path(folder), module, trust_code=trust_code))
