"""LightningModules in gputune.tune: their training step, their optimizer, and bad input.

Skipped without Lightning.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gputune
from gputune.integrations.modules.lightning import optimizer_of

lightning = pytest.importorskip("lightning.pytorch")
torchmetrics = pytest.importorskip("torchmetrics")

DRAWS = torch.Generator().manual_seed(0)
X = torch.randn(60, 4, generator=DRAWS)
Y = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()
OPTIONS = {"max_epochs": 3, "cv": 2, "verbose": 0, "n_trials": 3, "dtype": "float64"}
SMOOTHING = 0.1
SGD = torch.optim.SGD


class Plain(nn.Module):
    def __init__(self, n_features, n_outputs, hidden=6):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs)
        )

    def forward(self, x):
        return self.net(x)


class Network(lightning.LightningModule):
    """The same network with everything that a usual LightningModule has."""

    def __init__(self, n_features, n_outputs, hidden=6, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Linear(n_features, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs)
        )
        metrics = {"acc": torchmetrics.Accuracy(task="multiclass", num_classes=n_outputs)}
        self.metrics = torchmetrics.MetricCollection(metrics)
        self.mean = torchmetrics.MeanMetric()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        outputs = self(x)
        loss = nn.functional.cross_entropy(outputs, y, label_smoothing=SMOOTHING)
        self.mean.update(loss.detach())
        self.log_dict(self.metrics(outputs, y))
        self.log("loss", self.mean)
        self.logger.experiment.add_scalar("loss", loss)
        self.print("step", batch_idx, end="")
        return {"loss": loss, "outputs": outputs}

    def validation_step(self, batch, batch_idx):
        raise AssertionError

    def on_train_epoch_end(self):
        raise AssertionError

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.hparams.lr, momentum=0.8, weight_decay=0.002
        )
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)
        return [optimizer], [{"scheduler": scheduler, "interval": "epoch"}]


def loss(outputs, y):
    return nn.functional.cross_entropy(outputs, y, label_smoothing=SMOOTHING, reduction="none")


def test_a_module_trains_with_its_own_step_and_optimizer(capsys):
    space = {"lr": [0.05, 0.5, 0.01], "batch_size": [8]}
    study = gputune.tune(Network, X, Y, space=space, **{**OPTIONS, "verbose": 1})
    expected = gputune.tune(
        Plain,
        X,
        Y,
        space={**space, "momentum": [0.8], "weight_decay": [0.002], "schedule": ["cosine"]},
        loss=loss,
        optimizer="sgd",
        **OPTIONS,
    )
    shown = capsys.readouterr().err
    assert (
        "note: Network trains with its training_step; the defaults of configure_optimizers are "
        "optimizer='sgd', lr=0.05, weight_decay=0.002, momentum=0.8, schedule='cosine' over all "
        "epochs; gputune ignores logging, on_train_epoch_end, validation_step"
    ) in " ".join(shown.split())
    assert "cannot be stacked" not in shown
    assert study.trials[0].params["lr"] == 0.05  # the default trial
    assert study.curves.std() > 0
    by_lr = {trial.params["lr"]: trial.number for trial in expected.trials}
    for trial in study.trials:
        curve = expected.curves[by_lr[trial.params["lr"]]]
        assert np.array_equal(study.curves[trial.number], curve)
    module = study.best_model().module
    assert type(module) is Network
    assert not {"log", "_trainer", "forward"} & (vars(module).keys() - {"_trainer"})
    assert module._trainer is None
    assert module.metrics["acc"](module(X[:5].double()), Y[:5]) >= 0


def test_the_default_space_lies_around_the_learning_rate_of_the_module():
    study = gputune.tune(Network, X, Y, **OPTIONS)
    assert study.trials[0].params["lr"] == 0.05
    assert study.trials[0].params["weight_decay"] == 0.002
    assert study.record.optimizer == "sgd"
    distribution = study.record.distributions["lr"]
    assert (distribution["low"], distribution["high"]) == pytest.approx((0.005, 1.5))


@pytest.mark.long
def test_the_arguments_of_tune_replace_those_of_the_module():
    space = {"batch_size": [8]}
    options = {**OPTIONS, "space": space}
    study = gputune.tune(Network, X, Y, optimizer="adam", loss=loss, **options)
    expected = gputune.tune(Plain, X, Y, optimizer="adam", loss=loss, schedule="cosine", **options)
    assert np.array_equal(study.curves, expected.curves)
    fixed = gputune.tune(Network, X, Y, **{**options, "space": {**space, "schedule": "constant"}})
    assert fixed.trials[0].params["schedule"] == "constant"


@pytest.mark.long
def test_a_saved_study_resumes_and_gives_its_model_in_the_same_way(tmp_path):
    path = tmp_path / "study.db"
    options = {**OPTIONS, "space": {"lr": [0.05, 0.01], "batch_size": [8]}}
    study = gputune.tune(Network, X, Y, study=path, **options)
    again = gputune.tune(Network, X, Y, study=path, **options)
    assert np.array_equal(study.curves, again.curves)
    predicted = study.best_model().predict_proba(X)
    reopened = gputune.Study.open(path).best_model(X, Y)
    assert np.allclose(predicted, reopened.predict_proba(X), atol=1e-9)


def test_a_module_of_pytorch_lightning_and_a_function_that_returns_one():
    package = pytest.importorskip("pytorch_lightning")

    class Old(package.LightningModule):
        def __init__(self, n_features, n_outputs):
            super().__init__()
            self.layer = nn.Linear(n_features, n_outputs)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch):  # without batch_idx
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def make(n_features, n_outputs):
        return Old(n_features, n_outputs)

    studies = [gputune.tune(model, X, Y, **OPTIONS) for model in (Old, make)]
    assert np.array_equal(studies[0].curves, studies[1].curves)
    for study in studies:
        assert study.record.objective.endswith("Old.training_step")


@pytest.mark.long
def test_train_many_uses_the_step_of_the_module():
    trained = gputune.train_many(Network, [{"batch_size": 8}], X, Y, max_epochs=2)
    given = {"batch_size": 8, "lr": 0.05, "momentum": 0.8, "weight_decay": 0.002}
    plain = gputune.train_many(
        Plain, [given], X, Y, loss=loss, optimizer="sgd", schedule="cosine", max_epochs=2
    )
    assert np.array_equal(trained.curves, plain.curves)
    for name, tensor in plain.state.items():
        assert torch.allclose(trained.state[name], tensor, atol=1e-6)


class Small(lightning.LightningModule):
    def __init__(self, n_features, n_outputs, rate=0.1):
        super().__init__()
        self.rate = rate
        self.layer = nn.Linear(n_features, n_outputs)
        self.other = nn.Linear(1, 1)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class WithoutStep(Small):
    training_step = lightning.LightningModule.training_step

    def configure_optimizers(self):
        SGD(self.parameters(), lr=0.1)  # without return


class Collects(Small):
    """Its hook clears a list, but sets no attribute."""

    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.losses.clear()

    def test_step(self, batch, batch_idx):
        self.losses = []  # not during a fit


@pytest.mark.parametrize(
    ("model", "remark"),
    [
        (
            WithoutStep,
            "WithoutStep has no training_step, so it trains on the default loss of the target, or "
            "on the one in loss; configure_optimizers returns no optimizer, so gputune uses its "
            "own defaults (return the optimizer to use it)",
        ),
        (
            Collects,
            "Collects trains with its training_step; gputune ignores on_train_epoch_end, test_step",
        ),
    ],
)
def test_a_note_says_what_gputune_takes(model, remark, capsys):
    gputune.tune(model, X, Y, **{**OPTIONS, "n_trials": 1, "max_epochs": 1, "verbose": 1})
    shown = " ".join(capsys.readouterr().err.split())
    assert f"note: {remark} plan:" in shown


class Rows(lightning.LightningDataModule):
    def setup(self, stage):
        data = torch.utils.data.TensorDataset(X, Y)
        self.train, self.valid = torch.utils.data.random_split(data, [40, 20], DRAWS)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=8)


def test_the_split_of_a_data_module():
    rows = Rows()
    with pytest.raises(gputune.InputError, match=r"X is the class Rows, .* data = Rows\(...\), ca"):
        gputune.tune(Network, Rows, **OPTIONS)
    unprepared = r"X is the LightningDataModule Rows, .*setup.* cv=\(X.train.indices, X.valid.ind"
    with pytest.raises(gputune.InputError, match=unprepared):
        gputune.tune(Network, rows, **OPTIONS)
    rows.setup("fit")
    prepared = (
        r"Its parts train, valid are of one dataset. Pass this dataset, X.train.dataset, and the "
        r"split, cv=\(X.train.indices, X.valid.indices\)."
    )
    with pytest.raises(gputune.InputError, match=prepared):
        gputune.tune(Network, rows, **OPTIONS)
    split = (rows.train.indices, rows.valid.indices)
    study = gputune.tune(Network, rows.train.dataset, **{**OPTIONS, "cv": split})
    assert study.curves.shape[2] == 1


# --- the optimizer

BODY = nn.Linear(2, 2)
ADAM = torch.optim.Adam


class Returned(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.make = make

    def configure_optimizers(self):
        return self.make(self.layer.parameters())


@pytest.mark.parametrize(
    ("make", "optimizer", "defaults"),
    [
        (lambda w: SGD(w, lr=0.1), "sgd", {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.0}),
        (
            lambda w: SGD(w, lr=0.1, momentum=0.5, nesterov=True),
            "nesterov",
            {"lr": 0.1, "weight_decay": 0.0, "momentum": 0.5},
        ),
        (
            lambda w: {"optimizer": torch.optim.AdamW(w, betas=(0.9, 0.95), foreach=False)},
            "adamw",
            {"lr": 1e-3, "weight_decay": 0.01, "beta2": 0.95},
        ),
        (
            lambda w: [ADAM(w, lr=0.01, betas=(0.8, 0.95))],
            "adam",
            {"lr": 0.01, "weight_decay": 0.0, "optimizer__betas": (0.8, 0.95)},
        ),
        (
            lambda w: ADAM(w, eps=1e-6, betas=(0.9, 0.95)),
            "adam",
            {
                "lr": 1e-3,
                "weight_decay": 0.0,
                "optimizer__eps": 1e-6,
                "optimizer__betas": (0.9, 0.95),
            },
        ),
        (lambda w: torch.optim.RAdam(w, lr=0.02), "RAdam", {"lr": 0.02, "weight_decay": 0.0}),
        (lambda w: None, "", {}),
    ],
)
def test_the_optimizer_and_its_values(make, optimizer, defaults):
    read = optimizer_of(Returned(make))
    assert (read.optimizer, read.defaults) == (optimizer, defaults)
    assert not read.schedule and not read.ignored


def one_cycle(optimizer):
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=20)


@pytest.mark.parametrize(
    ("scheduler", "schedule", "lr", "ignored"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 10), "cosine", 0.1, []),
        (
            lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.1),
            "",
            0.1,
            ["its scheduler CosineAnnealingLR"],
        ),
        (lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0), "linear", 0.1, []),
        (lambda o: lr_scheduler.LinearLR(o), "", 0.1, ["its scheduler LinearLR"]),
        (one_cycle, "one_cycle", 0.5, ["the cycle of momentum of OneCycleLR"]),
        (lambda o: lr_scheduler.StepLR(o, 3), "", 0.1, ["its scheduler StepLR"]),
        (lambda o: lr_scheduler.LambdaLR(o, math.exp), "", 0.1, ["its scheduler LambdaLR"]),
    ],
)
def test_a_scheduler_becomes_a_schedule_or_is_ignored(scheduler, schedule, lr, ignored):
    def make(parameters):
        optimizer = ADAM(parameters, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": scheduler(optimizer)}

    read = optimizer_of(Returned(make))
    assert (read.schedule, read.ignored) == (schedule, ignored)
    assert read.defaults == {"lr": lr, "weight_decay": 0.0}


@pytest.mark.parametrize(
    ("name", "warmup", "schedule"),
    [
        ("get_linear_schedule_with_warmup", 0, "linear"),
        ("get_linear_schedule_with_warmup", 5, ""),
        ("get_cosine_schedule_with_warmup", 0, "cosine"),
        ("get_cosine_schedule_with_warmup", 5, "warmup+cosine"),
    ],
)
def test_a_schedule_of_transformers(name, warmup, schedule):
    transformers = pytest.importorskip("transformers")

    def make(parameters):
        optimizer = ADAM(parameters, lr=0.1)
        return [optimizer], [getattr(transformers, name)(optimizer, warmup, 50)]

    read = optimizer_of(Returned(make))
    assert (read.schedule, read.defaults["lr"]) == (schedule, 0.1)


def test_what_gputune_lacks_is_named():
    class Own(SGD):
        pass

    assert optimizer_of(Returned(lambda w: Own(w, 0.1))).ignored == ["its optimizer Own"]
    groups = optimizer_of(Returned(lambda w: SGD([{"params": [p]} for p in w], 0.1)))
    assert groups.ignored == ["the options of all parameter groups after the first"]


# --- bad input


class ReadsEpoch(Small):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + self.current_epoch)


class ReadsTrainer(Small):
    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.trainer.datamodule.lr)


class Manual(Small):
    def __init__(self, n_features, n_outputs):
        super().__init__(n_features, n_outputs)
        self.automatic_optimization = False


class TwoOptimizers(Small):
    def configure_optimizers(self):
        return SGD(self.layer.parameters(), lr=0.1), SGD(self.other.parameters(), lr=0.1)


class TrainsAPart(Small):
    def configure_optimizers(self):
        return SGD(self.layer.parameters(), lr=0.1)


class NoForward(Small):
    forward = lightning.LightningModule.forward


class NoLoss(Small):
    def training_step(self, batch, batch_idx):
        return {"log": 1.0}


class OwnRate(Small):
    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.rate)


class SetInHook(Small):
    weight = 1.0

    def on_train_epoch_start(self):
        self.weight = 2.0

    def weighted(self, loss):
        return self.weight * loss

    def training_step(self, batch, batch_idx):
        return self.weighted(super().training_step(batch, batch_idx))


class LayersInHook(Small):
    def configure_model(self):
        self.layer = nn.Linear(4, 3)


@pytest.mark.parametrize(
    ("model", "space", "message"),
    [
        (
            ReadsEpoch,
            None,
            r"The training_step of ReadsEpoch reads trainer.current_epoch, but gputune trains the "
            r"module without a Lightning Trainer. Leave trainer.current_epoch out of training_step."
            r" Or keep the Lightning Trainer: gputune.search with .*LightningCallback",
        ),
        (ReadsTrainer, None, r"configure_optimizers of ReadsTrainer reads trainer.datamodule"),
        (
            Manual,
            None,
            r"Manual sets automatic_optimization = False, but gputune takes the optimizer steps "
            r"itself. Return the loss from training_step, with automatic optimization. Or keep",
        ),
        (TwoOptimizers, None, r"configure_optimizers of TwoOptimizers returns 2 optimizers"),
        (
            TrainsAPart,
            None,
            r"The optimizer of TrainsAPart does not train 2 parameters, such as 'other.weight', "
            r"but gputune trains every parameter with requires_grad. Call requires_grad_\(False\)",
        ),
        (NoForward, None, r"NoForward has no forward, .* Add def forward\(self, x\)"),
        (
            NoLoss,
            None,
            r"The training_step of NoLoss must return the loss, or a dict with the key 'loss', "
            r"got NoneType",
        ),
        (
            SetInHook,
            None,
            r"The weighted of SetInHook reads self.weight, which on_train_epoch_start sets, but "
            r"gputune never calls on_train_epoch_start. Set self.weight only in __init__. Or keep",
        ),
        (
            LayersInHook,
            None,
            r"The forward of LayersInHook reads self.layer, which configure_model",
        ),
        (
            OwnRate,
            {"module__rate": [0.1, 0.2]},
            r"space has module__rate, which changes the optimizer in configure_optimizers of "
            r"OwnRate. .* Search lr or another key of the optimizer instead.",
        ),
    ],
)
def test_bad_input(model, space, message):
    with pytest.raises(gputune.InputError, match=message):
        gputune.tune(model, X, Y, space=space, **OPTIONS)
