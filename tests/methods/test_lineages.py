"""Population based training through the public tune(): copies, schedules, resuming, replay."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy.stats import loguniform, uniform
from sklearn.datasets import load_diabetes, load_iris

import gputune
from gputune.cli.main import main
from gputune.methods.lineages import _PopulationTraining
from gputune.study.study import how_to_continue
from gputune.tuning.context import Context
from gputune.tuning.predictions import members_of
from gputune.tuning.progress import Progress
from gputune.tuning.refit import Access, search_of
from gputune.tuning.trainer import Trainer
from moments import time_is_over
from refused import refused

EPOCHS = 7
SPACE = {
    "lr": loguniform(1e-4, 1.0),
    "weight_decay": loguniform(1e-5, 1e-1),
    "dropout": uniform(0.05, 0.3),
    "batch_size": [8, 16],
    "width": [8],
}
METHOD = gputune.PopulationBased(interval=2)
tune = partial(gputune.tune, max_epochs=EPOCHS, cv=3, verbose=0, workers=1)
many = partial(tune, "mlp", *load_iris(return_X_y=True), space=SPACE, n_trials=10, method=METHOD)


class Normed(torch.nn.Module):
    """A module with running statistics and dropout."""

    def __init__(self, n_features, n_outputs):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(n_features, 6, bias=False),  # BatchNorm subtracts it
            torch.nn.BatchNorm1d(6),
            gputune.models.Dropout(),
            torch.nn.Linear(6, n_outputs),
        )

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def whole():
    return many()


def assert_same_table(study, other):
    np.testing.assert_array_equal(study.curves, other.curves)
    assert [t.detail for t in study.trials] == [t.detail for t in other.trials]
    assert [t.params for t in study.trials] == [t.params for t in other.trials]


def in_threes(monkeypatch):
    """Let trials train in chunks of three."""
    plan = Context.plan

    def cut(self, configs, *, epochs):
        planned = plan(self, configs, epochs=epochs)
        chunks = []
        for chunk in planned.chunks:
            for begin in range(0, len(chunk.index), 3):
                chunks.append(chunk.part(begin, begin + 3))
        return replace(planned, chunks=tuple(chunks))

    monkeypatch.setattr(Context, "plan", cut)


def test_no_fraction_is_random_search():
    random = many(method="random")
    none = many(method=gputune.PopulationBased(interval=2, fraction=0))
    assert_same_table(random, none)
    assert [t.schedule for t in none.trials] == [{0: t.params} for t in random.trials]
    assert none.trials[3].lineage == ((0, 3),)


def test_a_lineage_is_one_training_with_a_schedule(whole):
    n_copies = 0
    for trial in whole.trials:
        assert trial.state == "complete" and np.isfinite(trial.score)
        *before, last = trial.lineage
        assert last[1] == trial.number
        n_copies += len(trial.detail.get("copies", ()))
        assert [epoch for epoch, _ in trial.lineage] == sorted({e for e, _ in trial.lineage})
        for params in trial.schedule.values():
            assert 1e-4 <= params["lr"] <= 1 and 1e-5 <= params["weight_decay"] <= 1e-1
            assert 0.05 <= params["dropout"] <= 0.35 and params["batch_size"] in (8, 16)
        # the configuration at the best epoch
        latest = max(epoch for epoch in trial.schedule if epoch < trial.best_epoch)
        assert trial.params == trial.schedule[latest]
        if before:
            # The curve up to the copy is that of the source at the time, which random search has
            # for the trial that began the lineage.
            founder = many_random().curves[before[0][1]]
            end = trial.lineage[1][0]
            np.testing.assert_array_equal(whole.curves[trial.number][:end], founder[:end])
    sizes = [{p["batch_size"] for p in trial.schedule.values()} for trial in whole.trials]
    assert {8, 16} in sizes
    assert n_copies == 3 * 3  # a quarter of 10 trials, rounded up, at epochs 2, 4 and 6


_RANDOM = []


def many_random():
    if not _RANDOM:
        _RANDOM.append(many(method="random"))
    return _RANDOM[0]


def test_chunks_and_processes_change_nothing(whole, monkeypatch):
    assert_same_table(whole, many(workers=2))
    in_threes(monkeypatch)
    assert_same_table(whole, many())


def members_of_search(monkeypatch):
    """Collect the members of all trials after their last epoch: {trial: [module of each fold]}."""
    members = {}
    train_chunk = gputune.engine.job.train_chunk

    def recording(job, data, chunk, *arguments, **options):
        trained = train_chunk(job, data, chunk, *arguments, **options)
        if trained.epochs == EPOCHS:
            for place in trained.alive:
                folds = range(data.n_folds)
                members[chunk.index[place]] = [trained.member(fold, place) for fold in folds]
        return trained

    monkeypatch.setattr("gputune.engine.job.train_chunk", recording)
    return members


def replayed(study, **machine):
    """Train every trial of a study again by its schedule."""
    search = search_of(Access(study))
    options = search.problem.options.changed(**machine)
    search = replace(search, problem=replace(search.problem, options=options))
    members, *_ = members_of(search, study.trials, Progress(0))
    return members


def difference(members, others):
    worst = 0.0
    for modules, other_modules in zip(members, others, strict=True):
        for module, other in zip(modules, other_modules, strict=True):
            pairs = zip(module.state_dict().values(), other.state_dict().values(), strict=True)
            worst = max([worst, *(float((a - b).abs().max()) for a, b in pairs)])
    return worst


@pytest.mark.cpu  # equal bits
@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_a_replay_is_the_member(monkeypatch, optimizer):
    found = members_of_search(monkeypatch)
    study = many(optimizer=optimizer, epoch="last", dtype="float64")
    assert any(len(trial.schedule) > 2 for trial in study.trials)
    members = [found[number] for number in range(10)]
    assert difference(members, replayed(study)) == 0
    assert difference(members, replayed(study, backend="eager")) < 1e-10


@pytest.mark.parametrize(("backend", "optimizer"), [("stacked", "adamw"), ("auto", "RAdam")])
def test_a_replay_of_a_module_is_the_member(monkeypatch, backend, optimizer):
    found = members_of_search(monkeypatch)
    space = {"lr": loguniform(1e-3, 0.1), "batch_size": [32], "dropout": uniform(0.05, 0.3)}
    X, y = load_iris(return_X_y=True)
    study = tune(
        Normed,
        X[::3],
        y[::3],
        space=space,
        n_trials=4,
        cv=2,
        method=METHOD,
        backend=backend,
        optimizer=optimizer,
        epoch="last",
        dtype="float64",
    )
    assert any(len(trial.lineage) > 1 for trial in study.trials)
    members = [found[number] for number in range(4)]
    assert difference(members, replayed(study)) < 1e-10


def test_the_best_model_repeats_the_schedule(whole):
    best = max(whole.trials, key=lambda trial: (len(trial.schedule), trial.score))
    search = search_of(Access(whole))
    data = search.dataset(None, [best])
    ((module,),) = search.train(data, [best])
    others = [replace(best, detail={}), replace(best, params=whole.trials[0].params, detail={})]
    for other in others:
        ((fixed,),) = search.train(data, [other])
        assert difference([[module]], [[fixed]]) > 1e-4
    model = whole.best_model()
    assert model.predict(load_iris().data).shape == (150,)
    assert model.info["params"] == whole.best_params


@pytest.mark.cpu  # the checkpoints that compiled code writes
@pytest.mark.parametrize("seconds", [1e-9, 60])
def test_a_killed_search_resumes_to_the_same_table(whole, tmp_path, monkeypatch, seconds):
    search = partial(many, study=tmp_path / "s.db", checkpoint_seconds=seconds)
    train = Trainer.train
    in_threes(monkeypatch)
    for kill_at in (2, 3):
        calls = []

        def killed(self, job, plan, calls=calls, kill_at=kill_at, **rest):
            calls.append(1)
            # in the middle of the chunks between two comparisons
            for number, outcome in enumerate(train(self, job, plan, **rest)):
                if len(calls) == kill_at and number:
                    raise KeyboardInterrupt
                yield outcome

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Trainer, "train", killed)
            search()
    starts = []

    def seen(self, job, plan, **rest):
        starts.append(min(getattr(chunk, "epoch", 0) for chunk in plan.chunks))
        return train(self, job, plan, **rest)

    monkeypatch.setattr(Trainer, "train", seen)
    assert_same_table(whole, search())
    assert starts == ([4, 6] if seconds < 1 else [0, 2, 4, 6])
    assert not list(tmp_path.glob("*checkpoints*/*"))


def test_a_stopped_search_resumes_where_it_was(whole, tmp_path, monkeypatch):
    search = partial(many, study=tmp_path / "s.db")
    with pytest.MonkeyPatch.context() as patch:
        time_is_over(patch, 5)
        study = search(timeout=600)
    assert {trial.state for trial in study.trials} <= {"stopped", "waiting"}
    assert any(trial.state == "stopped" for trial in study.trials)
    starts = []
    train = Trainer.train

    def seen(self, job, plan, **rest):
        starts.append(min(chunk.epoch for chunk in plan.chunks))
        return train(self, job, plan, **rest)

    monkeypatch.setattr(Trainer, "train", seen)
    assert_same_table(whole, search())
    assert starts[0] > 0


def peak_of(trials):
    """The best mean validation score of all epochs of trials that have not diverged."""
    curves = np.stack([trial.curve.mean(1) for trial in trials])
    return float(curves.max(1)[np.isfinite(curves).all(1)].max())


@pytest.mark.parametrize("method", [METHOD, gputune.PopulationBased(interval=[1, 2])])
def test_the_best_score_never_falls(monkeypatch, method):
    peaks = []
    compare = _PopulationTraining.compare

    def recording(self, epoch):
        peaks.append(peak_of(self.running))
        compare(self, epoch)
        peaks.append(peak_of(self.running))

    monkeypatch.setattr(_PopulationTraining, "compare", recording)
    # With these rates, good weights are lost again. The seed was chosen so that the best score fell
    # before gputune protected its trial.
    space = {"lr": loguniform(0.03, 3), "width": [8], "batch_size": [8]}
    study = many(space=space, method=method, optimizer="sgd", random_state=6)
    assert peaks == sorted(peaks)
    assert study.best_score >= peaks[-1]


def test_without_exploring_trials_only_copy(whole):
    study = many(method=gputune.PopulationBased(interval=2, explore=False))
    starts = [trial.schedule[0] for trial in many_random().trials]
    copied = 0
    for trial in study.trials:
        assert trial.schedule == {0: starts[trial.lineage[0][1]]}
        copied += len(trial.lineage) > 1
    assert copied


def test_the_first_of_several_metrics_ranks(whole):
    study = many(scoring=["accuracy", "neg_log_loss"])
    ranked = many(scoring="accuracy")
    assert study.metrics == ("accuracy", "neg_log_loss")
    np.testing.assert_array_equal(study.curves, ranked.curves)
    assert [t.detail for t in study.trials] == [t.detail for t in ranked.trials]
    assert set(study.trials[0].metrics) == {"accuracy", "neg_log_loss"}


def test_a_diverged_trial_continues_as_a_copy():
    space = {"lr": [1e-3, 1e-2, 1e5, 3e-3], "width": [8]}
    data = load_diabetes(return_X_y=True)
    search = partial(tune, "mlp", *data, space=space, n_trials=4, optimizer="sgd")
    random = search(include_default=False)
    assert [trial.state for trial in random.trials].count("failed") == 1
    (lost,) = [trial.number for trial in random.trials if trial.state == "failed"]
    study = search(include_default=False, method=METHOD)
    trial = study.trials[lost]
    assert trial.state == "complete" and trial.lineage[0][1] != lost


def test_a_diverged_trial_of_a_stopped_search_continues_as_a_copy(tmp_path):
    class Cut(gputune.callbacks.Callback):
        def on_epoch(self, curves):
            raise gputune.callbacks.StopSearch

    space = {"lr": [1e-3, 1e-2, 1e5, 3e-3], "width": [8]}
    data = load_diabetes(return_X_y=True)
    options = {"n_trials": 4, "include_default": False, "optimizer": "sgd", "method": METHOD}
    options["scoring"] = ["r2", "neg_mean_squared_error"]
    search = partial(tune, "mlp", *data, space=space, **options)
    cut = search(study=tmp_path / "s.db", callbacks=[Cut()])
    assert {trial.state for trial in cut.trials} == {"stopped"}
    (lost,) = [trial for trial in cut.trials if np.isnan(trial.score)]
    assert lost.best_epoch == 0 and np.isnan(lost.metrics["neg_mean_squared_error"]).all()
    again = search(study=tmp_path / "s.db")
    assert_same_table(search(), again)
    assert {trial.state for trial in again.trials} == {"complete"}


def test_other_architectures_are_not_copied():
    study = many(space={**SPACE, "width": [8, 7, 16]}, n_trials=12)
    widths = {trial.number: trial.params["width"] for trial in study.trials}
    n_copies = 0
    for trial in study.trials:
        for _, source in trial.detail.get("copies", ()):
            n_copies += 1
            assert widths[source] == widths[trial.number]
        assert {params["width"] for params in trial.schedule.values()} == {widths[trial.number]}
    assert n_copies
    model = study.best_model()
    assert model.predict(load_iris().data).shape == (150,)


@pytest.mark.cpu  # equal bits
@pytest.mark.parametrize("interval", [2, [1, 2]])
def test_trials_with_and_without_dropout_copy_each_other(monkeypatch, tmp_path, interval):
    method = gputune.PopulationBased(interval=interval)
    space = {**SPACE, "dropout": [0.0, 0.2]}
    options = {"space": space, "n_trials": 10, "epoch": "last", "dtype": "float64"}
    first = [trial.params["dropout"] for trial in many(method="random", **options).trials]
    found = members_of_search(monkeypatch)
    study = many(method=method, **options)
    copies = set()
    for trial in study.trials:
        for _, source in trial.detail.get("copies", ()):
            copies.add((first[trial.number] > 0, first[source] > 0))
    assert (True, False) in copies or (False, True) in copies
    members = [found[number] for number in range(10)]
    assert difference(members, replayed(study)) == 0
    resumed = partial(many, method=method, **options, study=tmp_path / "s.db")
    with pytest.MonkeyPatch.context() as patch:
        time_is_over(patch, 5)
        assert any(trial.state == "stopped" for trial in resumed(timeout=600).trials)
    assert_same_table(study, resumed())


def test_intervals_make_subpopulations():
    study = many(method=gputune.PopulationBased(interval=[1, 3]), n_trials=16)
    epochs = {0: set(), 1: set()}
    for trial in study.trials:
        epochs[trial.number % 2].update(epoch for epoch, _ in trial.detail.get("copies", ()))
    assert epochs[0] <= {1, 2, 3, 4, 5, 6} and epochs[1] == {3, 6}
    sources = set()
    for trial in study.trials:
        sources.update((trial.number - number) % 2 for _, number in trial.detail.get("copies", ()))
    assert sources == {0, 1}


def test_a_finished_study_grows_by_another_population(tmp_path):
    first = many(study=tmp_path / "s.db")
    more = many(study=tmp_path / "s.db", n_trials=14)
    assert [t.detail for t in more.trials[:10]] == [t.detail for t in first.trials]
    for trial in more.trials[10:]:
        assert trial.lineage[0][1] >= 10 and trial.state == "complete"
    opened = gputune.Study.open(tmp_path / "s.db")
    assert [t.schedule for t in opened.trials] == [t.schedule for t in more.trials]


def test_the_schedule_up_to_the_best_epoch(whole):
    trial = max(whole.trials, key=lambda trial: len(trial.schedule))
    last = max(trial.schedule)
    before = replace(trial, best_epoch=last)
    assert list(before.schedule_to_best) == list(trial.schedule)[:-1]
    assert list(replace(trial, best_epoch=last + 1).schedule_to_best) == list(trial.schedule)
    assert list(replace(trial, best_epoch=0).schedule_to_best) == [0]


def test_a_search_says_how_many_trials_cannot_copy(capsys):
    def notes(**options):
        many(verbose=1, max_epochs=3, **options)
        return capsys.readouterr().err

    alone = "cannot copy or be copied, because no other trial has the same architecture\n"
    assert f"note: 1 of 1 trial {alone}" in notes(n_trials=1)
    # The population of momentum 0 has no buffer for momentum.
    space = {"momentum": [0.0, 0.9], "batch_size": [16]}
    told = notes(n_trials=2, space=space, include_default=False, optimizer="sgd")
    assert f"note: 2 of 2 trials {alone}" in told
    space = {"lr": loguniform(1e-3, 0.1)}
    assert f"note: 1 of 7 trials {alone}" in notes(n_trials=6, include=[{"width": 6}], space=space)
    assert alone not in notes(n_trials=4, space=space)
    assert alone not in notes(n_trials=1, method=gputune.PopulationBased(interval=2, fraction=0))


def test_a_resumed_search_counts_its_epochs(whole, tmp_path, monkeypatch):
    search = partial(many, study=tmp_path / "s.db")
    with pytest.MonkeyPatch.context() as patch:
        time_is_over(patch, 5)
        search(timeout=600)
    counted = []
    bar_over = Progress.bar_over

    def seen(self, trials, epochs, *, trained=0):
        counted.append((trials, epochs, trained))
        return bar_over(self, trials, epochs, trained=trained)

    monkeypatch.setattr(Progress, "bar_over", seen)
    search()
    (trials, epochs, trained) = counted[0]
    assert (trials, epochs) == (10, EPOCHS) and trained in (2 * 10, 4 * 10)


def test_status_after_a_kill_names_the_checkpoints(tmp_path, monkeypatch, capsys):
    file = tmp_path / "study.db"
    compare = _PopulationTraining.compare

    class Killed(BaseException):
        pass

    def compare_and_die(training, epoch):
        compare(training, epoch)
        raise Killed

    monkeypatch.setattr(_PopulationTraining, "compare", compare_and_die)
    with pytest.raises(Killed):
        many(study=file, checkpoint_seconds=1e-9)
    assert main(["status", str(file)]) == 0
    # Its X and y were in memory, so that the command cannot read them again.
    text = "training waits in checkpoints, and repeating the call of gputune.tune continues it"
    assert f"none yet; all {text}" in capsys.readouterr().out
    assert main(["best", str(file)]) == 1
    assert text in capsys.readouterr().err
    study = gputune.Study.open(file)
    for face, repeated in (("loop", "gputune.search"), ("sklearn", "fit"), ("", "gputune.tune")):
        record = replace(study.record, face=face or study.record.face)
        words = how_to_continue(record)
        assert words == f"repeating the call of {repeated}"
    record = replace(study.record, arguments=replace(study.record.arguments, lacking=[]))
    assert how_to_continue(record) == "'gputune resume'"


def test_the_solved_regression_is_refused():
    with refused("method='pbt' copies trials while they train, but the solved"):
        tune("logistic", *load_iris(return_X_y=True), method=METHOD)


def test_too_few_epochs_are_refused():
    with refused(r"interval=...\) must leave a comparison below max_epochs=2, got 2. Lower it"):
        many(max_epochs=2)


def test_the_report_draws_the_family_tree(whole, tmp_path):
    def html(study):
        study.report(tmp_path / "report.html")
        return (tmp_path / "report.html").read_text()

    page = html(whole)
    best = whole.best_trial
    assert 'id="family"' in page and f"trial {best.number}" in page
    # The code at the end reads the study, because tune() cannot repeat a schedule.
    assert ("from epoch" in page) == (len(best.schedule_to_best) > 1)
    assert 'id="family"' not in html(many_random())
