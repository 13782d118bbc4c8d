"""Compute the validation scores of all members at once. A member is one trial on one fold.

gputune computes a score on the device, or calls a scikit-learn scorer. The process waits for the
device once per epoch.

In shapes, C counts trials, F folds, M metrics, m validation rows of a fold, and K outputs per row.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.ground.errors import InputError
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Task
from gputune.population.outputs import (
    call_module,
    class_logits,
    is_one_logit,
    one_logit,
    only_present,
)
from gputune.scoring import scores
from gputune.scoring.losses import pairs_all_rows

Scorer = Callable[..., SupportsFloat]
"""A scorer: a function of (estimator, X, y) that returns a number. Greater numbers are better."""
TrialModel = Callable[[int], nn.Module]
"""A function that takes the index of a trial in the outputs, and returns the model of this trial.

The model is a plain module on the CPU in evaluation mode.
"""

_SMALLEST = 1e-300
"""The value that replaces a probability of 0. With 0, an infinite log loss would look like a
diverged trial."""


@dataclass(frozen=True)
class Scoring:
    """The metric of a search, which computes scores from outputs on the device or with
    scikit-learn.

    Attributes:
        name: The name of the metric.
        score: The score computed on the device, or None.
        scorer: The scikit-learn scorer, or None.
        classes: The labels that a scorer receives, or None for regression. A scorer with a
            scikit-learn name receives the class codes 0, 1, ..., so that scores of a positive class
            work with text labels.
        positive: The code of the positive class. None if the score has no positive class, or if a
            callable chooses it.
        of_outputs: Scores the unchanged outputs of one member, or None.
        is_loss: If True, ``of_outputs`` receives outputs and targets in the units of training.
        label: The user's name for one of several metrics.
        others: The further metrics of a search. They do not rank trials.
        kept_bytes: The limit for outputs that are kept with their scores, in bytes. 0 keeps none.
    """

    name: str
    score: scores.Score | None
    scorer: Scorer | None
    classes: np.ndarray | None
    positive: int | None = None
    of_outputs: Callable[[Tensor, Tensor], SupportsFloat] | None = None
    is_loss: bool = False
    label: str = ""
    others: "tuple[Scoring, ...]" = ()
    kept_bytes: int = 0

    @property
    def on_outputs(self) -> bool:
        """True if all metrics are functions of the outputs.

        A scikit-learn scorer needs more than the outputs, because it may ask a model to predict
        other rows.
        """
        return all(one.score or one.of_outputs for one in (self, *self.others))

    def metrics(
        self, data: Dataset, fold: int, outputs: Tensor, member: TrialModel | None = None
    ) -> Tensor:
        """Return the scores of all metrics of the search for the same outputs.

        The shape is (C,) for one metric and (C, M) for M metrics.
        """
        scores = [one(data, fold, outputs, member) for one in (self, *self.others)]
        return torch.stack(scores, 1) if self.others else scores[0]

    def __call__(
        self, data: Dataset, fold: int, outputs: Tensor, member: TrialModel | None = None
    ) -> Tensor:
        """Score the outputs of C trials on the validation rows of a fold.

        The outputs are scored in double precision, like the predictions of a tuned model.

        Args:
            data: The dataset.
            fold: The index of the fold.
            outputs: The outputs, (C, m, K).
            member: Makes the model of a trial. A custom scorer needs it to ask for predictions of
                other rows.

        Returns:
            The scores, (C,) float64. A diverged trial has the score NaN.
        """
        known = outputs
        if data.present is not None and not is_one_logit(outputs, data.task, 2):
            # The logit of an absent class may be -inf. That is no divergence.
            known = outputs.masked_fill(~data.present[fold], 0)
        finite = known.isfinite().flatten(1).all(-1)
        target = data.target[data.folds[fold].valid]
        if self.of_outputs is not None:
            result = self._of_outputs(data, fold, outputs, target, finite)
        else:
            outputs = _in_target_units(data, fold, outputs)
            if data.transforms:  # an inverse may overflow
                finite &= outputs.isfinite().flatten(1).all(-1)
            ranks = self.score is None or self.score in scores.RANKING
            # Equal rows may get outputs with different last bits, which would break their ties. So
            # all equal rows use the outputs of the first one.
            if ranks and (first := data.first_equal[fold]) is not None:
                outputs = outputs[:, first]
            if self.score is not None:
                result = self.score(*self.positive_last(outputs, target))
            else:
                result = self._through_sklearn(
                    data, fold, *self.positive_last(outputs, target), finite, member
                )
        return torch.where(finite & result.isfinite(), result, torch.nan)

    def on_rows(self, outputs: Tensor, target: Tensor) -> float:
        """Score outputs (m, K) against any target (m, ...), for example of held-out rows.

        Outputs are logits, or for a regression values in the target's own units. The method does
        not catch a ValueError of scikit-learn.
        """
        if self.of_outputs is not None:
            return float(self.of_outputs(outputs.clone(), target.clone()))
        if self.score is not None:
            outputs, target = self.positive_last(outputs, target)
            return float(self.score(outputs[None], target)[0])
        from gputune.scoring.estimators import fitted

        assert self.scorer is not None  # a Scoring has one of the three
        outputs, codes = self.positive_last(outputs, target)
        y = codes.cpu().numpy().copy()
        if ":" in self.name and self.classes is not None and self.classes.ndim == 1:
            y = self.classes[y]  # a custom scorer receives labels
        X = np.zeros((len(y), 1))  # scorers do not read the rows
        return float(self.scorer(fitted(outputs.cpu().clone(), self.classes, X, X), X, y))

    def _of_outputs(
        self, data: Dataset, fold: int, outputs: Tensor, target: Tensor, finite: Tensor
    ) -> Tensor:
        """Return the scores (C,) by the user's function of (outputs, y). A diverged trial has the
        score NaN."""
        assert self.of_outputs is not None
        if data.task == "binary" and data.n_outputs == 1 and not is_one_logit(outputs, "binary", 2):
            # The mean of predictions has a log probability for each class.
            outputs = one_logit(outputs)
        if self.is_loss:
            target = data.targets(fold)[data.folds[fold].valid]
        elif is_one_logit(outputs, data.task, 2):
            outputs = outputs.double().view(*outputs.shape[:2], 1)
        else:
            outputs = _in_target_units(data, fold, outputs).view(outputs.shape)
            target = target[:, None] if data.column else target
        trials = finite.nonzero().flatten().tolist()
        if (
            trials
            and not self.is_loss
            and pairs_all_rows(self.of_outputs, outputs[trials[0]], target)
        ):
            raise InputError(
                f"scoring={self.name!r}",
                "compares each output with the targets of all rows: outputs have shape "
                f"{tuple(outputs[0].shape)} and y {tuple(target.shape)}, which torch broadcasts",
                remedy="Take outputs[:, 0].",
            )
        result = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
        for trial in trials:
            try:
                # Copies: a custom function may write into them, but other metrics, other trials and
                # an ensemble also read them.
                result[trial] = float(self.of_outputs(outputs[trial].clone(), target.clone()))
            except Exception as error:
                shapes = f"{tuple(outputs[trial].shape)} and {tuple(target.shape)}"
                raise InputError(
                    f"scoring={self.name!r}",
                    f"raised {type(error).__name__} on fold {fold}: {error}",
                    remedy=f"gputune calls scoring(outputs, y), with tensors {shapes}. The function "
                    "must return a number, and greater numbers must be better.",
                ) from error
        return result.to(finite.device)

    def positive_last(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Swap the two classes in outputs (..., 2) and class codes (m,) if the positive class has
        code 0."""
        return (outputs.flip(-1), 1 - target) if self.positive == 0 else (outputs, target)

    def _through_sklearn(
        self,
        data: Dataset,
        fold: int,
        outputs: Tensor,
        target: Tensor,
        finite: Tensor,
        member: TrialModel | None,
    ) -> Tensor:
        """Return the scores (C,) by a scikit-learn scorer. A diverged trial has the score NaN."""
        from gputune.scoring.estimators import fitted

        assert self.scorer is not None
        y = target.cpu().numpy()
        y = y if self.classes is None or data.task == "multilabel" else self.classes[y]
        # Scorers with a scikit-learn name do not read the rows.
        rows = (
            np.zeros((len(y), 1))
            if data.scorer_rows is None
            else data.scorer_rows.rows(data.folds[fold])
        )
        result = np.full(len(outputs), np.nan)
        others: Callable[[object], Tensor]
        try:
            for trial in np.flatnonzero(finite.cpu().numpy()).tolist():
                others = _no_prediction
                if member is not None:
                    others = partial(_predict, data, fold, member, trial)
                if isinstance(rows, tuple | dict) or (
                    isinstance(rows, np.ndarray) and rows.flags.writeable
                ):
                    # Gathered again for each trial, because a scorer may write into the rows.
                    rows = (
                        rows
                        if data.scorer_rows is None
                        else data.scorer_rows.rows(data.folds[fold])
                    )
                # Also a DataFrame is copied, because a scorer may write into it.
                X = rows if isinstance(rows, np.ndarray | tuple | dict) else copy.deepcopy(rows)
                # Copies: a custom scorer may write into its arguments.
                estimator = fitted(outputs[trial].cpu().clone(), self.classes, X, rows, others)
                result[trial] = float(self.scorer(estimator, X, y.copy()))
                estimator.close()
        except Exception as error:
            remedy = "Choose a scoring that fits the task, for example accuracy or r2."
            if ":" in self.name:  # a custom scorer, named "module:function"
                remedy = (
                    "gputune calls scorer(estimator, X, y), with X in the type that you passed."
                )
            raise InputError(
                f"scoring={self.name!r}",
                f"raised {type(error).__name__} on fold {fold}: {error}",
                remedy=remedy,
            ) from error
        return torch.from_numpy(result).to(outputs.device)


