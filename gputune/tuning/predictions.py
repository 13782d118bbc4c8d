"""Predictions of trials for the validation rows of their folds.

The study has stored them, or the members train again.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.folds import unpack_folds
from gputune.population.population import call_module, class_logits, first_output
from gputune.scoring.evaluation_draws import EvaluationDraws
from gputune.scoring.losses import best_temperature
from gputune.scoring.metrics import make_scoring, scorers_of
from gputune.scoring.scores import neg_cross_entropy
from gputune.scoring.scoring import Scoring, outputs_of
from gputune.study.model import TunedModel
from gputune.study.store import Store
from gputune.study.study import Trial
from gputune.text import count
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Search
from gputune.types import Outputs

# The number of rows that are evaluated at a time, and of residuals that a model keeps.
_BLOCK = 2**13
_RESIDUALS = 10_000
_LEAST = torch.finfo(torch.float64).tiny  # replaces probabilities of 0, which have no logarithm


def predictions_of(search: Search, trials: Sequence[Trial], progress: Progress) -> "Predictions":
    """Return the predictions of trials on the folds of the search.

    Stored predictions are used. The other trials train again on their folds.
    """
    kept = _kept_outputs(search, trials)
    lacking = [trial for trial in trials if trial.number not in kept]
    values: dict[int, Sequence[Tensor]] = {}  # of each trial by fold
    if lacking:
        told = "the search was told to keep no predictions"
        why = "no predictions of them were kept" if search.options.keep_predictions else told
        progress.say(f"{count(len(lacking), 'trial')} train on their folds once more: {why}")
        members, data, scoring = members_of(search, lacking, progress)
        for trial, folds in zip(lacking, members):
            # Each trial may prepare the numbers of a table in its own way.
            own = data.of(search.config(trial))
            draws = search.evaluation_draws(own, trial)
            values[trial.number] = [
                _predict(module, own, f, draws) for f, module in enumerate(folds)
            ]
        data = data.of(search.config(lacking[0]))
    else:
        data, scoring = _folds(search, trials)
    lengths = [len(fold.valid) for fold in data.folds]
    for number, one in kept.items():
        parts = torch.split(torch.tensor(one.values, device=data.device), lengths)
        values[number] = [_values(part.double(), data) for part in parts]
    stacked = [
        torch.stack([values[trial.number][f] for trial in trials]) for f in range(data.n_folds)
    ]
    return Predictions(stacked, data, scoring)


def _kept_outputs(search: Search, trials: Sequence[Trial]) -> dict[int, Outputs]:
    """Return the stored outputs of trials by number.

    Returns an empty dict if the current rows differ from the rows of the search.
    """
    study = search.study
    epochs = {trial.number: trial.best_epoch for trial in trials}
    if search.rows != study.record.fingerprint:
        return {}
    known: Mapping[int, Outputs] = {}
    if study.file is None and study.data is not None:
        known = study.data.outputs
    elif study.file is not None and study.file.exists():
        with Store.open(study.file) as store:
            known = store.outputs(epochs.keys())
    return {number: one for number, one in known.items() if epochs.get(number) == one.epoch}


def _folds(search: Search, trials: Sequence[Trial]) -> tuple[Dataset, Scoring]:
    """Return the data of the search's folds for some trials, and the scoring that ranks them."""
    record = search.study.record
    target = search.problem.target
    asked = search.options.scoring
    data = search.dataset(unpack_folds(record.arguments.folds), trials)
    positive = record.ranked_class if asked is None else record.positive
    if (scorers := scorers_of(asked)) is not None and record.metrics:
        asked = {one["name"]: scorers[one["name"]] for one in record.metrics}
    scoring = record.scoring if asked is None else asked
    return data, make_scoring(
        scoring, target.task, target.classes, positive, search.objective, target.n_outputs
    )


