"""Predictions of trials for the validation rows of their folds.

If the study has not stored the predictions, the members (one trial on one fold each) train again.
Shapes: M candidates, F folds, K outputs, n rows, m validation rows of a fold.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.model_selection import GroupKFold
from torch import Tensor, nn

from gputune.data.dataset import Dataset
from gputune.data.folds import unpack_folds
from gputune.ground.annotations import FloatArray
from gputune.ground.errors import InputError, option
from gputune.ground.text import count
from gputune.ground.types import Outputs
from gputune.population.outputs import (
    call_module,
    class_logits,
    first_output,
    is_one_logit,
    mean_outputs,
)
from gputune.population.population import Ensemble
from gputune.scoring.losses import best_temperature
from gputune.scoring.metrics import make_scoring, scorers_of
from gputune.scoring.scores import neg_cross_entropy
from gputune.scoring.scoring import Scoring, outputs_of, without_absent
from gputune.scoring.validation import EvaluationDraws
from gputune.study.model import TunedModel
from gputune.study.store import Store
from gputune.study.study import Study, Trial
from gputune.tuning.progress import Progress
from gputune.tuning.record import lacks_scorer
from gputune.tuning.refit import ReopenedSearch

# The number of rows that are evaluated at a time, and of residuals that a model keeps.
_BLOCK = 2**13
_RESIDUALS = 10_000
_LEAST = torch.finfo(torch.float64).tiny  # replaces probabilities of 0, which have no logarithm


def predictions_of(
    search: ReopenedSearch, trials: Sequence[Trial], progress: Progress
) -> "Predictions":
    """Return the predictions of trials for the validation rows of the search's folds.

    The study has stored the predictions of some trials. The other trials train again on their
    folds.
    """
    stored = _stored_outputs(search, trials)
    missing = [trial for trial in trials if trial.number not in stored]
    values: dict[int, Sequence[Tensor]] = {}  # of each trial by fold
    if missing:
        reason = f"the search had {option('keep_predictions', False)}"
        if search.options.machine.keep_predictions:
            reason = "the study has not stored their predictions"
        progress.say(f"{count(len(missing), 'trial')} train on their folds once more: {reason}")
        members, data, scoring = members_of(search, missing, progress)
        for trial, modules in zip(missing, members):
            # Each trial may prepare the numbers of a table in its own way.
            inputs = data.of(search.config(trial))
            draws = search.evaluation_draws(inputs, trial)
            values[trial.number] = [
                _predict(module, inputs, f, draws) for f, module in enumerate(modules)
            ]
        data = data.of(search.config(missing[0]))
    else:
        data, scoring = _folds(search, trials)
    lengths = [len(fold.valid) for fold in data.folds]
    for number, outputs in stored.items():
        of_all_folds = torch.tensor(outputs.values, device=data.device)
        if is_one_logit(of_all_folds, data.task, 1):
            data = data.with_one_logit()
        parts = torch.split(of_all_folds, lengths)
        values[number] = [_values(part.double(), data, f) for f, part in enumerate(parts)]
    # M tensors (m_f, K) -> (M, m_f, K) for each fold
    stacked = []
    for f in range(data.n_folds):
        stacked.append(torch.stack([values[trial.number][f] for trial in trials]))
    return Predictions(stacked, data, scoring)


def _stored_outputs(search: ReopenedSearch, trials: Sequence[Trial]) -> dict[int, Outputs]:
    """Return the stored outputs of trials on their validation rows, by trial number.

    The dict is empty if the user's rows differ from the rows of the search.
    """
    study = search.study
    if search.rows != study.record.fingerprint:
        return {}
    epochs = {trial.number: trial.best_epoch for trial in trials}
    stored: Mapping[int, Outputs] = {}
    if study.file is None and study.data is not None:
        stored = study.data.outputs
    elif study.file is not None and study.file.exists():
        with Store.open(study.file) as store:
            stored = store.outputs(epochs.keys())
    return {
        number: stored[number] for number in stored if epochs.get(number) == stored[number].epoch
    }


def _folds(search: ReopenedSearch, trials: Sequence[Trial]) -> tuple[Dataset, Scoring]:
    """Return the data of the search's folds, and the scoring that ranks the trials."""
    record = search.study.record
    target = search.problem.target
    scoring = search.options.search.scoring
    data = search.dataset(unpack_folds(record.arguments.folds), trials)
    data = search.problem.with_scorer_rows(data)
    positive = record.positive
    scorers = scorers_of(scoring)
    if scoring is None:
        if lacks_scorer(record):
            raise _lost_scorer(search.study)
        scoring = record.scoring
        positive = record.ranked_class
    elif scorers is not None and record.metrics:
        # The study has the scorers in the order of their ranks.
        names = [metric["name"] for metric in record.metrics]
        scoring = {name: scorers[name] for name in names}
    return data, make_scoring(
        scoring, target.task, target.classes, positive, search.objective, target.n_outputs
    )


