"""Advice on arguments of the trainers of Lightning and transformers that gputune lacks."""

from collections.abc import Mapping

TRAINER_KEYS: Mapping[str, str] = {
    **dict.fromkeys(("per_device_train_batch_size", "train_batch_size"), "batch_size"),
    **dict.fromkeys(("gradient_clip_val", "max_grad_norm"), "clip_norm"),
    "adam_beta2": "beta2",
    "label_smoothing_factor": "loss__label_smoothing",
}
"""Hyperparameters of a trainer, and the keys of the space for them."""

_EPOCHS = "gputune counts epochs. Pass max_epochs."
_VALIDATION = (
    "Pass all rows as X and y, and the positions of the training and validation rows as "
    "cv=(train, valid)."
)
_SCORING = (
    "gputune computes the validation scores itself. Pass scoring, such as scoring='accuracy' or "
    "scoring='neg_log_loss'."
)
_TRAINER = "tune trains without a trainer. To keep the trainer, call it in the objective of gputune.search."
_DATA = "Pass the dataset as X."
_DEVICE = "Pass device, such as device='cuda'."

TRAINER_ADVICE: Mapping[str, str] = {
    "num_train_epochs": "Pass max_epochs.",
    **dict.fromkeys(("max_steps", "num_steps"), _EPOCHS),
    **dict.fromkeys(
        ("early_stopping", "early_stopping_patience"), "Pass patience, a number of epochs."
    ),
    "max_time": "Pass timeout, such as timeout='5m'.",
    **dict.fromkeys(("monitor", "compute_metrics", "metric_for_best_model"), _SCORING),
    **dict.fromkeys(("accelerator", "devices", "use_cpu", "num_nodes", "gpus"), _DEVICE),
    **dict.fromkeys(
        ("train_dataset", "train_dataloaders", "train_dataloader", "datamodule"), _DATA
    ),
    **dict.fromkeys(("eval_dataset", "val_dataloaders", "validation_data"), _VALIDATION),
    **dict.fromkeys(("trainer", "args", "strategy", "eval_strategy"), _TRAINER),
    **dict.fromkeys(("fp16", "bf16"), "Pass precision='bf16'."),
    **dict.fromkeys(("logger", "report_to"), "Pass a logger of gputune in callbacks."),
    **dict.fromkeys(("default_root_dir", "output_dir"), "Pass the path of a study file as study."),
    "lr_scheduler_type": "Pass schedule, such as schedule='linear'.",
    **dict.fromkeys(("warmup_steps", "warmup_ratio"), "Pass schedule='warmup+cosine'."),
}
"""Sentences on the arguments of a trainer that gputune lacks."""
