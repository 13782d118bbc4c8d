"""The scores on the validation rows of all folds: of a chunk's members, and of the answer that needs no model.

The first wait for the device once an epoch, and the outputs that they are of may be kept, of each trial those of its
best epoch so far; the second is what any search has to beat.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gputune.data.dataset import Dataset
from gputune.memory import free_of_gpu
from gputune.population.population import Network
from gputune.scoring.outputs import Outputs
from gputune.scoring.scores import accuracy
from gputune.scoring.scoring import Scoring, outputs_of
from gputune.types import Params

_BLOCK_BYTES = 4 << 20  # of one layer's validation outputs: what stays in a core's cache
_GPU_BLOCK_BYTES = 256 << 20  # on a GPU, where a small block is launches and no work
_GPU_SHARE = 32  # that part of its free memory at most: several layers' outputs are there at once
_KEPT_NUMBERS = 1 << 25  # of all validation rows, from which they are gathered anew at every epoch


class Validation:
    """Scores members on the validation rows of their folds, which are kept as they are gathered where they are few."""

    def __init__(self, data: Dataset, scoring: Scoring | None) -> None:
        self.data, self.scoring = data, scoring
        self.block_bytes = _BLOCK_BYTES
        if data.device.type == "cuda":  # a power of two, so that bits do not follow free memory
            share = max(_BLOCK_BYTES, free_of_gpu(data.device) // _GPU_SHARE)
            self.block_bytes = min(_GPU_BLOCK_BYTES, 1 << (share.bit_length() - 1))
        self.kept: dict[tuple[int, int], tuple[tuple[Tensor, ...], ...]] = {}
        self.outputs: Sequence[list[Tensor]] = []
        """Of each epoch and fold (C, m, K), as they were last scored, where a scoring keeps them."""

    def is_small(self, network: Network) -> bool:
        """Whether one layer's outputs of one member on all validation rows of a fold stay within the block."""
        return max(len(fold.valid) for fold in self.data.folds) <= self._block_rows(network, 1)

    def scores(
        self, network: Network, params: Params, trials: int, computed: Sequence[Tensor] | None = None
    ) -> np.ndarray:
        """Return the scores (C, F), or (C, F, M), of all members, by outputs (C, m, K) of folds if ``computed``."""
        assert self.scoring is not None
        columns, kept = [], []
        block = self._block_rows(network, trials)
        for fold in range(self.data.n_folds):
            if computed is not None:
                outputs = computed[fold]
            else:
                blocks = [network.outputs(params, fold, part) for part in self._parts(fold, block)]
                outputs = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            columns.append(self.scoring.metrics(self.data, fold, outputs, partial(network.member, params, fold)))
            if self.scoring.kept_bytes:
                kept.append(outputs)
        self.outputs = [kept]
        return torch.stack(columns, 1).cpu().numpy()  # the only device sync of an epoch

    def _parts(self, fold: int, rows: int) -> Iterable[tuple[Tensor, ...]]:
        """Return the validation rows of a fold, so many at a time."""
        parts = (self.data.rows(fold, part) for part in torch.split(self.data.folds[fold].valid, rows))
        if self.data.n_rows * self.data.row_numbers > _KEPT_NUMBERS:
            return parts
        if (fold, rows) not in self.kept:
            self.kept[fold, rows] = tuple(parts)
        return self.kept[fold, rows]

    def _block_rows(self, network: Network, trials: int) -> int:
        """Return the rows to evaluate at a time, so that one layer's outputs of all trials stay within the block."""
        if not network.alone:
            return self.data.n_rows
        widest = max(self.data.row_numbers, network.widest)
        return max(64, self.block_bytes // (trials * widest * self.data.dtype.itemsize))


class BestOutputs:
    """The outputs of each trial of a chunk at its best epoch, of at most ``limit`` bytes: those of the best trials.

    ``means`` (C,) are the best fold means so far, of epochs whose outputs are not known; -inf where there are none.
    """

    def __init__(self, limit: int, means: NDArray[np.float64]) -> None:
        self.limit, self.means = limit, means
        self.epochs = np.zeros(len(means), dtype=np.int64)
        self.places: dict[int, int] = {}
        self.values: Tensor | None = None

    def take(self, epoch: int, trials: Sequence[int], means: NDArray[np.float64], outputs: Sequence[Tensor]) -> None:
        """Take the outputs (T, m, K) of each fold, of those ``trials`` whose fold means (T,) are better than before."""
        rows = np.flatnonzero(means > self.means[list(trials)])
        if not rows.size:
            return
        better = np.asarray(trials)[rows]
        self.means[better], self.epochs[better] = means[rows], epoch
        index = torch.from_numpy(rows).to(outputs[0].device)
        parts = [one.index_select(0, index).reshape(len(rows), one.shape[1], -1) for one in outputs]
        values = torch.cat(parts, 1).float()
        if self.values is None:
            most = min(len(self.means), self.limit // max(1, values[0].nbytes))
            self.values = values.new_empty(most, *values.shape[1:])
        most = len(self.values)
        best = set(np.argsort(-self.means, kind="stable")[:most].tolist())
        self.places = {trial: place for trial, place in self.places.items() if trial in best}
        free = iter(sorted(set(range(most)) - set(self.places.values())))
        kept = [row for row, trial in enumerate(better.tolist()) if trial in best]
        for trial in better[kept].tolist():
            if trial not in self.places:
                self.places[trial] = next(free)
        self.values[[self.places[trial] for trial in better[kept].tolist()]] = values[kept]

    def of_trials(self, index: Sequence[int]) -> dict[int, Outputs]:
        """Return what is kept, each trial by its entry of ``index`` (C,)."""
        if self.values is None:
            return {}
        values = self.values.cpu().numpy()
        return {index[c]: Outputs(int(self.epochs[c]), values[place].copy()) for c, place in self.places.items()}


_LOPSIDED = 0.8  # share of one class from which on an accuracy says little


def baseline(data: Dataset, scoring: Scoring, classes: np.ndarray | None) -> Mapping[str, str | float] | None:
    """Return the ``answer`` in words and its mean ``score`` over the folds; None for a scorer of the user's own.

    The answer is the share of each class, or the mean of the target, among the training rows of a fold; an accuracy
    sees of it the most frequent class alone. For a score of one class it is one class for all rows where that scores
    more. ``classes`` are the labels.
    """
    if ":" in scoring.name or scoring.of_outputs is not None:
        return None
    answer, score = _words(data, scoring, classes), _mean_score(data, scoring)
    if scoring.positive is not None and classes is not None:
        # The best f1 without a model is that of the positive class for all rows.
        labels = classes.tolist()
        of_class = {f"always {label!r}": _mean_score(data, scoring, code) for code, label in enumerate(labels)}
        best = max(of_class, key=of_class.__getitem__)
        if of_class[best] >= score and len({*of_class.values()}) > 1:  # a score of ranks is the same for each
            answer, score = best, of_class[best]
    return {"answer": answer, "score": score} if math.isfinite(score) else None


def _mean_score(data: Dataset, scoring: Scoring, always: int | None = None) -> float:
    """Return the mean score over the folds of one answer for all rows; ``always`` is the code of a class."""
    scores = []
    # The answer is in the target's own units.
    data = replace(data, center=torch.zeros_like(data.center), scale=torch.ones_like(data.scale), transforms=())
    for f, fold in enumerate(data.folds):
        target = data.target[fold.train]
        if data.task == "regression":
            answer = target.view(len(target), -1).mean(0)
        elif data.task == "multilabel":
            answer = outputs_of(target.double().mean(0), data.task)
        else:
            counts = torch.bincount(target, minlength=max(2, data.n_outputs))
            share = counts.double() / len(target)
            if always is not None:
                share = torch.zeros_like(share).index_fill_(0, torch.tensor(always, device=share.device), 1.0)
            answer = outputs_of(share, data.task)
        with warnings.catch_warnings(action="ignore"):  # of scores that one answer for all rows leaves undefined
            scores.append(scoring(data, f, answer.expand(1, len(fold.valid), -1))[0])
    return float(torch.stack(scores).mean())


def _words(data: Dataset, scoring: Scoring, classes: np.ndarray | None) -> str:
    if data.task == "regression":
        return "the mean of the training rows"
    if classes is None or data.task == "multilabel" or scoring.score is not accuracy:
        return "the share of each class in the training rows"
    most = {int(torch.bincount(data.target[fold.train]).argmax()) for fold in data.folds}
    if len(most) > 1:  # folds whose classes have other shares, and near balance
        return "the most frequent class of the training rows"
    return f"always {classes[most.pop()].item()!r}"


def remark_on_accuracy(baseline: Mapping[str, str | float] | None, scoring: Scoring) -> tuple[str, ...]:
    """Return what to know of an accuracy that one class makes high."""
    if baseline is None or scoring.score is not accuracy or float(baseline["score"]) < _LOPSIDED:
        return ()
    if not str(baseline["answer"]).startswith("always"):  # of labels each has its own
        return ()
    two = scoring.classes is not None and len(scoring.classes) == 2
    others = "balanced_accuracy, roc_auc, average_precision" if two else "balanced_accuracy, f1_macro, roc_auc_ovr"
    return (
        f"{baseline['answer']} has an accuracy of {baseline['score']:.4f} already: {others} or neg_log_loss as scoring "
        "tell more",
    )
