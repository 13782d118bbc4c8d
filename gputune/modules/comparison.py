"""Compares stacked members of a user's module with plain modules, on two minibatches.

A member is one trial on one fold. The gradients, buffers and outputs of stacked members must equal
those of plain modules up to rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gputune.ground.device import CPU
from gputune.ground.errors import InputError
from gputune.ground.seeding import keyed_draws
from gputune.ground.types import Params, StepKey
from gputune.modules.calls import state_of
from gputune.modules.draw_watch import Trail
from gputune.modules.failures import StackedError
from gputune.modules.module import StackedModule
from gputune.modules.module_trial import ModuleTrial, is_close
from gputune.population.batches import Batch
from gputune.population.outputs import in_mode
from gputune.scoring.objective import Objective

DIFFERS = "for stacked members than for single members"
"""Part of the reason why members cannot be stacked if their results differ."""

_KEY = (0, 0)  # (epoch, step) of the tried minibatches
_EVALUATION = (0, 0, 0)  # the key of the tried evaluation
_VMAP = "Members are stacked with torch.func.vmap"
_ADVICE = {
    (".item()", "data-dependent", "as_tensor"): (
        "which cannot read a tensor's value in Python: use torch.where instead of if or .item()"
    ),
    ("inplace",): "which cannot write into that tensor: write x = x + y instead of x += y",
    ("dynamic", "nonzero"): (
        "which needs results of a fixed size: use torch.where instead of a mask as an index"
    ),
}
"""Maps parts of vmap's error messages to advice: the unsupported operation and its replacement."""


def differences(stacked: StackedModule, trial: ModuleTrial) -> tuple[str, tuple[str, ...]]:
    """Return how two stacked members differ from plain modules, or "", and the parameters that a
    step does not use."""
    stacked.checks_use = False  # which parameters a step uses is not known yet
    flat = stacked.start()
    parameters = flat[: stacked.trained.size]
    # make the two members differ
    parameters += 0.01 * torch.linspace(-1, 1, len(parameters), dtype=flat.dtype)
    params = stacked.blocks.views(flat)
    expected = [_plain_results(stacked, stacked.member(params, 0, c), trial) for c in range(2)]
    trail = Trail(stacked.template)
    try:
        with trail.following():
            outputs, gradients, buffers = _stacked_results(stacked, flat, trial)
    except StackedError as error:
        return error.rule, ()
    except InputError:
        raise
    except Exception as error:
        # only the first sentence: the rest is for torch's developers
        says = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        return f"{trail.submodule or 'its forward'} says: {says}. {_advice(says)}", ()
    unused = set(stacked.trainable)
    rounding = _rounding_of(stacked.template)
    for c, (plain_outputs, plain_gradients, plain_buffers) in enumerate(expected):
        for stacked_step, plain_step in zip(gradients, plain_gradients):
            unused -= plain_step.keys()
            pairs = []
            for name, gradient in stacked_step.items():
                zero = torch.zeros_like(gradient[0, c])
                pairs.append((gradient[0, c], plain_step.get(name, zero)))
            if not _all_close(pairs, rounding):
                return f"it has another gradient {DIFFERS}", ()
        buffer_pairs = [(w[0, c], plain_buffers[name]) for name, w in buffers.items()]
        if not _all_close(buffer_pairs, rounding):
            return f"it has other buffers after a step {DIFFERS}", ()
        output_pair = outputs[c], plain_outputs.view(outputs[c].shape)
        if not (is_close(*output_pair) or (rounding > 1 and _all_close([output_pair], rounding))):
            return f"it gives other outputs {DIFFERS}", ()
    return "", tuple(name for name in stacked.trainable if name in unused)


def _plain_results(
    stacked: StackedModule, module: nn.Module, trial: ModuleTrial
) -> tuple[Tensor, list[Params], Params]:
    """Return the outputs, gradients and state of a plain module that trains on two minibatches.

    The outputs are computed after training. There are gradients for each minibatch. The state has
    the tensors that changed. Parameters that a step does not use have no gradient.
    """
    objective = stacked.objective
    names = trial.shape.names
    gradients = []
    for rows in minibatches(trial):
        backward(trial, module, objective, rows, _KEY)
        gradients.append({k: w.grad for k, w in module.named_parameters() if w.grad is not None})
        module.zero_grad()
    with torch.no_grad(), keyed_draws(CPU, 0, "evaluation", *_EVALUATION):
        outputs = objective.outputs(in_mode(module, training=False), trial.inputs, names)
    return outputs, gradients, state_of(module, stacked.mutable)


def backward(
    trial: ModuleTrial, module: nn.Module, objective: Objective, rows: slice, key: StepKey
) -> None:
    """Add the gradients of one training step of a plain module to its parameters."""
    inputs = trial.augmented(rows)
    with torch.enable_grad(), keyed_draws(CPU, 0, "dropout", *key):
        module = in_mode(module, training=True)
        losses = objective.losses(
            module, inputs, trial.y[rows], trial.config, names=trial.shape.names
        )
        losses.mean().backward()  # type: ignore[no-untyped-call]


def _stacked_results(
    stacked: StackedModule, flat: Tensor, trial: ModuleTrial
) -> tuple[Tensor, list[Params], Params]:
    """Return the outputs, the gradients and the state of two stacked members.

    Outputs are (2 members, B rows, ...). Other tensors are (1 fold, 2 trials, ...).
    """
    params = stacked.blocks.views(flat)
    gradients: list[Params] = []
    with torch.no_grad():
        for rows in minibatches(trial):
            grads = stacked.trained.views(torch.zeros(stacked.trained.size).to(flat))
            y = trial.y[rows]
            batch = Batch(
                tuple(x[None, rows] for x in trial.inputs), y[None], 1 / len(y), slice(0, 1), _KEY
            )
            if not gradients:
                with keyed_draws(CPU, 0, "check"):
                    stacked.plain_losses(batch)  # it must leave no state behind
            stacked.gradient(params, batch, grads)
            gradients.append(grads)
        outputs = stacked.outputs(params, 0, trial.inputs, _EVALUATION)
    return outputs, gradients, {k: params[k] for k in stacked.mutable}


def minibatches(trial: ModuleTrial) -> tuple[slice, slice]:
    """Return the row slices of two minibatches. The second is shorter if there are enough rows."""
    n = len(trial.y)
    return slice(0, n), slice(0, max(min(n, 2), 2 * n // 3))


def _rounding_of(module: nn.Module) -> float:
    """Return the factor by which results may differ more than in single precision: 1, or more for
    frozen parameters in 16 bits."""
    coarse = (torch.bfloat16, torch.float16)
    return 50.0 if any(w.dtype in coarse for w in module.parameters()) else 1.0


def _all_close(pairs: Sequence[tuple[Tensor, Tensor]], rounding: float) -> bool:
    """Return whether pairs of tensors are equal up to rounding, relative to the largest value in
    any pair."""
    largest = 0.0
    for _, b in pairs:
        if b.numel():
            largest = max(largest, float(b.double().nan_to_num(0.0, 0.0, 0.0).abs().max()))
    for a, b in pairs:
        a = a.double().view(b.shape)
        rtol = rounding * 1e-3
        atol = rounding * 1e-4 * largest
        if not torch.allclose(a, b.double(), rtol=rtol, atol=atol, equal_nan=True):
            return False
    return True


def _advice(message: str) -> str:
    """Return advice for a vmap error: the unsupported operation, and its replacement."""
    for parts, advice in _ADVICE.items():
        if any(part in message for part in parts):
            return f"{_VMAP}, {advice}"
    return f"{_VMAP}, which does not support this operation"