def _lost_scorer(study: Study) -> InputError:
    """Return the error for a study of a custom scorer that was opened from its file."""
    call = f"gputune.tune(..., scoring=..., study={str(study.file)!r})"
    return InputError(
        None,
        f"The trials were ranked by your own function {study.record.scoring!r}, and a study file "
        "does not hold functions",
        remedy=f"Repeat the call that made the study, {call}. It trains no finished trial again. "
        "Call this method on the study that it returns.",
    )


def members_of(
    search: ReopenedSearch, trials: Sequence[Trial], progress: Progress
) -> tuple[list[list[nn.Module]], Dataset, Scoring]:
    """Train trials of a study again on the folds of its search.

    Returns a list for each trial with one trained module per fold, the data with the folds, and the
    scoring of the search.
    """
    data, scoring = _folds(search, trials)
    progress.scoring = scoring.name
    epochs = max(trial.best_epoch for trial in trials)
    with nullcontext() if search.choice.solved else progress.bar_over(len(trials), epochs):
        members = search.train(data, trials, progress=progress.advance)
    objective = search.problem.objective
    # A custom loss or training step leaves the number of logits to the module.
    if objective is not None and objective.may_be_one_logit:
        rows = data.of(search.config(trials[0])).rows(0, data.folds[0].valid[:2])
        outputs = _outputs(members[0][0], [x.cpu() for x in rows], data, 0)
        if is_one_logit(outputs, data.task, 1):
            data = data.with_one_logit()
    return members, data, scoring