def members_of(
    search: Search, trials: Sequence[Trial], progress: Progress
) -> tuple[list[list[nn.Module]], Dataset, Scoring]:
    """Train trials again on the folds of the search.

    Returns the members (M, F), their data and the scoring.
    """
    data, scoring = _folds(search, trials)
    progress.scoring = scoring.name
    epochs = max(trial.best_epoch for trial in trials)
    with nullcontext() if search.choice.solved else progress.bar_over(len(trials), epochs):
        return search.train(data, trials, progress=progress.advance), data, scoring


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of M candidates for the validation rows of each fold.

    ``values[f]`` (M, m_f, K), float64, holds probabilities, or outputs for a regression. A mean
    over candidates is taken in the same way for both.
    """

    values: Sequence[Tensor]
    data: Dataset
    scoring: Scoring

    def complete(self, model: TunedModel, weights: Tensor, *, calibrated: bool) -> TunedModel:
        """Return a model with its residuals and its temperature.

        The model is the mean of the candidates, weighted by ``weights`` (M,).
        """
        # For each fold: (M, 1, 1) * (M, m, K) -> sum over M -> (m, K)
        means = [(weights[:, None, None].to(value) * value).sum(0) for value in self.values]
        temperature = self._temperature(means) if calibrated else 1.0
        return replace(model, residuals=self._residuals(means), temperature=temperature)

    def _residuals(self, means: Sequence[Tensor]) -> NDArray[np.float64] | None:
        """Return the absolute errors of the means on validation rows, in ascending order.

        The errors are on the scale of a transformed target. For a row of several folds, the error
        is the mean over these folds. At most ``_RESIDUALS`` errors are returned, spread evenly by
        rank. None for classes and for several numbers per row.
        """
        data = self.data
        if data.task != "regression" or self.values[0].shape[-1] > 1:
            return None
        errors = []
        target = data.target.view(data.n_rows, -1).cpu()
        for f, mean in enumerate(means):
            rows = target[data.folds[f].valid.cpu()]
            there = data.transforms[f].forward(rows.numpy()) if data.transforms else rows
            errors.append(
                ((mean * data.scale[f] + data.center[f]).cpu() - torch.as_tensor(there)).abs()
            )
        of_rows = means_of_rows(data, errors)[:, 0]
        ascending: NDArray[np.float64] = np.sort(of_rows[np.isfinite(of_rows)])
        many = min(len(ascending), _RESIDUALS)
        # Evenly spaced ranks, including the largest error.
        kept: NDArray[np.float64] = ascending[
            np.ceil(np.arange(1, many + 1) * len(ascending) / many).astype(int) - 1
        ]
        return kept

    def _temperature(self, means: Sequence[Tensor]) -> float:
        """Return the temperature that calibrates the means on validation rows.

        Rows of a class that is missing in their fold's training rows do not count. Without other
        rows the temperature is 1.
        """
        logits = []
        targets = []
        for f, (fold, mean) in enumerate(zip(self.data.folds, means)):
            target = self.data.target[fold.valid]
            known = (
                slice(None)
                if self.data.present is None
                else self.data.present[f][target].to(mean.device)
            )
            logits.append(mean[known].clamp(min=_LEAST).log())
            targets.append(target[known])
        return best_temperature(torch.cat(logits), torch.cat(targets))

    def choose(self, size: int, folds: Sequence[int] | None = None) -> Counter[int]:
        """Return the number of times that each candidate is chosen, in at most ``size`` greedy
        steps.

        Each step adds the candidate that gives the best mean score over the folds. If scores are
        equal, the best log loss decides, because an accuracy has few different values. The number
        of steps with the best mean score counts.
        """
        folds = range(self.data.n_folds) if folds is None else folds
        sums = {fold: torch.zeros_like(self.values[fold][0]) for fold in folds}
        chosen: list[int] = []
        keys: list[tuple[float, float]] = []
        for step in range(1, size + 1):
            # (m, K) + (M, m, K) -> (M, m, K): the mean if each candidate were chosen next. The
            # scores of F folds, (F, 2, M), become M pairs of mean score and minus mean log loss.
            scores = [self.scores(fold, (sums[fold] + self.values[fold]) / step) for fold in folds]
            means = [
                tuple(pair)
                for pair in np.nan_to_num(np.mean(scores, axis=0), nan=-np.inf).T.tolist()
            ]
            chosen.append(max(range(len(means)), key=means.__getitem__))
            keys.append(means[chosen[-1]])
            for fold in folds:
                sums[fold] += self.values[fold][chosen[-1]]
        # index() returns the first maximum, which is the smallest ensemble with the best score.
        return Counter(chosen[: keys.index(max(keys)) + 1])

    def nested_scores(self, size: int) -> list[float]:
        """Return the score of each fold (F,), with candidates chosen on the other folds only.

        With one fold, return two scores. The rows of the fold are split into every second row and
        the rest. Each half is scored with candidates chosen on the other half.
        """
        if self.data.n_folds > 1:
            every = range(self.data.n_folds)
            return [
                self._score_of(self.choose(size, [f for f in every if f != fold]), fold)
                for fold in every
            ]
        (fold,), (values,), halves = self.data.folds, self.values, []
        for start in (0, 1):
            part = replace(self.data, folds=(replace(fold, valid=fold.valid[start::2]),))
            halves.append(replace(self, values=[values[:, start::2]], data=part))
        return [half._score_of(other.choose(size), 0) for half, other in (halves, halves[::-1])]

    def _score_of(self, choice: Counter[int], fold: int) -> float:
        """Return the score of chosen candidates on one fold."""
        weights = torch.tensor([number / choice.total() for number in choice.values()])
        mean = torch.tensordot(weights.to(self.values[fold]), self.values[fold][list(choice)], 1)
        return float(self.scores(fold, mean[None])[0][0])

    def scores(self, fold: int, values: Tensor) -> np.ndarray:
        """Return the scores (2, M) of predictions (M, m, K) on one fold.

        The second row is minus the log loss for classes. Otherwise it repeats the score.
        """
        task = self.data.task
        outputs = values if task == "regression" else outputs_of(values, task)
        score = self.scoring(self.data, fold, outputs)
        target = self.data.target[self.data.folds[fold].valid]
        second = neg_cross_entropy(outputs, target) if task in ("binary", "multiclass") else score
        return torch.stack([score, second.to(score)]).cpu().numpy()


def means_of_rows(data: Dataset, values: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the mean over the folds of values (m_f, K) of their validation rows, (n, K).

    A row that no fold validates on is NaN.
    """
    sums = torch.zeros(data.n_rows, values[0].shape[1], dtype=torch.float64)
    counts = torch.zeros(data.n_rows)
    for fold, value in zip(data.folds, values, strict=True):
        rows = fold.valid.cpu()
        sums.index_add_(0, rows, value)
        counts.index_add_(0, rows, torch.ones(len(rows)))
    means: NDArray[np.float64] = (sums / counts[:, None]).numpy()
    return means


def _predict(module: nn.Module, data: Dataset, fold: int, draws: EvaluationDraws | None) -> Tensor:
    """Return the predictions of a member for the validation rows of its fold, (m, K) float64."""
    size = _BLOCK if draws is None else draws.rows
    found = []
    for number, rows in enumerate(torch.split(data.folds[fold].valid, size)):
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        with nullcontext() if draws is None else draws.seeded(fold, number * size):
            found.append(values_of(module, inputs, data))
    return torch.cat(found)


def values_of(module: nn.Module, inputs: Sequence[Tensor], data: Dataset) -> Tensor:
    """Return the predictions of a member for rows on the CPU, (m, K) float64.

    They are probabilities, or outputs for a regression.
    """
    with torch.no_grad():  # TorchScript fails on tensors of inference_mode
        output = first_output(call_module(module, inputs, data.names))
        return _values(output.double().view(len(inputs[0]), -1).to(data.device), data)


def _values(outputs: Tensor, data: Dataset) -> Tensor:
    """Return outputs (m, K) as probabilities, or unchanged for a regression."""
    if data.task == "regression":
        return outputs
    return (
        outputs.sigmoid()
        if data.task == "multilabel"
        else class_logits(outputs, data.task, 1).softmax(-1)
    )
