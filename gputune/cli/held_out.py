"""Scores on rows with known targets, and the choice of the model that a search saves."""

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import get_scorer
from torch import Tensor
from torch.nn import functional

from gputune.data.array_files import ARRAY_SUFFIXES, pick_target
from gputune.data.columns import Layout
from gputune.data.files import line_of, read_table
from gputune.data.folds import unpack_folds
from gputune.data.source import Source, read_source
from gputune.data.table import Table
from gputune.data.target import MissingTarget, check_target
from gputune.ground.errors import InputError
from gputune.ground.text import Measure, count
from gputune.ground.types import Json
from gputune.population.outputs import one_logit
from gputune.scoring.baseline import best_constant
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES, parse_loss
from gputune.scoring.metrics import make_scoring
from gputune.scoring.objective import Objective
from gputune.scoring.scores import PINBALL
from gputune.scoring.scoring import Scoring
from gputune.study.model import TunedModel, class_codes
from gputune.study.model_files import DESCRIPTION, read_description
from gputune.study.study import Study, Trial
from gputune.tuning.options import Options
from gputune.views.default_trial import default_trial


def rows_with_target(
    model: TunedModel, file: str, target: str | None = None, missing_target: MissingTarget = "error"
) -> Source:
    """Return the rows of a file that have a known target value.

    Args:
        model: the model that will predict the rows.
        file: a table, or a file of arrays.
        target: the column or array with the targets. None: the target of the search.
        missing_target: "drop" leaves out rows without a target, "error" refuses them.

    Raises:
        InputError: the file lacks the target, or the target cannot be scored.
    """
    name = model.target if target is None else target
    if Path(file).suffix.lower() in ARRAY_SUFFIXES or not isinstance(model.layout, Layout):
        if target is None and Path(file).suffix.lower() == ".npy":
            remedy = f"Pass the .npy file with the true value for each row of {file!r}."
            raise InputError("--target", "is missing", remedy=remedy)
        source = _arrays_with_target(model, Path(file), name)
        source = source.with_target(missing_target, "row {}".format, is_column=False)
    else:
        table = _table_with_target(model, file, name)
        source = read_source(
            table, name, missing_target=missing_target, place=partial(line_of, file)
        )
    if model.classes is None:
        check_target(source.y, task=model.task, n_rows=len(source.X), name=name)
    return source


def _arrays_with_target(model: TunedModel, path: Path, name: str) -> Source:
    """Return the input arrays of a file and its target array.

    Raises InputError if the arrays have different lengths.
    """
    X = model._inputs(path)
    y = pick_target(path, name)
    if y.ndim == 0 or len(y) != len(X):
        raise InputError(
            None,
            f"{str(path)!r} has {len(X)} rows, but the target {name!r} has shape {y.shape}",
            remedy="Pass one true value for each row.",
        )
    return Source(X, y, name, None, None)


def _table_with_target(model: TunedModel, file: str, name: str) -> Table:
    """Return the table of a file, with its target column.

    Raises InputError if the table lacks the target column.
    """
    assert isinstance(model.layout, Layout)
    texts = [column.name for column in model.layout.columns if column.kind == "category"]
    # Labels stay text: "007" and "7" are two labels, but one number.
    labels = [name] if model.classes is not None and model.classes.dtype.kind == "U" else []
    used = {name, *(column.name for column in model.layout.columns)}
    table = read_table(file, [*texts, *labels], used.__contains__)
    if name not in table.names:
        raise InputError(
            None,
            f"{file!r} has no column {name!r} with true values",
            remedy="To predict rows without true values, use gputune predict.",
        )
    return table


# Number of bootstrap samples, and of rows per sample at most. Together they take one or two
# seconds.
_SAMPLES = 400
_SAMPLE_ROWS = 20_000

IntervalMethod = Literal["wilson", "bootstrap", ""]


@dataclass(frozen=True)
class HeldOut:
    """A score on held-out rows. As in scikit-learn, greater is better."""

    score: float  # NaN if the score is undefined
    rows: int
    # Rows of a class that the search does not have. They count as wrong. Balanced accuracy and
    # scores of probabilities leave them out.
    unseen: int = 0
    reason: str = ""  # why there is no score, or ""
    interval: tuple[float, float] | None = None  # 95% interval; None if it is not known
    # how the interval was computed; "" if few bootstrap samples have a score
    interval_method: IntervalMethod = ""
    positive: object = None  # the positive class of the score; None if it has none
    # the best answer without a model, and its score on the same rows
    baseline: tuple[str, float] | None = None
    chose: bool = False  # whether these rows chose between an ensemble and the best trial

    def interval_holds(self, score: float) -> bool:
        """Return whether another score lies within this score's interval."""
        if self.interval is None:
            return False
        low, high = self.interval
        return low <= score <= high

    def bounds(self, measure: Measure) -> str:
        """Return the bounds of the score's interval as text, or "" if the score has no interval."""
        return " to ".join(sorted(map(measure.text, self.interval or ()), key=float))

    def interval_text(self, measure: Measure) -> str:
        """Return the score's interval as text in parentheses, after a space.

        The result is "" if too few bootstrap samples have a score.
        """
        if self.interval is not None:
            is_exact = self.interval_method == "wilson"
            name = "95% interval" if is_exact else "95% of bootstrap samples"
            return f" ({name}: {self.bounds(measure)})"
        if self.interval_method == "bootstrap":
            return (
                f" (no interval: all bootstrap samples of the {count(self.rows, 'row')} have this "
                "score)"
            )
        return ""


