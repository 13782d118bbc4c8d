"""LoRA of gputune against PEFT: trained members, and saved adapters. Skipped without transformers
and peft."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import gputune
from gputune.data.dataset import Fold
from gputune.ground.seeding import keyed_draws, stream
from gputune.modules.inspection import traits_of
from gputune.modules.module import StackedModule
from problems import fill, make_data, shape_of, train_modules

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import transformer_models  # noqa: E402

# peft reads an old name of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
CLASSES = 4
WIDTH = 32
CONFIGS = fill(
    {"rank": 2, "alpha": 8, "lr": 3e-3, "weight_decay": 0.0, "batch_size": 4},
    {"rank": 4, "alpha": 32, "lr": 1e-3, "weight_decay": 0.1, "batch_size": 4},
    {"rank": 8, "alpha": 8, "lr": 2e-3, "weight_decay": 0.01, "batch_size": 4},
    {"rank": 16, "alpha": 16, "lr": 3e-4, "weight_decay": 0.3, "batch_size": 4},
)
# the function that builds the model, the targets of a LoRA, and the name of the head
MODELS = {
    "bert": (transformer_models.bert, ["query", "value", "dense"], "classifier"),
    "gpt2": (transformer_models.gpt2, ["c_attn", "c_proj", "c_fc"], "score"),
    "llama": (transformer_models.llama, "all-linear", "score"),
    "distilbert": (transformer_models.distilbert, ["q_lin", "lin2"], "classifier"),
    "vit": (transformer_models.vit, r".*layers?\..*(q_proj|v_proj|fc\d)", "classifier"),
}
TRAINED = ("bert", "gpt2", "llama", "vit")


def make(name, dtype, rows=20, p=0.0):
    """A base with random weights, its targets, its head, and data of its kind in one fold."""
    torch.manual_seed(0)
    make_model, targets, head = MODELS[name]
    base = make_model(p, WIDTH, CLASSES).to(dtype)
    draws = torch.Generator().manual_seed(1)
    y = torch.randint(CLASSES, (rows,), generator=draws)
    if name == "vit":
        inputs = {"pixel_values": torch.randn(rows, 3, 8, 8, generator=draws).to(dtype)}
    else:
        ids = torch.randint(2, 50, (rows, 8), generator=draws)
        lengths = torch.randint(4, 9, (rows,), generator=draws)
        mask = (torch.arange(8) < lengths[:, None]).long()
        inputs = {"input_ids": ids * mask, "attention_mask": mask}
    return base, targets, head, inputs, y


def dataset_of(inputs, y, dtype):
    """One fold with all rows; the inputs are passed by name."""
    data = make_data(n=len(y), k=CLASSES, folds=1, dtype=dtype)
    whole = torch.arange(len(y))
    return replace(
        data,
        inputs=tuple(x[None] for x in inputs.values()),
        scaling=(None,) * len(inputs),
        names=tuple(inputs),
        y=y,
        folds=(Fold(train=whole, valid=whole),),
    )


def peft_alone(base, targets, head, inputs, y, config, start, epochs, moved=0.0):
    """The logits after a plain training loop with PEFT, whose A begins as the member's."""
    rank = config["rank"]
    model = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(
            r=rank,
            lora_alpha=config["alpha"],
            target_modules=targets,
            modules_to_save=[head],
            fan_in_fan_out=targets == ["c_attn", "c_proj", "c_fc"],  # Conv1D
            task_type="SEQ_CLS" if targets == "all-linear" else None,
        ),
    )
    with torch.no_grad():
        for name, part in model.base_model.model.named_modules():
            if hasattr(part, "lora_A"):
                A = start[f"module.{name}.A"][:, :rank].T
                part.lora_A["default"].weight.copy_(A + moved * torch.randn(A.shape))
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config["lr"], weight_decay=config["weight_decay"])
    model.train()
    for epoch in range(epochs):
        generator = stream(0, "rows", len(y), epoch)
        order = torch.randperm(len(y), generator=generator)
        for step, rows in enumerate(order.split(config["batch_size"])):
            optimizer.zero_grad()
            # dropout of the base draws as in gputune
            with keyed_draws(torch.device("cpu"), 0, "dropout", epoch, step):
                logits = model(**{name: x[rows] for name, x in inputs.items()}).logits
            functional.cross_entropy(logits, y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return model.eval()(**inputs).logits


@pytest.mark.parametrize(
    ("name", "dtype", "p"),
    [
        *[(*case, 0.0) for case in itertools.product(TRAINED, [torch.float64, torch.float32])],
        ("bert", torch.float64, 0.1),
        pytest.param("gpt2", torch.float64, 0.1, marks=pytest.mark.long),
    ],
)
def test_members_equal_peft_alone(name, dtype, p):
    base, targets, head, inputs, y = make(name, dtype, p=p)
    data = dataset_of(inputs, y, dtype)
    builder = gputune.lora(base, targets=targets, modules_to_save=[head])
    traits = traits_of(builder, CONFIGS[0], data)
    assert traits.common_rows and not traits.unstackable
    start = StackedModule(builder, CONFIGS, shape_of(data), seed=0, traits=traits).starts()[0]
    epochs = 3 if p else 10  # 15 or 50 steps
    trained = train_modules(StackedModule, builder, CONFIGS, data, epochs, backend="recorded")
    for c, config in enumerate(CONFIGS):
        words = (base, targets, head, inputs, y, config, start, epochs)
        expected = peft_alone(*words)
        with torch.no_grad():
            logits = trained.member(0, c)(**inputs)
        difference = float((logits - expected).abs().max() / expected.abs().max())
        if dtype == torch.float64:
            assert difference < 1e-10, (name, c)
        elif difference >= 1e-4:
            # The control: the path of PEFT itself is chaotic if a start that moves by 1e-7 moves
            # its result by as much.
            control = (peft_alone(*words, moved=1e-7) - expected).abs().max()
            assert difference < 10 * float(control / expected.abs().max()), (name, c)


@pytest.mark.parametrize("name", TRAINED)
def test_peft_loads_a_saved_adapter_and_predicts_the_same(name, tmp_path):
    base, targets, head, inputs, y = make(name, torch.float32)
    builder = gputune.lora(base, targets=targets, modules_to_save=[head])
    space = {"rank": [2, 4], "alpha": [8], "rslora": [True], "lr": [1e-2], "batch_size": [4]}
    words = {"n_trials": 2, "max_epochs": 2, "verbose": 0, "cv": 2, "random_state": 0}
    study = gputune.tune(builder, inputs, y, space=space, **words)
    model = study.best_model()
    model.save_adapter(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = loaded(**inputs).logits
        logits = model.module(**inputs)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.argmax(1), expected.argmax(1))


def token_bert():
    config = transformer_models.tiny_bert(CLASSES, vocab=50, width=WIDTH)
    return transformers.BertForTokenClassification(config), ["query"], "classifier"


@pytest.mark.parametrize("heads", [None, (), ["pooler"]])
@pytest.mark.parametrize("name", ["bert", "distilbert", "vit"])
def test_peft_loads_an_adapter_with_any_modules_to_save(name, heads, tmp_path):
    torch.manual_seed(0)
    make_model, targets, _ = MODELS[name]
    base = make_model(0.0, WIDTH, CLASSES)
    if name != "bert" and heads:
        pytest.skip("only BERT has a pooler")
    draws = torch.Generator().manual_seed(1)
    y = torch.arange(20) % CLASSES
    if name == "vit":
        inputs = {"pixel_values": torch.randn(20, 3, 8, 8, generator=draws)}
    else:
        inputs = {"input_ids": torch.randint(50, (20, 8), generator=draws)}
    builder = gputune.lora(base, targets=targets, modules_to_save=heads)
    space = {"rank": [2], "lr": [1e-2], "batch_size": [4]}
    words = {"n_trials": 1, "max_epochs": 1, "verbose": 0, "cv": 2, "space": space}
    study = gputune.tune(builder, inputs, y, **words)
    model = study.best_model()
    expected_names = {
        "bert": {None: "classifier", (): "", ("pooler",): "bert.pooler"},
        "distilbert": {None: "pre_classifier, classifier", (): ""},
        "vit": {None: "", (): ""},
    }[name][heads if heads is None else tuple(heads)]
    expected_note = f"gputune trains as a whole: {expected_names}"
    if not expected_names:
        expected_note = f"only the adapters of {type(base).__name__} train; modules_to_save names"
    assert any(expected_note in note for note in study.record.notes), study.record.notes
    trained = {path.removeprefix("module.") for path in model.module.trained}
    assert trained == set(filter(None, expected_names.split(", ")))
    model.save_adapter(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = loaded(**inputs).logits
        logits = model.module(**inputs)
        untuned = base.eval()(**inputs).logits
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert (logits - expected).abs().max() * 10 < (logits - untuned).abs().max()
    model.save(tmp_path / "model")
    again = gputune.load_model(tmp_path / "model", base=base)
    assert (again.predict(inputs) == model.predict(inputs)).all()


def test_peft_trains_the_same_modules_by_default():
    token_bert = transformers.BertForTokenClassification(make("bert", torch.float32)[0].config)
    for name, base, task in (
        ("bert", make("bert", torch.float32)[0], "SEQ_CLS"),
        ("distilbert", transformer_models.distilbert(0.0, WIDTH, CLASSES), "SEQ_CLS"),
        ("bert", token_bert, "TOKEN_CLS"),
    ):
        targets = MODELS[name][1]
        with_peft = peft.get_peft_model(
            copy.deepcopy(base), peft.LoraConfig(task_type=task, target_modules=targets)
        )
        expected = set()
        for path, part in with_peft.base_model.model.named_modules():
            if hasattr(part, "modules_to_save"):
                expected.add(path)
        trained = gputune.lora(base, targets=targets)().trained
        assert {path.removeprefix("module.") for path in trained} == expected


def test_the_configuration_of_an_adapter_has_the_values_of_its_trial(tmp_path):
    base, targets, _, inputs, y = make("bert", torch.float32)
    builder = gputune.lora(base, targets=targets)
    space = {"rank": [3], "alpha": [8], "rslora": [True], "dropout": [0.1], "batch_size": [4]}
    words = {"n_trials": 1, "max_epochs": 1, "verbose": 0, "cv": 2, "space": space}
    model = gputune.tune(builder, inputs, y, **words).best_model()
    model.save_adapter(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert (config.r, config.lora_alpha) == (3, 8)
    assert config.use_rslora and config.lora_dropout == 0.1
    assert config.task_type == "SEQ_CLS"
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(model.module(**inputs), loaded(**inputs).logits, rtol=1e-4, atol=1e-5)
