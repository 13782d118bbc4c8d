"""How members are scored on the validation rows of all folds: by scores on the device, or by
scorers of scikit-learn's.

All wait for the device once an epoch, and the outputs that the scores are of may be kept, of each
trial those of its best epoch so far.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import SupportsFloat

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.errors import InputError
from gputune.memory import free_of_gpu
from gputune.population.population import Network, call_module, class_logits, is_one_logit
from gputune.scoring import scores
from gputune.scoring.label_scores import average_precision
from gputune.scoring.objective import pairs_all_rows
from gputune.seeding import keyed_draws
from gputune.types import Outputs, Params, Task

Scorer = Callable[..., SupportsFloat]
"""Of (estimator, X, y), greater is better."""
Member = Callable[[int], nn.Module]
"""Returns the model of one trial, by its place among the outputs: a plain module on the CPU, in
evaluation mode."""

_SMALLEST = 1e-300
"""Probability in place of 0, whose logarithm would be taken for a divergence."""


@dataclass(frozen=True)
class Scoring:
    """How the models of one fold are scored: ``name``, and a device score or a scikit-learn scorer.

    ``others`` are the further metrics of a search, which rank nothing; ``label`` is what the user
    calls one of them.
    ``classes`` are the labels that a scorer sees, None for regression. One of scikit-learn's names
    sees class codes 0, 1, ..., so that scores of a positive class work on text labels. ``positive``
    is the code of that class; None where the score is not of one class, and where a callable
    chooses it. ``of_outputs`` scores the outputs of one member as they are; where it ``is_loss``,
    in the units of training. With ``kept_bytes`` outputs are kept beside their scores, up to that.
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
        """Whether all metrics are functions of outputs; scikit-learn's scorers may ask a model for
        others."""
        return all(one.score or one.of_outputs for one in (self, *self.others))

    def metrics(
        self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None
    ) -> Tensor:
        """Return the scores (C,) as a call does, with other metrics (C, M), all of the same
        outputs."""
        scores = [one(data, fold, outputs, member) for one in (self, *self.others)]
        return torch.stack(scores, 1) if self.others else scores[0]

    def __call__(
        self, data: Dataset, fold: int, outputs: Tensor, member: Member | None = None
    ) -> Tensor:
        """Return the scores (C,), float64, of outputs (C, m, K) on fold's validation rows; NaN
        where diverged.

        They are scored in double precision, in which a tuned model predicts. A scorer of the user's
        own may ask for predictions of other rows, which a ``member`` then makes.
        """
        known = outputs
        if data.present is not None and not is_one_logit(outputs, data.task, 2):
            # A class that takes no part may have the logit -inf; that is no divergence.
            known = outputs.masked_fill(~data.present[fold], 0)
        finite = known.isfinite().flatten(1).all(-1)
        target = data.target[data.folds[fold].valid]
        if self.of_outputs is not None:
            result = self._of_outputs(data, fold, outputs, target, finite)
        else:
            outputs = _as_answers(data, fold, outputs)
            if data.transforms:  # an inverse may overflow
                finite &= outputs.isfinite().flatten(1).all(-1)
            ranks = (
                self.score is None
                or self.score in scores.RANKING
                or self.score is average_precision
            )
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
        """Return the score of outputs (m, K) on rows with a target (m, ...), without a dataset.

        Outputs are logits, or numbers in the target's own units. Scikit-learn's ValueError goes
        through.
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
            y = self.classes[y]  # a scorer of the user's own sees labels
        X = np.zeros((len(y), 1))  # scorers read nothing of the rows
        return float(self.scorer(fitted(outputs.cpu().clone(), self.classes, X, X), X, y))

    def _of_outputs(
        self, data: Dataset, fold: int, outputs: Tensor, target: Tensor, finite: Tensor
    ) -> Tensor:
        assert self.of_outputs is not None
        if self.is_loss:
            target = data.targets(fold)[data.folds[fold].valid]
        elif is_one_logit(outputs, data.task, 2):
            outputs = outputs.double().view(*outputs.shape[:2], 1)
        else:
            outputs = _as_answers(data, fold, outputs).view(outputs.shape)
            target = target[:, None] if data.column else target
        trials = finite.nonzero().flatten().tolist()
        if (
            trials
            and not self.is_loss
            and pairs_all_rows(self.of_outputs, outputs[trials[0]], target)
        ):
            raise InputError(
                f"scoring={self.name!r} compares each output with the targets of all rows: "
                f"outputs have shape {tuple(outputs[0].shape)} and y {tuple(target.shape)}, which "
                "torch broadcasts; take outputs[:, 0]."
            )
        result = torch.full((len(outputs),), torch.nan, dtype=torch.float64)
        for trial in trials:
            try:
                # Copies: other metrics, other trials and an ensemble read them too.
                result[trial] = float(self.of_outputs(outputs[trial].clone(), target.clone()))
            except Exception as error:
                raise InputError(
                    f"scoring={self.name!r} raised {type(error).__name__} on fold {fold}: "
                    f"{error}. It is called as scoring(outputs, y), with tensors "
                    f"{tuple(outputs[trial].shape)} and {tuple(target.shape)}, and returns a "
                    "number, greater is better."
                ) from error
        return result.to(finite.device)

    def positive_last(self, outputs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs (..., 2) and class codes (m,) in which a scorer finds the positive class:
        as code 1."""
        return (outputs.flip(-1), 1 - target) if self.positive == 0 else (outputs, target)

    def _through_sklearn(
        self,
        data: Dataset,
        fold: int,
        outputs: Tensor,
        target: Tensor,
        finite: Tensor,
        member: Member | None,
    ) -> Tensor:
        from gputune.scoring.estimators import fitted

        assert self.scorer is not None
        y = target.cpu().numpy()
        y = y if self.classes is None or data.task == "multilabel" else self.classes[y]
        # The scorers that have names read nothing of the rows.
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
                    # Gathered for each trial: a scorer may write into them.
                    rows = (
                        rows
                        if data.scorer_rows is None
                        else data.scorer_rows.rows(data.folds[fold])
                    )
                # A frame can be written to.
                X = rows if isinstance(rows, np.ndarray | tuple | dict) else copy.deepcopy(rows)
                # Copies: a scorer of the user's own may write into what it gets.
                estimator = fitted(outputs[trial].cpu().clone(), self.classes, X, rows, others)
                result[trial] = float(self.scorer(estimator, X, y.copy()))
                estimator.close()
        except Exception as error:
            remedy = "Choose a scoring that fits the task, for example accuracy or r2."
            if ":" in self.name:  # no name of scikit-learn's
                remedy = "It is called as scorer(estimator, X, y), with X as you gave it."
            reason = f"{type(error).__name__} on fold {fold}: {str(error).rstrip('.')}"
            raise InputError(f"scoring={self.name!r} raised {reason}. {remedy}") from error
        return torch.from_numpy(result).to(outputs.device)


