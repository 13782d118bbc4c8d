"""Each of the common operations trains in the backend of its table, and equals a plain PyTorch loop
in every backend that can train it.
"""

import pytest

from gputune.native import library as built
from operations import OPERATIONS, PAGE, page
from trained_operations import check

pytestmark = pytest.mark.skipif(built.find_compiler() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def soon_built(monkeypatch):
    monkeypatch.setattr(built, "FLAGS", ("-O0", *built.FLAGS[1:]))


# one of each kind of code; the others run with --all
SHORT = """
nn.ReLU6 nn.PReLU nn.SiLU nn.GLU nn.LogSigmoid x.max(-1) F.normalize torch.cumprod torch.topk F.pad
torch.cdist nn.Bilinear nn.GroupNorm weight_norm nn.EmbeddingBag nn.PixelShuffle nn.HuberLoss()
nn.CrossEntropyLoss(weight) nn.MultiMarginLoss() lion ema nn.RReLU torch.fft.rfft
""".split()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SHORT else pytest.mark.long) for n in OPERATIONS],
)
def test_an_operation_trains_in_its_backend(name, monkeypatch):
    check(OPERATIONS[name], monkeypatch)


def test_the_page_shows_the_backend_of_each_operation():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/operations.py"
