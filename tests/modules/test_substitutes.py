"""What is put in the place of an operation of PyTorch's gives its numbers, and its derivatives."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn import functional

from gputune.modules.substitutes import Substitutes

PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
LATER = torch.ones(5, 5, dtype=torch.bool).triu(1)


@pytest.mark.parametrize("more", [{}, {"scale": 0.3}, {"is_causal": True}, {"dropout_p": 0.4}, {"attn_mask": True}])
def test_attention(more):
    query, key, value = torch.randn(3, 2, 4, 5, 8, dtype=torch.float64)
    if "attn_mask" in more:
        more = {"attn_mask": torch.rand(5, 5) > 0.2}
    torch.manual_seed(0)
    expected = functional.scaled_dot_product_attention(query, key, value, **more)
    torch.manual_seed(0)
    with Substitutes():
        found = functional.scaled_dot_product_attention(query, key, value, **more)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("error")  # torch warns of what it maps by a loop
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDING}, {"src_mask": LATER, "is_causal": True}])
@pytest.mark.parametrize("training", [False, True])
def test_a_transformer_is_mapped_over_members(training, masks):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2 if training else 0.0, batch_first=True).double()
    layer.train(training)
    params = {k: w.detach() for k, w in layer.named_parameters()}
    members = {k: torch.stack([w, 2 * w]) for k, w in params.items()}
    x = torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(own):
        return torch.func.functional_call(layer, own, (x,), masks).square().sum()

    torch.manual_seed(0)
    with Substitutes():
        found = vmap(grad(loss), randomness="same")(members)
    for c in range(2):
        torch.manual_seed(0)
        expected = grad(loss)({k: w[c] for k, w in members.items()})
        for name, slope in expected.items():
            torch.testing.assert_close(found[name][c], slope, rtol=1e-9, atol=1e-9)