def shape_of_scores(scoring: Scoring | None, folds: int) -> tuple[int, ...]:
    """Return the shape of one trial's scores per epoch: (F,), or (F, M) with several metrics."""
    return (folds,) if scoring is None or not scoring.others else (folds, 1 + len(scoring.others))


def _in_target_units(data: Dataset, fold: int, outputs: Tensor) -> Tensor:
    """Convert outputs (C, m, K) to float64 and to the units of the target, for scoring.

    Only regression outputs change their units. A class that is absent from a fold's training rows
    gets the logit -inf.
    """
    outputs = outputs.double()
    if is_one_logit(outputs, data.task, 2):
        return class_logits(outputs, data.task, 2)
    if outputs.dim() == 2 and data.task != "custom":
        outputs = outputs[..., None]  # one number a row
    if data.task == "regression":
        return data.in_units(fold, outputs)
    return without_absent(outputs, data, fold)


def without_absent(outputs: Tensor, data: Dataset, fold: int) -> Tensor:
    """Give each class that is absent from the training rows of a fold the logit -inf.

    ``outputs`` are (..., K), with one logit for each class. Other targets have no classes, and their
    outputs are returned unchanged.
    """
    if data.present is None:
        return outputs
    return only_present(outputs, data.present[fold])


def outputs_of(probabilities: Tensor, task: Task) -> Tensor:
    """Return outputs (logits) for which a model predicts the given probabilities (..., K)."""
    if task == "multilabel":
        return probabilities.logit(_SMALLEST)
    return probabilities.clamp_min(_SMALLEST).log()


def _no_prediction(X: object) -> Tensor:
    """Raise InputError, because there is no model that can predict the rows X."""
    raise InputError(
        None,
        "The scorer asks for predictions of other rows than X, but an ensemble and the importance "
        "of columns have predictions only for X",
        remedy="Predict only X in the scorer.",
    )


def _predict(data: Dataset, fold: int, member: TrialModel, trial: int, X: object) -> Tensor:
    """Run a member's model on other rows X, which a custom scorer asked for. Return outputs (m,
    K)."""
    if data.scorer_rows is None:
        raise InputError(
            None, "A scorer with a scikit-learn name cannot predict other rows than it scores"
        )
    inputs = data.scorer_rows.encoded(X, data.statistics[fold], data.dtype)
    with torch.no_grad(), keyed_draws(torch.device("cpu"), 0, "scorer", fold, host=True):
        # Copies: without scaling, the inputs are the user's own rows.
        own = [x.clone() for x in inputs]
        outputs = call_module(member(trial), own, data.names).view(1, len(inputs[0]), -1)
    return _in_target_units(data, fold, outputs.to(data.device))[0].cpu()
