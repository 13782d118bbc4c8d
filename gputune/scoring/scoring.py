"""Compute the validation scores of all members at once. A member is one trial on one fold.

gputune computes a score on the device, or calls a scikit-learn scorer. The process waits for the
device once per epoch.

In shapes, C counts trials, F folds, M metrics, m validation rows of a fold, and K outputs per row.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.memory import free_of_gpu
from gputune.population.outputs import call_module, class_logits, is_one_logit, mean_outputs
from gputune.population.population import Ensemble, Network
from gputune.scoring import scores
from gputune.scoring.evaluation_draws import drawing_rows
from gputune.scoring.label_scores import average_precision
from gputune.scoring.objective import pairs_all_rows
from gputune.seeding import keyed_draws
from gputune.threads import SMALL_LOSS, on_one_thread
from gputune.types import EvaluationKey, Params, Task

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

        A scikit-learn scorer is no such function, because the scorer may ask a model to predict
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
            ranks = (
                self.score is None
                or self.score in scores.RANKING
                or self.score is average_precision
            )
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
        try:
            for trial in np.flatnonzero(finite.cpu().numpy()).tolist():
                others = None if member is None else partial(_predict, data, fold, member, trial)
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
    return outputs if data.present is None else outputs.masked_fill(~data.present[fold], -torch.inf)


def outputs_of(probabilities: Tensor, task: Task) -> Tensor:
    """Return outputs (logits) for which a model predicts the given probabilities (..., K)."""
    if task == "multilabel":
        return probabilities.logit(_SMALLEST)
    return probabilities.clamp_min(_SMALLEST).log()


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


# Limits of one layer's validation outputs. On a CPU a block stays in the cache of a core. On a GPU
# a small block would cost launches and do little work. At most 1/32 of the free memory is used,
# because the outputs of several layers exist at the same time.
_BLOCK_BYTES = 4 << 20
# A call on fewer than 64 rows costs more than its work, unless large frozen layers make the rows wide:
# 11 trials of a BERT's last layer take 20% less time in blocks of 8 texts than of 32.
_SHARED_BLOCK_BYTES = 8 << 20
_GPU_BLOCK_BYTES = 256 << 20
_GPU_SHARE = 32
_KEPT_NUMBERS = 1 << 25  # larger inputs are gathered again at every epoch instead of kept


class Validation:
    """Runs the members (one trial on one fold each) on their validation rows, and scores them.

    Validation rows that are small enough stay in memory for the next epoch.
    """

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data = data
        self.scoring = scoring
        self.block_bytes = _BLOCK_BYTES
        # A power of two, so that small changes of the free memory do not change the bits.
        if data.device.type == "cuda":
            share = max(_BLOCK_BYTES, free_of_gpu(data.device) // _GPU_SHARE)
            self.block_bytes = min(_GPU_BLOCK_BYTES, 1 << (share.bit_length() - 1))
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}
        self.outputs: Sequence[list[Tensor]] = []
        """The last scored outputs by epoch and fold, each (C, m, K). Empty lists if no outputs are
        stored."""

    def scores(
        self,
        network: Network,
        params: Params,
        trials: int,
        computed: Sequence[Tensor] | None = None,
        *,
        epoch: int = 0,
    ) -> np.ndarray:
        """Evaluate all members, and return their scores (C, F), or (C, F, M) for M metrics.

        Args:
            network: The network of the members.
            params: The parameters of the members.
            trials: The number of trials, C.
            computed: The outputs (C, m, K) of each fold if they are already computed. F counts the
                folds of the study: with replicas, the outputs of S * R folds become those of F = S.
            epoch: The number of epochs that the members have trained. This number seeds the random
                numbers that the modules draw.
        """
        assert self.scoring is not None
        columns = []
        kept = []
        block = self._block_rows(network, trials)
        for split in range(self.data.n_splits):
            folds = range(split, self.data.n_folds, self.data.n_splits)
            of_replicas = []
            for fold in folds:
                if computed is not None:
                    of_replicas.append(computed[fold])
                else:
                    of_replicas.append(self._outputs_of(network, params, fold, epoch, block))
            outputs = of_replicas[0]
            member: TrialModel = partial(network.member, params, split)
            if len(folds) > 1:
                outputs = self._mean(of_replicas, split)
                member = partial(_mean_member, network, params, folds, self.data.task)
            with on_one_thread(if_small=outputs.numel() <= SMALL_LOSS):
                columns.append(self.scoring.metrics(self.data, split, outputs, member))
            if self.scoring.kept_bytes:
                kept.append(outputs)
        self.outputs = [kept]
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _outputs_of(
        self, network: Network, params: Params, fold: int, epoch: int, block: int
    ) -> Tensor:
        """Return the outputs (C, m, K) on the validation rows of a fold, computed in blocks of
        ``block`` rows."""
        outputs = [
            self._outputs(network, params, part, (epoch, fold, number * block), block)
            for number, part in enumerate(self.blocks(fold, block))
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)

    def _mean(self, outputs: Sequence[Tensor], split: int) -> Tensor:
        """Return outputs for the mean prediction of the replicas, (C, m, K), from the outputs of
        each replica."""
        stacked = torch.stack(list(outputs))  # (R, C, m, K)
        if self.data.present is not None and not is_one_logit(stacked, self.data.task, 3):
            stacked = stacked.masked_fill(~self.data.present[split], -torch.inf)
        weights = torch.ones(len(stacked), dtype=torch.float64, device=stacked.device)
        weights /= len(stacked)
        return mean_outputs(stacked, weights, self.data.task, 3)

    def _outputs(
        self,
        network: Network,
        params: Params,
        part: Sequence[Tensor],
        key: EvaluationKey,
        block: int,
    ) -> Tensor:
        """Run the network on a block of a fold's validation rows, and return its outputs (C, m, K).

        A module that is known to write into its inputs receives copies of the rows. If a module
        writes into the rows for the first time, the method reads the rows again and calls the
        network a second time.
        """
        _, fold, start = key
        before = _versions(part)
        outputs = network.outputs(params, fold, part, key)
        if _versions(part) == before:
            return outputs
        self.kept.pop((self.data.split_of(fold), block), None)
        rows = self.data.folds[fold].valid[start : start + block]
        return network.outputs(params, fold, self.data.rows(fold, rows), key)

    def blocks(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold in blocks of at most ``rows`` rows."""
        fold = self.data.split_of(fold)  # replicas share their rows
        valid = self.data.folds[fold].valid
        parts = (self.data.rows(fold, part) for part in torch.split(valid, rows))
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]

    def _block_rows(self, network: Network, trials: int) -> int:
        """Return the number of validation rows that the network evaluates at a time.

        One layer's outputs of all trials then stay within ``block_bytes``, if the rows are narrow.
        """
        if not network.alone:
            return self.data.n_rows
        row_numbers = self.data.row_numbers
        shares_rows = network.traits is not None and network.traits.common_rows
        if shares_rows:
            row_numbers = -(-row_numbers // trials)  # one copy for all trials
        widest = max(row_numbers, network.widest)
        if network.evaluation_draws:
            return drawing_rows(widest)
        row_bytes = trials * widest * self.data.dtype.itemsize
        least = min(64, max(4, _SHARED_BLOCK_BYTES // row_bytes)) if shares_rows else 64
        return max(least, self.block_bytes // row_bytes)


def _mean_member(
    network: Network, params: Params, folds: Sequence[int], task: Task, trial: int
) -> nn.Module:
    """Return one trial's model that predicts the mean of its replicas, one on each of ``folds``."""
    members = [network.member(params, fold, trial) for fold in folds]
    return Ensemble(members, [1 / len(folds)] * len(folds), task)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return the version counters of tensors (0 without a counter), which reveal writes to them."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]