def shape_of_scores(scoring: Scoring | None, folds: int) -> tuple[int, ...]:
    """Return the shape of a trial's scores after an epoch: (F,), with several metrics (F, M)."""
    return (folds,) if scoring is None or not scoring.others else (folds, 1 + len(scoring.others))


def _as_answers(data: Dataset, fold: int, outputs: Tensor) -> Tensor:
    """Return outputs (C, m, K), float64: in the target's own units, or without the classes that
    take no part."""
    outputs = outputs.double()
    if is_one_logit(outputs, data.task, 2):
        return class_logits(outputs, data.task, 2)
    if outputs.dim() == 2 and data.task != "custom":
        outputs = outputs[..., None]  # one number a row
    if data.task == "regression":
        return data.in_units(fold, outputs)
    return outputs if data.present is None else outputs.masked_fill(~data.present[fold], -torch.inf)


def outputs_of(probabilities: Tensor, task: Task) -> Tensor:
    """Return the outputs of which classes (..., K), or labels (..., K), have these
    probabilities."""
    return (
        probabilities.logit(_SMALLEST)
        if task == "multilabel"
        else probabilities.clamp_min(_SMALLEST).log()
    )


def _predict(data: Dataset, fold: int, member: Member, trial: int, X: object) -> Tensor:
    """Return what a member answers for rows X of the user's own, (m, K), on the CPU."""
    if data.scorer_rows is None:
        raise InputError("a scorer that has a name asks for no other rows than those it scores.")
    inputs = data.scorer_rows.encoded(X, data.statistics[fold], data.dtype)
    with torch.no_grad(), keyed_draws(torch.device("cpu"), 0, "scorer", fold, host=True):
        # Copies: without a scaling they are the rows of the user's own.
        own = [x.clone() for x in inputs]
        outputs = call_module(member(trial), own, data.names).view(1, len(inputs[0]), -1)
    return _as_answers(data, fold, outputs.to(data.device))[0].cpu()


_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache
_GPU_BLOCK_BYTES = 256 << 20  # on a GPU, where a small block is launches and no work
_GPU_SHARE = 32  # that part of its free memory at most: several layers' outputs are there at once
_KEPT_NUMBERS = 1 << 25  # of all validation rows, from which they are gathered anew at every epoch