@dataclass(frozen=True, eq=False)
class Predictions:
    """The predictions of M candidate trials for the validation rows of each fold.

    ``values[f]``, float64, holds the probabilities of classes, or the outputs for a regression. It
    is (M, m_f, K): m_f validation rows of fold f, K classes or outputs. An ensemble averages both
    in the same way.
    """

    values: Sequence[Tensor]
    data: Dataset
    scoring: Scoring

    def complete(self, model: TunedModel, weights: Tensor, *, calibrated: bool) -> TunedModel:
        """Return a model with the residuals and the calibration temperature of an ensemble.

        The ensemble is the mean of the candidate trials, weighted by ``weights`` (M,).
        """
        # For each fold: (M, 1, 1) * (M, m, K) -> sum over M -> (m, K)
        means = [(weights[:, None, None].to(value) * value).sum(0) for value in self.values]
        temperature = self._temperature(means) if calibrated else 1.0
        return replace(model, residuals=self._residuals(means), temperature=temperature)

    def _residuals(self, means: Sequence[Tensor]) -> FloatArray | None:
        """Return the absolute errors of the mean predictions on validation rows, in ascending
        order.

        The errors are on the scale of a transformed target. If several folds validate on a row, its
        error is the mean over these folds. At most ``_RESIDUALS`` errors are returned, spread
        evenly by rank. Returns None for classes and for several target values per row.
        """
        data = self.data
        if data.task != "regression" or self.values[0].shape[-1] > 1:
            return None
        errors = []
        target = data.target.view(data.n_rows, -1).cpu()
        for f, mean in enumerate(means):
            true = target[data.folds[f].valid.cpu()]
            if data.transforms:
                true = torch.as_tensor(data.transforms[f].forward(true.numpy()))
            predicted = (mean * data.scale[f] + data.center[f]).cpu()
            errors.append((predicted - true).abs())
        row_errors = means_of_rows(data, errors)[:, 0]
        ascending: FloatArray = np.sort(row_errors[np.isfinite(row_errors)])
        size = min(len(ascending), _RESIDUALS)
        # Evenly spaced ranks, including the largest error.
        ranks = np.ceil(np.arange(1, size + 1) * len(ascending) / size).astype(int)
        residuals: FloatArray = ascending[ranks - 1]
        return residuals

    def _temperature(self, means: Sequence[Tensor]) -> float:
        """Return the temperature that calibrates the mean predictions on validation rows.

        Validation rows do not count if their class is missing in the training rows of their fold.
        If no rows remain, the temperature is 1.
        """
        logits = []
        targets = []
        for f, (fold, mean) in enumerate(zip(self.data.folds, means)):
            target = self.data.target[fold.valid]
            if self.data.present is not None:
                is_known = self.data.present[f][target].to(mean.device)
                mean = mean[is_known]
                target = target[is_known]
            logits.append(mean.clamp(min=_LEAST).log())
            targets.append(target)
        return best_temperature(torch.cat(logits), torch.cat(targets))

    def choose(self, size: int, folds: Sequence[int] | None = None) -> Counter[int]:
        """Choose trials for an ensemble greedily, and return how often each trial was chosen.

        Each of at most ``size`` steps adds the trial that gives the best mean score over the folds.
        If scores are equal, the best log loss decides, because an accuracy has few different
        values. The returned ensemble has the number of steps with the best mean score.
        """
        folds = range(self.data.n_folds) if folds is None else folds
        sums = {fold: torch.zeros_like(self.values[fold][0]) for fold in folds}
        chosen: list[int] = []
        best_pairs: list[list[float]] = []
        for step in range(1, size + 1):
            # (m, K) + (M, m, K) -> (M, m, K): the mean if each candidate were chosen next. The
            # scores of F folds, (F, 2, M), become M pairs of mean score and minus mean log loss.
            scores = [self.scores(fold, (sums[fold] + self.values[fold]) / step) for fold in folds]
            means = np.nan_to_num(np.mean(scores, axis=0), nan=-np.inf)
            pairs = means.T.tolist()
            best = pairs.index(max(pairs))
            chosen.append(best)
            best_pairs.append(pairs[best])
            for fold in folds:
                sums[fold] += self.values[fold][best]
        # index() returns the first maximum, which is the smallest ensemble with the best score.
        n_steps = best_pairs.index(max(best_pairs)) + 1
        return Counter(chosen[:n_steps])

    def nested_scores(self, size: int, groups: np.ndarray | None = None) -> list[float]:
        """Return an unbiased score of an ensemble on each fold.

        The trials for a fold are chosen on the other folds.

        With one fold, return two scores. The fold's rows are then split into two halves, and each
        half is scored with trials chosen on the other half. All rows of one of the ``groups`` (n,)
        are in the same half. A half that has no score, for example because it is empty, has the
        score NaN.
        """
        n_folds = self.data.n_folds
        if n_folds > 1:
            scores = []
            for fold in range(n_folds):
                others = [other for other in range(n_folds) if other != fold]
                scores.append(self._score_of(self.choose(size, others), fold))
            return scores
        (values,) = self.values
        (only_fold,) = self.data.folds
        valid = only_fold.valid
        halves = []
        for places in _halves(len(valid), None if groups is None else groups[valid.cpu().numpy()]):
            if len(places) == 0:
                return [math.nan, math.nan]
            rows = torch.as_tensor(places, device=valid.device)
            data = replace(self.data, folds=(replace(only_fold, valid=valid[rows]),))
            halves.append(replace(self, values=[values[:, rows]], data=data))
        first, second = halves
        return [
            first._score_of(second.choose(size), 0),
            second._score_of(first.choose(size), 0),
        ]

    def _score_of(self, choice: Counter[int], fold: int) -> float:
        """Return the score on one fold of an ensemble.

        ``choice`` counts how often each trial is in it.
        """
        weights = torch.tensor([number / choice.total() for number in choice.values()])
        mean = torch.tensordot(weights.to(self.values[fold]), self.values[fold][list(choice)], 1)
        return float(self.scores(fold, mean[None])[0][0])

    def scores(self, fold: int, values: Tensor) -> np.ndarray:
        """Return two scores of each prediction of M trials or ensembles on one fold, (2, M).

        The predictions ``values`` are (M, m rows, K outputs). The first row holds the scores of the
        search. For classes, the second row is minus the log loss. Otherwise the second row repeats
        the scores.
        """
        task = self.data.task
        outputs = values if task == "regression" else outputs_of(values, task)
        score = self.scoring(self.data, fold, outputs)
        target = self.data.target[self.data.folds[fold].valid]
        second = neg_cross_entropy(outputs, target) if task in ("binary", "multiclass") else score
        return torch.stack([score, second.to(score)]).cpu().numpy()


