"""The score of a saved model on held-out rows, compared with the best constant prediction."""

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from sklearn.metrics import get_scorer
from torch import Tensor
from torch.nn import functional

from gputune.data.source import Source
from gputune.ground.text import Measure, count
from gputune.population.outputs import one_logit
from gputune.scoring.baseline import best_constant
from gputune.scoring.losses import LOSS_OF_TASK, LOSSES, parse_loss
from gputune.scoring.metrics import make_scoring
from gputune.scoring.objective import Objective
from gputune.scoring.scores import PINBALL
from gputune.scoring.scoring import Scoring
from gputune.study.model import TunedModel, class_codes

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
