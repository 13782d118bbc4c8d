"""The callback of Lightning in gputune.search: reports, pruning, checkpoints and bad input.

Skipped without Lightning.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gputune
from gputune.executors.worker import TrialEnd
from gputune.integrations.lightning import LightningCallback
from trial_reports import reporter

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

X = torch.randn(48, 4, generator=torch.Generator().manual_seed(0))
Y = (X.sum(1) > 0).long()
EPOCHS = 4


def network_of(package):
    class Network(package.LightningModule):
        def __init__(self, lr):
            super().__init__()
            self.lr = lr
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.layer(x), y)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_acc", (self.layer(x).argmax(1) == y).float().mean())
            self.log("val_loss", nn.functional.cross_entropy(self.layer(x), y))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Network


Network = network_of(lightning)


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=16)


def fit(callback, folder, *, package=lightning, lr=0.1, more=(), **options):
    """Train with a callback, and return the trainer."""
    options = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **options,
    }
    trainer = package.Trainer(**options, callbacks=[callback, *more])
    trainer.fit(network_of(package)(lr), loader(), loader())
    return trainer


def test_each_validation_epoch_is_reported_and_the_sanity_check_is_not(tmp_path):
    report, values = reporter(None)
    callback = LightningCallback(report, monitor="val_loss")
    trainer = fit(callback, tmp_path)
    assert len(values) == EPOCHS and values == sorted(values, reverse=True)
    assert values[-1] == float(trainer.callback_metrics["val_loss"])
    assert not callback.ended
    trainer.validate(dataloaders=loader(), verbose=False)
    assert len(values) == EPOCHS  # only validations of the fit
    assert len(list(tmp_path.rglob("*.ckpt"))) == 1


@pytest.mark.parametrize("last", [None, True, "link"])
def test_an_ended_trial_ends_the_fit_cleanly_and_leaves_no_checkpoint(tmp_path, last):
    report, values = reporter(2)
    callback = LightningCallback(report)
    keeper = lightning.callbacks.ModelCheckpoint(save_top_k=-1, save_last=last)
    # min_epochs must not keep the fit running
    trainer = fit(callback, tmp_path, more=[keeper], min_epochs=EPOCHS)
    assert callback.ended and len(values) == 2
    assert trainer.state.finished and trainer.current_epoch == 2
    assert not list(tmp_path.rglob("*"))
    # an objective that goes on with the trainer is left
    with pytest.raises(TrialEnd):
        trainer.validate(dataloaders=loader(), ckpt_path="best", verbose=False)
    with pytest.raises(TrialEnd):
        trainer.fit(Network(0.1), loader(), loader())
    assert len(values) == 2


def test_a_fit_ends_in_the_middle_of_an_epoch(tmp_path):
    report, values = reporter(1)
    trainer = fit(LightningCallback(report), tmp_path, val_check_interval=1)
    assert len(values) == 1 and trainer.global_step == 1


def test_the_callback_in_a_search_that_prunes(tmp_path):
    def objective(params, report):
        callback = LightningCallback(report)
        trainer = fit(callback, tmp_path / str(report.number), lr=params["lr"])
        trainer.validate(dataloaders=loader(), ckpt_path="best", verbose=False)
        return trainer.callback_metrics["val_acc"].item()

    study = gputune.search(
        objective,
        {"lr": [1e-1, 1e-5, 1e-6, 1e-7]},
        direction="maximize",
        method=gputune.Halving(factor=2, min_epochs=1),
        max_epochs=EPOCHS,
        workers=1,
        verbose=0,
    )
    states = {trial.number: trial.state for trial in study.trials}
    assert set(states.values()) == {"complete", "pruned"}
    for trial in study.trials:
        kept = list((tmp_path / str(trial.number)).rglob("*.ckpt"))
        assert len(kept) == (trial.state == "complete")
        assert "error" not in trial.detail


def test_a_callback_of_pytorch_lightning(tmp_path):
    package = pytest.importorskip("pytorch_lightning")
    report, values = reporter(2)
    callback = LightningCallback(report)
    assert isinstance(callback, package.Callback | lightning.Callback)
    assert isinstance(callback, LightningCallback)
    fit(callback, tmp_path, package=package)
    assert len(values) == 2 and not list(tmp_path.rglob("*"))


def test_a_metric_that_was_never_logged(tmp_path):
    message = (
        r"monitor='acc' names a metric that the validation did not log. It logged 'val_acc', "
        r"'val_loss'. Did you mean 'val_acc'\? Pass one of the logged names, or log the metric: "
        r"self.log\('acc', value\) in validation_step."
    )
    with pytest.raises(gputune.InputError, match=message):
        fit(LightningCallback(print, monitor="acc"), tmp_path)


def test_a_wrong_monitor_ends_a_search_at_its_first_trial(tmp_path):
    numbers = []

    def objective(params, report):
        numbers.append(report.number)
        fit(LightningCallback(report, monitor="acc"), tmp_path, lr=params["lr"], max_epochs=1)

    with pytest.raises(gputune.InputError, match="^monitor='acc' names a metric that the validat"):
        gputune.search(objective, {"lr": [0.1, 0.2]}, direction="maximize", workers=1, verbose=0)
    assert numbers == [0]


def test_a_metric_of_the_training_is_refused(tmp_path):
    message = "monitor='train_loss' .* did not log. It logged 'val_acc', 'val_loss'."
    with pytest.raises(gputune.InputError, match=message):
        fit(LightningCallback(print, monitor="train_loss"), tmp_path)


def test_a_fit_without_validation(tmp_path):
    with pytest.raises(gputune.InputError, match=r"trained without a validation.*validation_step"):
        fit(LightningCallback(print), tmp_path, limit_val_batches=0)


def test_a_trainer_with_several_devices():
    trainer = lightning.Trainer(devices=2, accelerator="cpu", logger=False, strategy="ddp_spawn")
    message = r"This Lightning Trainer uses 2 devices.*Pass devices=1 and num_nodes=1"
    with pytest.raises(gputune.InputError, match=message):
        LightningCallback(print).setup(trainer, Network(0.1), "fit")


@pytest.mark.parametrize("arguments", [{"report": None}, {"report": print, "monitor": 3}])
def test_wrong_arguments(arguments):
    name = "monitor" if "monitor" in arguments else "report"
    with pytest.raises(gputune.InputError, match=f"^{name} must be the"):
        LightningCallback(**arguments)
