"""The callback of the transformers Trainer in gputune.search, with a tiny model.

Skipped without transformers and Accelerate, which its Trainer needs.
"""

import pytest
import torch

import gputune
from gputune.executors.worker import TrialEnd
from gputune.integrations.transformers import TrainerCallback
from trial_reports import reporter

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformer_models import tiny_bert  # noqa: E402

EPOCHS = 3
IDS = torch.randint(2, 30, (48, 5), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "labels": ids[0] % 2} for ids in IDS]


def make_trainer(folder, callback, *, lr=1e-2, rows=ROWS, **options):
    torch.manual_seed(0)
    options = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "learning_rate": lr,
        "per_device_train_batch_size": 16,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        **options,
    }
    return transformers.Trainer(
        model=transformers.BertForSequenceClassification(tiny_bert(vocab=30)),
        args=transformers.TrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda e: {"accuracy": (e.predictions.argmax(1) == e.label_ids).mean()},
        callbacks=[callback],
    )


def test_each_evaluation_of_the_training_is_reported(tmp_path):
    report, values = reporter(None)
    callback = TrainerCallback(report)
    assert isinstance(callback, TrainerCallback | transformers.TrainerCallback)
    trainer = make_trainer(tmp_path, callback, eval_on_start=True)
    trainer.train()
    assert len(values) == EPOCHS and not callback.ended
    assert trainer.evaluate()["eval_loss"] == values[-1] < values[0]
    assert len(values) == EPOCHS  # only evaluations of the training
    assert len(list(tmp_path.glob("checkpoint-*"))) == EPOCHS


@pytest.mark.parametrize("best", [False, True])
def test_an_ended_trial_ends_the_training_and_leaves_no_checkpoint(tmp_path, best):
    report, values = reporter(2)
    callback = TrainerCallback(report, monitor="eval_accuracy")
    folder = tmp_path / "trial"
    trainer = make_trainer(folder, callback, load_best_model_at_end=best)
    assert trainer.train().global_step == 2 * 3
    assert callback.ended and len(values) == 2
    assert not folder.exists()
    # an objective that goes on with the trainer is left
    with pytest.raises(TrialEnd):
        trainer.evaluate()
    with pytest.raises(TrialEnd):
        trainer.train()
    assert len(values) == 2


@pytest.mark.long
def test_the_callback_in_a_search_that_prunes(tmp_path):
    def objective(params, report):
        folder = tmp_path / str(report.number)
        trainer = make_trainer(folder, TrainerCallback(report), lr=params["lr"])
        trainer.train()
        return trainer.evaluate()["eval_loss"]

    study = gputune.search(
        objective,
        {"lr": [1e-2, 1e-6]},
        direction="minimize",
        method=gputune.Halving(factor=2, min_epochs=1),
        max_epochs=EPOCHS,
        workers=1,
        verbose=0,
    )
    assert {trial.state for trial in study.trials} == {"complete", "pruned"}
    for trial in study.trials:
        kept = list((tmp_path / str(trial.number)).glob("checkpoint-*"))
        assert len(kept) == (EPOCHS if trial.state == "complete" else 0)


def test_a_metric_that_the_evaluation_lacks(tmp_path):
    message = (
        r"monitor='accuracy' names a metric that the validation did not log. It logged "
        r"'eval_loss', 'eval_accuracy'. Did you mean 'eval_accuracy'\? Pass one of the logged names, "
        r"or log the metric: return {'accuracy': value} in compute_metrics and pass "
        r"monitor='eval_accuracy'."
    )
    trainer = make_trainer(tmp_path, TrainerCallback(print, monitor="accuracy"))
    with pytest.raises(gputune.InputError, match=message):
        trainer.train()


def test_the_epoch_is_no_metric(tmp_path):
    trainer = make_trainer(tmp_path, TrainerCallback(print, monitor="epoch"))
    with pytest.raises(gputune.InputError, match="monitor='epoch' names a metric that the valida"):
        trainer.train()


def test_a_training_without_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, TrainerCallback(print), eval_strategy="no", max_steps=1)
    with pytest.raises(gputune.InputError, match=r"trained without a validation.*eval_strategy="):
        trainer.train()


def test_a_trainer_with_several_devices(tmp_path):
    trainer = make_trainer(tmp_path, TrainerCallback(print))
    trainer.args._n_gpu = 2
    with pytest.raises(gputune.InputError, match="This transformers Trainer uses 2 devices"):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
