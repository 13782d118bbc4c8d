"""A callback of Lightning for ``gputune.search``.

Both packages of Lightning work: ``lightning`` and ``pytorch_lightning``.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

from gputune.ground.entry_points import import_extra
from gputune.integrations.trainer_reports import TrainerReports, with_bases

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LightningCallback:
    """Reports each validation of a Lightning ``Trainer`` to ``gputune.search``.

    Guide: ``docs/lightning.md``.

    Make a new callback in each trial. After each validation epoch, but not after the sanity check,
    the callback calls ``report`` with the metric ``monitor``. If the search prunes the trial, or if
    its time is over, the callback ends the fit through ``trainer.should_stop`` and removes the
    checkpoints of this fit. ``trainer.fit`` returns as usual, and gputune ignores what the
    objective returns. If the objective uses this trainer again, for example with
    ``trainer.test``, gputune leaves the objective at this place.

    The trainer must have one device. ``gputune.search`` starts one process for each GPU, and this
    process sees only its GPU.

    Args:
        report: The second argument of the objective.
        monitor: The name of a metric that the validation logs, as in
            ``self.log("val_acc", value)``.

    Attributes:
        ended: Whether the search has ended the trial.

    Raises:
        InputError: In the constructor, ``report`` is not callable or ``monitor`` is not a text.
            During the fit, the metric was not logged, nothing was validated, or the
            trainer has several devices.
            The error ends the search if no trial has succeeded yet. Otherwise the trial is
            "failed".
        MissingExtraError: Lightning is not installed.

    Example:
        >>> import lightning
        >>> import torch
        >>> import gputune
        >>> from gputune.integrations.lightning import LightningCallback
        >>> class Line(lightning.LightningModule):
        ...     def __init__(self, lr):
        ...         super().__init__()
        ...         self.lr = lr
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, batch_idx):
        ...         return (self.layer(batch) - 3 * batch).square().mean()
        ...     def validation_step(self, batch, batch_idx):
        ...         self.log("val_loss", self.training_step(batch, batch_idx))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=self.lr)
        >>> def objective(params, report):
        ...     callback = LightningCallback(report, monitor="val_loss")
        ...     trainer = lightning.Trainer(
        ...         max_epochs=3, callbacks=[callback], accelerator="cpu", logger=False,
        ...         enable_checkpointing=False, enable_progress_bar=False,
        ...         enable_model_summary=False,
        ...     )
        ...     rows = torch.utils.data.DataLoader(torch.ones(8, 1))
        ...     trainer.fit(Line(params["lr"]), rows, rows)
        ...     return trainer.callback_metrics["val_loss"].item()
        >>> options = {"direction": "minimize", "workers": 1, "verbose": 0}
        >>> study = gputune.search(objective, {"lr": [0.001, 0.1]}, **options)
        >>> study.best_params, study.curves.shape
        ({'lr': 0.1}, (2, 3, 1))
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Return a callback of each package of Lightning that the program has imported."""
        loaded = [package for package in _PACKAGES if package in sys.modules]
        if not loaded:
            import_extra("lightning.pytorch", extra="lightning", used_by="LightningCallback")
            loaded = ["lightning.pytorch"]
        bases = [sys.modules[package].Callback for package in loaded]
        kind: type = cls
        callback: Self = object.__new__(with_bases(kind, *bases))
        return callback

    def __init__(self, report: Callable[[float], object], monitor: str = "val_acc") -> None:
        super().__init__()
        self._reports = TrainerReports(report, monitor, "Lightning")
        self._checkpoints: list[str] = []

    @property
    def ended(self) -> bool:
        """Whether the search has ended the trial."""
        return self._reports.ended

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the trainer, and note each checkpoint that it saves from here on."""
        self._reports.leave_if_ended()
        if stage == "fit":
            devices = trainer.num_devices * trainer.num_nodes
            remedy = "Pass devices=1 and num_nodes=1 to the Trainer."
            self._reports.check_devices(devices, remedy)
            trainer.save_checkpoint = partial(self._save, type(trainer).save_checkpoint, trainer)

    def _save(
        self,
        save: Callable[..., object],
        trainer: Any,
        filepath: object,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Save a checkpoint, unless the trial has ended."""
        if not self.ended:
            self._checkpoints.append(str(filepath))
            save(trainer, filepath, *args, **kwargs)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the metric, and stop the fit if the search ends the trial."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        name = self._reports.monitor
        how_to_log = f"self.log({name!r}, value) in validation_step"
        if self._reports.add(_validation_metrics(trainer), how_to_log):
            # A minimum of epochs or steps would keep the fit running.
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Check that the fit has reported something."""
        self._reports.check_number(
            "Pass validation data, for example val_dataloaders=, give the LightningModule a "
            "validation_step, and validate at least once (check_val_every_n_epoch)."
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove the checkpoints of a trial that the search has ended."""
        if stage != "fit":
            return
        del trainer.save_checkpoint  # the method of the class is visible again
        if self.ended:
            # ModelCheckpoint(save_last="link") makes its last checkpoint without the trainer.
            last = [getattr(c, "last_model_path", "") for c in trainer.checkpoint_callbacks]
            for path in [*filter(None, last), *self._checkpoints]:
                if Path(path).is_symlink():
                    Path(path).unlink()
                else:
                    trainer.strategy.remove_checkpoint(path)
                with suppress(OSError):  # the folder has other files, or is gone
                    Path(path).parent.rmdir()


def _validation_metrics(trainer: Any) -> dict[str, Any]:
    """Return the metrics that the validation which has just ended has logged.

    ``trainer.callback_metrics`` also has the metrics of the training, from its last minibatch.
    """
    metrics: dict[str, Any] = trainer.callback_metrics
    results = getattr(trainer, "_results", None)
    if results is None:  # an attribute that future versions may lack
        return metrics
    logged = results.metrics(on_step=False)["callback"]
    return {name: value for name, value in metrics.items() if name in logged}