def saved_loss(model: TunedModel) -> Objective | None:
    """Return the named loss with which a model was trained, with its numeric arguments.

    Returns None for a custom loss, which no file holds, and for a built-in model without a recorded
    loss.
    """
    loss = model.info.get("loss")  # an augmented training adds a comma and more text
    if loss is None or (model.spec["kind"] != "module" and not loss):
        return None
    name, numbers = parse_loss(loss.partition(",")[0] or LOSS_OF_TASK.get(model.task, ""))
    if name not in LOSSES:
        return None
    arguments = model.info.get("loss_arguments", {})
    return Objective(name, binary=model.task == "binary", fixed=arguments, numbers=numbers)


def held_out_score(
    model: TunedModel,
    scoring: str,
    test: Source,
    *,
    positive: object = None,
    outputs: Tensor | None = None,
) -> HeldOut:
    """Return the score of a model on held-out rows. An undefined score raises no error.

    Args:
        model: the saved model.
        scoring: name of the scorer.
        test: the held-out rows.
        positive: the positive class of the score. None if the score has no positive class.
        outputs: the model's outputs for the rows, if they are known.
    """
    rows = len(test.X)
    loss = saved_loss(model) if scoring in ("neg_loss", PINBALL) else None
    if scoring == "neg_loss" and loss is None:
        return HeldOut(
            math.nan, rows, reason="a saved model keeps its loss only if the loss has a name"
        )
    classes, y = labels_of(model, test)
    unseen = 0 if model.classes is None else int((y >= len(model.classes)).sum())
    label = None  # the positive class
    try:
        scorer = make_scoring(
            scoring, model.task, model.classes, positive, loss, n_labels=y.shape[-1]
        )
        if classes and scorer.positive is not None:
            label = classes[scorer.positive]
        if outputs is None:
            outputs = model._outputs(test.X)
        training_loss = loss if scoring == "neg_loss" else None
        outputs, target = _outputs_to_score(model, training_loss, outputs, torch.from_numpy(y))
        if unseen:
            scorer, outputs, target = _with_unseen(scorer, outputs, target, len(classes))
        # warnings about classes that are never predicted
        with warnings.catch_warnings(action="ignore"):
            score = _score(scorer, outputs, target)
        if not math.isfinite(score):
            raise ValueError("it is undefined on these rows")
    except ValueError as error:  # scikit-learn raises it if a metric is undefined
        return HeldOut(math.nan, rows, unseen, str(error).rstrip("."), positive=label)
    interval, method = _interval(scorer, outputs, target, score)
    return HeldOut(score, rows, unseen, interval=interval, interval_method=method, positive=label)


def held_out_baseline(
    model: TunedModel, scoring: str, rest: Source, test: Source, *, positive: object = None
) -> tuple[str, float] | None:
    """Return the best constant prediction as text, and its score on the held-out rows.

    The constant is fitted on ``rest``, the rows of the search. Returns None if no constant
    prediction is known, or if its score is undefined on the held-out rows.
    """
    if scoring == "neg_loss" or model.task == "custom":
        return None
    _, codes = labels_of(model, rest)
    classes, y = labels_of(model, test)
    target = torch.from_numpy(y)
    try:
        loss = saved_loss(model) if scoring == PINBALL else None
        scorer = make_scoring(
            scoring, model.task, model.classes, positive, loss, n_labels=y.shape[-1]
        )
        constant = best_constant(scorer, model.task, torch.from_numpy(codes), classes=model.classes)
        if constant is None:
            return None
        outputs = constant.outputs.expand(len(y), -1)
        if model.classes is not None and (y >= len(model.classes)).any():
            scorer, outputs, target = _with_unseen(scorer, outputs, target, len(classes))
        with warnings.catch_warnings(action="ignore"):  # scores that a constant leaves undefined
            score = _score(scorer, outputs, target)
    except ValueError:  # scikit-learn raises it if a metric is undefined
        return None
    return (constant.answer, score) if math.isfinite(score) else None


