"""Layers mapped over members are the layers of each member: outputs, derivatives of both orders, running statistics."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from gputune.modules.mapped import Mapped

MEMBERS = 3

LAYERS = {
    "vectors": (nn.Linear(4, 3), (4,)),
    "rows": (nn.Linear(4, 3, bias=False), (5, 4)),
    "sequences": (nn.Linear(4, 3), (2, 5, 4)),
    "sequences, turned": (nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 3)), (5, 8)),
    "layer norm": (nn.LayerNorm((2, 4)), (5, 3, 2, 4)),
    "layer norm of a vector": (nn.LayerNorm(4, elementwise_affine=False), (4,)),
    "group norm": (nn.GroupNorm(2, 4), (5, 4)),
    "group norm of images": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4, affine=False)), (5, 2, 3, 3)),
    "conv1d": (nn.Conv1d(4, 6, 3, groups=2, stride=2), (5, 4, 9)),
    "conv2d": (nn.Conv2d(2, 4, 3, padding="same", padding_mode="zeros"), (5, 2, 6, 7)),
    "conv2d of one image": (nn.Conv2d(2, 4, 3, bias=False), (2, 6, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, dilation=2), (5, 2, 4, 4, 4)),
    "pools": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(2), nn.AvgPool2d(2)), (5, 2, 9, 9)),
    "pools of one image": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.MaxPool2d(3, 1), nn.AvgPool2d(2)), (2, 9, 9)),
    "a mean": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(1)), (5, 2, 5, 5)),
    "batch norm": (nn.BatchNorm1d(4), (5, 4)),
    "batch norm in evaluation": (nn.BatchNorm1d(4).eval(), (5, 4)),
    "batch norm of images": (nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
    "batch norm alone": (nn.BatchNorm1d(4, track_running_stats=False), (5, 4, 3)),
}


def computed(layer: nn.Module, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    held = {name: tensor + 0 for name, tensor in tensors.items()}  # what a layer writes into
    return functional_call(layer, held, (x,)), {k: held[k] for k in dict(layer.named_buffers())}


@pytest.mark.parametrize("name", LAYERS)
def test_a_mapped_layer_is_that_of_each_member(name):
    layer, shape = LAYERS[name]
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randn(MEMBERS, *shape, dtype=torch.float64, requires_grad=True)
    tensors = {k: torch.stack([t.detach() + 0.1 * m for m in range(MEMBERS)]) for k, t in layer.state_dict().items()}
    leaves = [x, *(t.requires_grad_() for k, t in tensors.items() if k in dict(layer.named_parameters()))]

    def results(mapped: bool) -> list[Tensor]:
        if mapped:
            with Mapped():
                outputs, after = vmap(lambda own, rows: computed(layer, own, rows))(tensors, x)
        else:
            each = [computed(layer, {k: t[m] for k, t in tensors.items()}, x[m]) for m in range(MEMBERS)]
            outputs = torch.stack([one for one, _ in each])
            after = {k: torch.stack([buffers[k] for _, buffers in each]) for k in each[0][1]}
        slopes = torch.autograd.grad(outputs.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(s.pow(2).sum() for s in slopes), leaves)
        return [outputs, *slopes, *second, *after.values()]

    for found, expected in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_running_statistics_are_written_where_members_have_their_own():
    x, means, variance = torch.randn(MEMBERS, 5, 4), torch.zeros(4, MEMBERS), torch.ones(4)
    with Mapped():
        vmap(lambda rows, mean: functional.batch_norm(rows, mean, variance, training=True), in_dims=(0, 1))(x, means)
    torch.testing.assert_close(means.T, 0.1 * x.mean(1))
    assert torch.equal(variance, torch.ones(4))


def test_the_row_of_an_embeddings_padding_has_no_gradient():
    ids, weights = torch.tensor([[0, 3, 1], [3, 3, 2]]), torch.randn(MEMBERS, 4, 2, requires_grad=True)
    with Mapped():
        found = vmap(lambda weight: functional.embedding(ids, weight, -1))(weights)
    expected = torch.stack([functional.embedding(ids, weight, 3) for weight in weights])
    slopes = [torch.autograd.grad(outputs.sin().sum(), weights)[0] for outputs in (found, expected)]
    assert torch.equal(found, expected) and torch.equal(*slopes) and not slopes[0][:, 3].any()


def test_weights_that_all_members_share_are_mapped_as_torch_does():
    weight, x = torch.randn(3, 4), torch.randn(MEMBERS, 5, 4)
    indices = functional.max_pool2d(x[None], 2, return_indices=True)[1]
    with Mapped():
        assert torch.equal(vmap(lambda rows: functional.linear(rows, weight))(x), functional.linear(x, weight))
        assert torch.equal(
            vmap(lambda rows: functional.max_pool2d(rows[None], 2, return_indices=True)[1])(x)[:, 0], indices[0]
        )
        assert torch.equal(functional.linear(x, weight), x @ weight.T)
