"""A callback of the transformers ``Trainer`` for ``gputune.search``."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from gputune.ground.entry_points import import_extra
from gputune.integrations.trainer_reports import TrainerReports, with_bases

# Entries of an evaluation that are no scores of the model.
_NO_SCORES = ("epoch", "_runtime", "_per_second", "_preparation_time")


class TrainerCallback:
    """Reports each evaluation of a transformers ``Trainer`` to ``gputune.search``.

    Guide: ``docs/hugging-face.md``.

    Make a new callback in each trial. After each evaluation during the training, but not after
    ``eval_on_start``, the callback calls ``report`` with the metric ``monitor``. If the search
    prunes the trial, or if its time is over, the callback ends the training through
    ``control.should_training_stop`` and removes the checkpoints of this training.
    ``trainer.train`` returns as usual, and gputune ignores what the objective returns. If the
    objective evaluates or trains with this trainer again, gputune leaves the objective at this
    place.

    The trainer must have one device. ``gputune.search`` starts one process for each GPU, and this
    process sees only its GPU.

    Args:
        report: The second argument of the objective.
        monitor: The name of a metric of ``trainer.evaluate()``. The trainer puts ``eval_`` before
            the names that ``compute_metrics`` returns.

    Attributes:
        ended: Whether the search has ended the trial.

    Raises:
        InputError: In the constructor, ``report`` is not callable or ``monitor`` is not a text.
            During the training, the evaluation has no such metric, nothing was evaluated,
            or the trainer has several devices.
            The error ends the search if no trial has succeeded yet. Otherwise the trial is
            "failed".
        MissingExtraError: transformers is not installed.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from transformers import PrinterCallback, Trainer, TrainingArguments
        >>> import gputune
        >>> from gputune.integrations.transformers import TrainerCallback
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> config = BertConfig(vocab_size=9, num_hidden_layers=1, **sizes)
        >>> rows = [{"input_ids": torch.tensor([i]), "labels": i % 2} for i in range(8)]
        >>> arguments = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "no"}
        >>> arguments |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
        >>> arguments |= {"log_level": "error", "logging_strategy": "no"}
        >>> def objective(params, report):
        ...     trainer = Trainer(
        ...         model=BertForSequenceClassification(config),
        ...         args=TrainingArguments(f"trial{report.number}", **params, **arguments),
        ...         train_dataset=rows,
        ...         eval_dataset=rows,
        ...         callbacks=[TrainerCallback(report, monitor="eval_loss")],
        ...     )
        ...     trainer.remove_callback(PrinterCallback)
        ...     _ = trainer.train()
        ...     return trainer.evaluate()["eval_loss"]
        >>> space = {"learning_rate": [1e-5, 1e-2]}
        >>> options = {"direction": "minimize", "workers": 1, "verbose": 0}
        >>> study = gputune.search(objective, space, **options)
        >>> study.best_params, study.curves.shape
        ({'learning_rate': 0.01}, (2, 2, 1))
    """

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Return a callback that is also a ``transformers.TrainerCallback``."""
        library = import_extra("transformers", extra="transformers", used_by="TrainerCallback")
        kind: type = cls
        callback: Self = object.__new__(with_bases(kind, library.TrainerCallback))
        return callback

    def __init__(self, report: Callable[[float], object], monitor: str = "eval_loss") -> None:
        super().__init__()
        self._reports = TrainerReports(report, monitor, "transformers")
        self._checkpoints: list[Path] = []
        self._is_training = False

    @property
    def ended(self) -> bool:
        """Whether the search has ended the trial."""
        return self._reports.ended

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the trainer before the training."""
        self._reports.leave_if_ended()
        remedy = (
            "Set CUDA_VISIBLE_DEVICES to one device before PyTorch starts, and do not start the "
            "program with torchrun or accelerate launch."
        )
        self._reports.check_devices(max(1, args.n_gpu) * args.world_size, remedy)
        self._is_training = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any], **kwargs: Any
    ) -> None:
        """Report the metric, and stop the training if the search ends the trial."""
        if not self._is_training:
            self._reports.leave_if_ended()
            return
        if not state.global_step:
            return
        name = self._reports.monitor.removeprefix("eval_")
        how_to_log = f"return {{{name!r}: value}} in compute_metrics and pass monitor='eval_{name}'"
        scores = {key: value for key, value in metrics.items() if not key.endswith(_NO_SCORES)}
        if self._reports.add(scores, how_to_log):
            control.should_training_stop = True
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the checkpoint that the trainer has saved."""
        self._checkpoints.append(Path(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the checkpoints of a trial that the search has ended."""
        self._is_training = False
        self._reports.check_number(
            'Pass eval_dataset= to the Trainer and eval_strategy="epoch" to TrainingArguments.'
        )
        if self.ended:
            for path in self._checkpoints:
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # the folder has other files, or is gone
                Path(args.output_dir).rmdir()