def labels_of(model: TunedModel, test: Source) -> tuple[list[object], np.ndarray]:
    """Return the classes, and the class code of each held-out row.

    Classes that occur only in held-out rows come last. For a regression return [] and the target
    values.
    """
    if model.classes is None:
        return [], np.asarray(test.y, dtype=float)
    return class_codes(model.classes, test.y)


def _outputs_to_score(
    model: TunedModel, loss: Objective | None, outputs: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a model's outputs and the targets in the form that ``Scoring`` expects.

    A loss is computed on the transformed targets, as in training.
    """
    if loss is not None and model.task == "regression":
        target = y.numpy()
        if model.transform is not None:
            target = model.transform.forward(target)
        return outputs, torch.from_numpy((target - model.center) / model.scale)
    if loss is not None:
        return one_logit(outputs) if loss.one_logit else outputs, y
    if model.task == "multilabel" or model.classes is not None:
        # The model's own logits. Logits of rounded probabilities would have other ties.
        return outputs, y
    predicted = torch.from_numpy(model._predict(outputs))
    return predicted if predicted.dim() > 1 else predicted[:, None], y


def _with_unseen(
    scorer: Scoring, outputs: Tensor, y: Tensor, classes: int
) -> tuple[Scoring, Tensor, Tensor]:
    """Return scoring, outputs and class codes that allow for classes without a column in the
    outputs (n, K).

    ``classes`` is the number of all classes.
    """
    unseen = y >= outputs.shape[1]
    if scorer.positive is not None:
        # Rows of an unseen class count as not positive.
        return scorer, outputs, y.where(~unseen, 1 - scorer.positive)
    # These scores leave such rows out. Otherwise a mean over classes or a limit of the logarithm
    # would decide the value of a class without a probability.
    if (
        scorer.is_loss
        or scorer.name == "balanced_accuracy"
        or get_scorer(scorer.name)._response_method != "predict"
    ):
        return scorer, outputs[~unseen], y[~unseen]
    # Logits of -inf: the model never predicts these classes.
    padded = functional.pad(outputs, (0, classes - outputs.shape[1]), value=-torch.inf)
    return replace(scorer, classes=np.arange(classes)), padded, y


def _score(scorer: Scoring, outputs: Tensor, y: Tensor) -> float:
    """Return the score of outputs. Raises ValueError if no row has the positive class."""
    if scorer.positive is not None and not (y == scorer.positive).any():
        raise ValueError("no row has the positive class")  # scikit-learn returns 0
    return scorer.on_rows(outputs, y)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a share, such as an accuracy.

    The interval is correct even if all or none of the rows are successes. Source: Wilson (1927),
    Probable inference, the law of succession, and statistical inference.
    """
    z = 1.959963984540054  # the 97.5% quantile of the normal distribution
    share = successes / n
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    scale = 1 + z**2 / n
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _interval(
    scorer: Scoring, outputs: Tensor, y: Tensor, score: float
) -> tuple[tuple[float, float] | None, IntervalMethod]:
    """Return the bounds of a 95% interval, and the method that computed them.

    An accuracy has Wilson's interval. Other scores have the bounds of 95% of the scores of
    bootstrap samples. For many rows, smaller samples are drawn and their spread is scaled. If all
    samples have the same score, like for a perfect model, the bootstrap gives no bounds.
    """
    if scorer.name == "accuracy":
        return wilson_interval(round(score * len(y)), len(y)), "wilson"
    # A fixed seed gives the same interval each time.
    rng = np.random.default_rng(0)
    rows = len(y)
    size = min(rows, _SAMPLE_ROWS)
    scores = []
    with warnings.catch_warnings(action="ignore"):  # samples can lack a class
        for _ in range(_SAMPLES):
            sample = torch.from_numpy(rng.integers(0, rows, size))
            with suppress(ValueError):
                scores.append(_score(scorer, outputs[sample], y[sample]))
    finite = list(filter(math.isfinite, scores))
    # Most samples can lack a score, for example if a class is rare.
    if len(finite) < _SAMPLES / 2:
        return None, ""
    if max(finite) == min(finite):
        return None, "bootstrap"
    # The spread of a score falls with the square root of the number of rows.
    low, high = score + math.sqrt(size / rows) * (np.quantile(finite, (0.025, 0.975)) - score)
    return (float(low), float(high)), "bootstrap"


LEVEL = 0.9  # level of the intervals whose coverage is printed

COMPARED_SHARE = 0.1
"""Share of the search's member-steps that a comparison may cost.

A member-step is one optimizer step of one trial on one fold. The model of the default configuration
is trained for a comparison if its training takes less than this share.
"""


def read_saved_description(folder: Path) -> Json:
    """Return the description of the model in a folder, or {} if no description can be read."""
    try:
        return read_description(folder / DESCRIPTION)
    except (FileNotFoundError, InputError):
        return {}


def check_extras(rest: Source, options: Options, *, intervals: bool, calibrate: bool) -> None:
    """Raise InputError before training if the model cannot have intervals or be calibrated."""
    if not (intervals or calibrate):
        return
    target = check_target(rest.y, task=options.rows.task, n_rows=len(rest.X), name=rest.target)
    is_one_number = target.task == "regression" and target.n_outputs == 1
    is_one_class = target.task in ("binary", "multiclass")
    flags = []
    if intervals:
        flags.append(("--intervals", "one number", is_one_number))
    if calibrate:
        flags.append(("--calibrate", "one class", is_one_class))
    for flag, prediction, fits in flags:
        if not fits:
            rule = f"needs a model that predicts {prediction}, but the target is {target.in_words}"
            raise InputError(flag, rule, remedy="Leave it out.")
        if options.search.differentiates:
            rule = (
                "trains a trial on its folds again, but this is not possible for a hypergradient "
                "search"
            )
            raise InputError(flag, rule, remedy="Leave it out.")


def calibration_text(model: TunedModel) -> str:
    """Return a sentence with the temperature of a calibrated model, or "" for other models."""
    if model.temperature == 1.0:
        return ""
    return (
        "The probabilities are calibrated: the logits are divided by the temperature "
        f"{model.temperature:.4g}, which was fitted on the validation rows of the folds."
    )


def coverage_text(model: TunedModel, test: Source | None) -> str:
    """Return a sentence with the share of held-out rows inside the model's intervals."""
    if test is None:
        return (
            "The model has prediction intervals. No rows were held out to check how many target "
            "values lie inside the intervals."
        )
    try:
        lower, upper = model.predict_interval(test.X, LEVEL)
    except InputError:
        return (
            f"The model has intervals, but the folds have too few rows for a level of {LEVEL:.0%}."
        )
    y = np.asarray(test.y, dtype=np.float64)
    inside = int(((lower <= y) & (y <= upper)).sum())
    rows = count(len(y), "held-out row")
    return f"Intervals with level {LEVEL:.0%} hold {inside} of {rows} ({inside / len(y):.0%})."


def is_cheap_to_train(study: Study, trial: Trial) -> bool:
    """Return whether training a trial on all rows takes less than a tenth of the search's
    member-steps."""
    folds = unpack_folds(study.record.arguments.folds)
    fold_rows = [len(train) for train, _ in folds]
    all_rows = int(study.record.fingerprint["rows"])
    epochs: list[int] = (~np.isnan(study.curves)).any(2).sum(1).tolist()
    spent = 0
    for searched, n_epochs in zip(study.trials, epochs):
        spent += n_epochs * sum(_steps(study, searched, rows) for rows in fold_rows)
    return trial.best_epoch * _steps(study, trial, all_rows) < COMPARED_SHARE * spent


def _steps(study: Study, trial: Trial, n_rows: int) -> int:
    """Return the number of optimizer steps of one epoch on ``n_rows`` rows.

    Returns 1 for the logistic regression that is solved to convergence.
    """
    choice = study.data.choice
    options = study.data.options
    if choice.solved:
        return 1
    return math.ceil(
        n_rows / int(choice.complete(trial.params, options.training.schedule)["batch_size"])
    )


def is_worth_comparing(study: Study, held_out: HeldOut | None) -> bool:
    """Return True if a comparison with the default's model is possible and cheap.

    Then gputune makes the comparison by default.
    """
    default = default_trial(study)
    if default is None or held_out is None or held_out.reason or is_default_best(study):
        return False
    return is_cheap_to_train(study, default)


def comparison_text(measure: Measure, saved: HeldOut, default: HeldOut) -> str:
    """Return a remark on the held-out scores of the saved model and of the default's model, or
    ""."""
    if saved.reason or default.reason:
        return f"The default's model has no held-out {measure.name} to compare with."
    if not may_be_chance(saved, default):
        return ""
    return (
        "The held-out score of the saved model or of the default lies within the other's 95% "
        "interval, so the difference may be chance."
    )


def same_model_text(model: TunedModel) -> str:
    """Return a sentence for the case that the best trial is the default configuration.

    Then there is no other model to compare.
    """
    saved = "model of the best trial" if "ensemble" in model.info else "saved model"
    return f"The best trial is the default configuration, so the {saved} is the default's model."


def is_default_best(study: Study) -> bool:
    """Return whether the best trial is the default configuration."""
    default = default_trial(study)
    return default is not None and default.number == study.best_trial.number


def may_be_chance(one: HeldOut, other: HeldOut) -> bool:
    """Return whether one of two different scores lies within the other's interval."""
    return one.score != other.score and (
        one.interval_holds(other.score) or other.interval_holds(one.score)
    )
