"""Finds ids in the data that are outside the range of an embedding of a user's module."""

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn

from gputune.data.dataset import Dataset, outermost_rows
from gputune.ground.errors import InputError, option, per_interface
from gputune.modules.module_trial import ModuleTrial
from gputune.modules.pretrained import pretrained_of
from gputune.modules.token_limits import too_long
from gputune.modules.trace import clones
from gputune.population.outputs import call_module, in_mode

_UNSCALED = option("numbers", "none")
_SCALED = " gputune scales the numeric columns of a table. " + per_interface(
    f"Pass a tensor of integers, torch.as_tensor(X), or {_UNSCALED}, which leaves codes unchanged.",
    f"Pass a tensor of integers in a .pt file, or {_UNSCALED}, which leaves codes unchanged.",
)


def check_ids(trial: ModuleTrial, data: Dataset) -> None:
    """Raise InputError if the data has an id outside the range of an embedding.

    The module runs on the rows with the largest and the smallest value of each column. Other
    errors are ignored here, because other checks report them.
    """
    is_pretrained = pretrained_of(trial.builder) is not None
    outermost = set[int]()
    for x, *_ in data.inputs:
        if is_pretrained and x.dim() == 2 and not x.is_floating_point():
            # The columns are the tokens of a text, whose ids belong to one vocabulary. Fewer
            # rows take less time.
            x = torch.stack([x.amin(1), x.amax(1)], 1)
        outermost.update(outermost_rows(x))
    rows = torch.tensor(sorted(outermost), dtype=torch.int64)
    inputs = [x.cpu() for x in data.rows(0, rows.to(data.device))]
    errors = list[InputError]()

    def check(path: str, embedding: nn.Embedding, arguments: tuple[object, ...]) -> None:
        ids = arguments[0]
        size = embedding.num_embeddings
        if (
            not isinstance(ids, Tensor)
            or ids.is_floating_point()
            or ids.dim() == 0
            or ids.numel() == 0
        ):
            return  # the embedding raises an error itself
        number = int(ids.max())
        if number < size:
            number = int(ids.min())
        if 0 <= number < size:
            return
        row = ""
        searched = inputs
        if len(ids) == len(rows):  # otherwise the forward pass has made other rows
            place = int((ids == number).nonzero()[0, 0])
            row = f" in row {int(rows[place])}"
            searched = [x[place] for x in inputs]
        remedy = f"Give it num_embeddings={number + 1} or more."
        base = pretrained_of(trial.builder)
        if base is not None:
            path = path.removeprefix("module.")
            remedy = (
                f"The vocabulary of the pretrained {type(base.base).__name__} does not contain "
                "this id. Check that X comes from the tokenizer of the base, and that the rows "
                "are not too long for it."
            )
        if number < 0:
            remedy = "Give such ids other numbers."
        places = (
            f"{number}{row}, but the embedding {path!r} of {trial.name} has {size} entries, for "
            f"ids 0 to {size - 1}"
        )
        for label, x in zip(data.labels, searched):
            if bool((x == number).any()):
                errors.append(InputError(label, f"has the id {places}", remedy=remedy))
                return
        if base is None and any(x.is_floating_point() for x in searched):
            remedy += _SCALED
        rule = f"The forward pass of {trial.name} computes the id {places}"
        errors.append(InputError(None, rule, remedy=remedy))

    hooks = []
    for path, part in trial.module.named_modules():
        if isinstance(part, nn.Embedding):
            hooks.append(part.register_forward_pre_hook(partial(check, path)))
    if hooks:
        with torch.no_grad(), suppress(Exception):
            module = in_mode(trial.module, training=False)
            call_module(module, clones(inputs), data.names)
    for hook in hooks:
        hook.remove()
    if errors:
        raise too_long(trial.module, inputs, trial.name) or errors[0]