def drawing_rows(widest: int) -> int:
    """Return the rows to evaluate at a time if a forward draws random numbers, for ``widest``
    numbers of a row.

    Each block has draws of its own, so its size must not depend on the number of trials in a chunk
    or on the device.
    """
    return max(64, min(256, (1 << 18) // widest))


@dataclass(frozen=True)
class EvaluationDraws:
    """The random numbers that plain modules draw on the CPU, as members did when they were scored
    in their search.

    Attributes:
        seed: The seed of the search.
        epoch: The number of epochs that the members have trained.
        rows: The number of rows that are evaluated at a time.
        host: Whether they draw from the generators of Python and NumPy as well.
    """

    seed: int
    epoch: int
    rows: int
    host: bool

    def seeded(self, fold: int, start: int) -> AbstractContextManager[None]:
        """Let a block of rows, which begins at a place among the validation rows of a fold, have
        its draws inside."""
        key = self.epoch, fold, start
        return keyed_draws(torch.device("cpu"), self.seed, "evaluation", *key, host=self.host)


class Validation:
    """Scores members on the validation rows of their folds, which are kept as they are gathered
    where they are few."""

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data = data
        self.scoring = scoring
        self.block_bytes = _BLOCK_BYTES
        if data.device.type == "cuda":  # a power of two, so that bits do not follow free memory
            share = max(_BLOCK_BYTES, free_of_gpu(data.device) // _GPU_SHARE)
            self.block_bytes = min(_GPU_BLOCK_BYTES, 1 << (share.bit_length() - 1))
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}
        self.outputs: Sequence[list[Tensor]] = []
        """Of each epoch and fold (C, m, K), as they were last scored, where a scoring keeps
        them."""

    def is_small(self, network: Network) -> bool:
        """Whether one layer's outputs of one member on all validation rows of a fold stay within
        the block."""
        return max(len(fold.valid) for fold in self.data.folds) <= self._block_rows(network, 1)

    def scores(
        self,
        network: Network,
        params: Params,
        trials: int,
        computed: Sequence[Tensor] | None = None,
        *,
        epoch: int = 0,
    ) -> np.ndarray:
        """Return the scores (C, F), or (C, F, M), of all members, by outputs (C, m, K) of folds if
        ``computed``.

        ``epoch``, the number of epochs that they have trained, seeds their draws."""
        assert self.scoring is not None
        columns = []
        kept = []
        block = self._block_rows(network, trials)
        for fold in range(self.data.n_folds):
            if computed is not None:
                outputs = computed[fold]
            else:
                blocks = [
                    network.outputs(params, fold, part, (epoch, fold, number * block))
                    for number, part in enumerate(self._parts(fold, block))
                ]
                outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            columns.append(
                self.scoring.metrics(
                    self.data, fold, outputs, partial(network.member, params, fold)
                )
            )
            if self.scoring.kept_bytes:
                kept.append(outputs)
        self.outputs = [kept]
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _parts(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold, so many at a time."""
        parts = (
            self.data.rows(fold, part) for part in torch.split(self.data.folds[fold].valid, rows)
        )
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]

    def _block_rows(self, network: Network, trials: int) -> int:
        """Return the rows to evaluate at a time, so that one layer's outputs of all trials stay
        within the block."""
        if not network.alone:
            return self.data.n_rows
        widest = max(self.data.row_numbers, network.widest)
        if network.evaluation_draws:
            return drawing_rows(widest)
        return max(64, self.block_bytes // (trials * widest * self.data.dtype.itemsize))


class BestOutputs:
    """The outputs of each trial of a chunk at its best epoch, of at most ``limit`` bytes: those of
    the best trials.

    ``means`` (C,) are the best fold means so far, of epochs whose outputs are not known; -inf where
    there are none.
    """

    def __init__(self, limit: int, means: NDArray[np.float64]) -> None:
        self.limit = limit
        self.means = means
        self.epochs = np.zeros(len(means), dtype=np.int64)
        self.places: dict[int, int] = {}
        self.values: Tensor | None = None

    def take(
        self,
        epoch: int,
        trials: Sequence[int],
        means: NDArray[np.float64],
        outputs: Sequence[Tensor],
    ) -> None:
        """Take the outputs (T, m, K) of each fold, of those ``trials`` whose fold means (T,) are
        better than before."""
        rows = np.flatnonzero(means > self.means[list(trials)])
        if not rows.size:
            return
        better = np.asarray(trials)[rows]
        self.means[better] = means[rows]
        self.epochs[better] = epoch
        index = torch.from_numpy(rows).to(outputs[0].device)
        parts = [one.index_select(0, index).reshape(len(rows), one.shape[1], -1) for one in outputs]
        values = torch.cat(parts, 1).float()
        if self.values is None:
            most = min(len(self.means), self.limit // max(1, values[0].nbytes))
            self.values = values.new_empty(most, *values.shape[1:])
        most = len(self.values)
        best = set(np.argsort(-self.means, kind="stable")[:most].tolist())
        self.places = {trial: place for trial, place in self.places.items() if trial in best}
        free = sorted(set(range(most)) - set(self.places.values()))
        kept = [row for row, trial in enumerate(better.tolist()) if trial in best]
        self.places |= zip(
            [trial for trial in better[kept].tolist() if trial not in self.places], free
        )
        self.values[[self.places[trial] for trial in better[kept].tolist()]] = values[kept]

    def of_trials(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return what is kept, each trial by its entry of ``index`` (C,)."""
        if self.values is None:
            return {}
        values = self.values.cpu().numpy()
        return {
            index[c]: Outputs(int(self.epochs[c]), values[place].copy())
            for c, place in self.places.items()
        }