def _halves(n_rows: int, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the rows of two halves. All rows of a group are in the same half.

    Without groups, every second row is in the second half.
    """
    places = np.arange(n_rows)
    if groups is None:
        return places[::2], places[1::2]
    if len(set(groups.tolist())) < 2:
        return places, places[:0]
    codes = np.unique([str(group) for group in groups.tolist()], return_inverse=True)[1]
    second, first = next(GroupKFold(2).split(places, groups=codes))
    return first, second


def means_of_rows(data: Dataset, values: Sequence[Tensor]) -> FloatArray:
    """Return the mean prediction of each row over all folds that validate on the row.

    The means are (n rows, K outputs). ``values`` holds an array (validation rows, K) per fold. A
    row that no fold validates on is NaN.
    """
    sums = torch.zeros(data.n_rows, values[0].shape[1], dtype=torch.float64)
    counts = torch.zeros(data.n_rows)
    for fold, value in zip(data.folds, values, strict=True):
        rows = fold.valid.cpu()
        sums.index_add_(0, rows, value)
        counts.index_add_(0, rows, torch.ones(len(rows)))
    means: FloatArray = (sums / counts[:, None]).numpy()
    return means


def _predict(module: nn.Module, data: Dataset, fold: int, draws: EvaluationDraws | None) -> Tensor:
    """Return the predictions of a trained module for the validation rows of its fold, float64.

    The predictions are (m rows, K outputs).
    """
    size = _BLOCK if draws is None else draws.rows
    blocks = []
    for number, rows in enumerate(torch.split(data.folds[fold].valid, size)):
        inputs = [x.cpu() for x in data.rows(fold, rows)]
        with nullcontext() if draws is None else draws.seeded(fold, number * size):
            blocks.append(values_of(module, inputs, data, fold))
    return torch.cat(blocks)


def values_of(module: nn.Module, inputs: Sequence[Tensor], data: Dataset, fold: int) -> Tensor:
    """Return the predictions of a module that was trained on a fold, for rows on the CPU, float64.

    The predictions (m rows, K) are probabilities of K classes, or K outputs for a regression.
    """
    outputs = _outputs(module, inputs, data, fold)
    return _values(outputs.double().view(len(inputs[0]), -1).to(data.device), data, fold)


def _outputs(module: nn.Module, inputs: Sequence[Tensor], data: Dataset, fold: int) -> Tensor:
    """Return the outputs of a module that was trained on a fold, for rows on the CPU.

    Networks of ``n_ens`` are averaged as in the search: without the classes that are absent from
    the training rows of the fold.
    """
    if isinstance(module, Ensemble):
        outputs = [_outputs(member, inputs, data, fold) for member in module.members]
        if not is_one_logit(outputs[0], data.task, 1):
            outputs = [without_absent(output, data, fold) for output in outputs]
        return mean_outputs(torch.stack(outputs), module.weights, data.task)
    with torch.no_grad():  # TorchScript fails on tensors of inference_mode
        return first_output(call_module(module, inputs, data.names))


def _values(outputs: Tensor, data: Dataset, fold: int) -> Tensor:
    """Convert the outputs for m validation rows of a fold, (m, K), to probabilities of K classes.

    A class that is absent from the training rows of the fold has the probability 0. For a
    regression, return the outputs unchanged.
    """
    if data.task == "regression":
        return outputs
    if data.task == "multilabel":
        return outputs.sigmoid()
    if is_one_logit(outputs, data.task, 1):
        return class_logits(outputs, data.task, 1).softmax(-1)
    return without_absent(outputs, data, fold).softmax(-1)
