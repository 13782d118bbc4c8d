"""Inputs that are no table: what is taken for one, how it is checked and scaled, and what a prediction must bring."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from gputune.data.arrays import (
    ArrayLayout,
    ArrayStatistics,
    as_arrays,
    fit_channels,
    read_array_file,
    read_dataset,
)
from gputune.data.dataset import encode
from gputune.data.source import fingerprint, read_source
from gputune.errors import InputError

IMAGES = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).view(6, 2)


@pytest.mark.parametrize(
    ("X", "parts", "names"),
    [
        (IMAGES, 1, None),
        (IMAGES.numpy(), 1, None),
        (IDS, 1, None),
        ((IDS, torch.rand(6, 2)), 2, None),
        ({"ids": IDS[:, 0], "image": IMAGES.numpy()}, 2, ("ids", "image")),
    ],
)
def test_arrays_are_taken_as_they_are(X, parts, names):
    arrays = as_arrays(X)
    assert (len(arrays), len(arrays.parts), arrays.names) == (6, parts, names)
    assert arrays.select(np.array([4, 1])).parts[0].equal(arrays.parts[0][[4, 1]])


@pytest.mark.parametrize(
    "X", [torch.rand(6, 2), np.zeros((6, 2)), np.arange(12).reshape(6, 2), [[1, 2]], "file"]
)
def test_a_table_is_no_array(X):
    assert as_arrays(X) is None


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ({}, "X is empty"),
        ((IDS, IMAGES[:4]), r"one row for each of the same cases, got lengths X\[0\] 6, X\[1\] 4"),
        (np.full((2, 2, 2), "a"), "X must hold numbers or booleans, got <U1"),
        ({"a": IMAGES.to_sparse()}, r"X\['a'\] is a sparse tensor"),
        (IMAGES.to(torch.complex64), "must hold real numbers, got torch.complex64"),
        (torch.empty(0, 2, 2), r"none of its axes may be empty, got shape \(0, 2, 2\)"),
        (IMAGES.where(IMAGES[3, 0, 1, 1] != IMAGES, torch.nan), "got NaN or an infinite value in row 3"),
    ],
)
def test_bad_arrays_are_refused(X, message):
    with pytest.raises(InputError, match=message):
        as_arrays(X)


def test_a_file_mapped_into_memory_is_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    tensor = as_arrays(mapped).parts[0]
    assert tensor.data_ptr() == mapped.ctypes.data


def test_a_digest_tells_inputs_apart():
    y = np.array([0, 1] * 3)
    digests = {
        fingerprint(as_arrays(X), y)["sha256"]
        for X in (IMAGES, IMAGES.double(), IMAGES + 1, (IMAGES, IDS), {"a": IMAGES, "b": IDS})
    }
    assert len(digests) == 5


class TestFiles:
    def test_arrays_by_name(self, tmp_path):
        np.savez(tmp_path / "d.npz", image=IMAGES.numpy(), label=np.arange(6) % 2)
        torch.save({"image": IMAGES, "label": torch.arange(6) % 2}, tmp_path / "d.pt")
        for name in ("d.npz", "d.pt"):
            source = read_source(tmp_path / name, "label", module=True)
            assert torch.equal(source.X.parts[0], IMAGES) and source.X.names is None
            assert source.origin == {"path": str(tmp_path / name), "target": "label", "groups": None}

    def test_several_inputs_are_keywords(self, tmp_path):
        np.savez(
            tmp_path / "d.npz",
            image=IMAGES.numpy(),
            ids=IDS.numpy(),
            label=np.arange(6) % 2,
            who=np.arange(6),
        )
        source = read_source(tmp_path / "d.npz", "label", "who", module=True)
        assert source.X.names == ("image", "ids") and source.groups.tolist() == [0, 1, 2, 3, 4, 5]

    @pytest.mark.parametrize(
        ("y", "groups", "message"),
        [
            ("lable", None, "y must name one of the arrays of .*, which are 'image', 'label', got 'lable'"),
            ("label", "who", "groups must name one of the arrays"),
        ],
    )
    def test_names_are_checked(self, tmp_path, y, groups, message):
        np.savez(tmp_path / "d.npz", image=IMAGES.numpy(), label=np.arange(6))
        with pytest.raises(InputError, match=message):
            read_source(tmp_path / "d.npz", y, groups, module=True)

    def test_only_a_target(self, tmp_path):
        np.savez(tmp_path / "d.npz", label=np.arange(6))
        with pytest.raises(InputError, match="no array but the target 'label'"):
            read_source(tmp_path / "d.npz", "label", module=True)

    def test_what_is_no_array_is_not_unpickled(self, tmp_path):
        np.savez(tmp_path / "d.npz", a=np.array([{}], dtype=object))
        torch.save([1, 2], tmp_path / "d.pt")
        (tmp_path / "e.pt").write_bytes(b"PK nothing")
        for name, message in [
            ("d.npz", "cannot be read as arrays"), ("d.pt", "a dict of tensors, got list"), ("e.pt", "cannot be read")
        ]:  # fmt: skip
            with pytest.raises(InputError, match=message):
                read_array_file(tmp_path / name)


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


class TestDatasets:
    def test_pairs(self):
        X, y = read_dataset(TensorDataset(IMAGES, torch.arange(6)), None)
        assert torch.equal(X, IMAGES) and y.tolist() == [0, 1, 2, 3, 4, 5]

    def test_named_inputs(self):
        X, _ = read_dataset(Items([({"a": IDS[i], "b": IMAGES[i]}, i) for i in range(6)]), None)
        assert torch.equal(X["a"], IDS) and torch.equal(X["b"], IMAGES)

    def test_inputs_alone_with_a_target_beside_them(self):
        X, y = read_dataset(TensorDataset(IMAGES), [0, 1])
        assert torch.equal(X, IMAGES) and y == [0, 1]

    @pytest.mark.parametrize(
        ("dataset", "message"),
        [
            (
                Stream(),
                "Stream, which has no length; pass a map-style Dataset",
            ),
            (Items([(torch.zeros(2, 2), 0), (torch.zeros(2, 3), 1)]), "cannot be stacked"),
            (Items([torch.zeros(2, 2)] * 3), "are no pairs"),
        ],
    )
    def test_bad_ones_are_refused(self, dataset, message):
        with pytest.raises(InputError, match=message):
            read_dataset(dataset, None)


class TestScaling:
    @pytest.mark.parametrize("row", [(3,), (4, 5), (3, 4, 5)])
    def test_training_rows_have_mean_0_and_variance_1(self, row):
        x = torch.randn(40, *row, generator=torch.Generator().manual_seed(1)).mul(3).add(100).float()
        train = np.arange(30)
        statistics = fit_channels(as_arrays((x,)), [train, np.arange(10, 40)], "standard")
        (scaled,) = encode(as_arrays((x,)), ArrayLayout.of(as_arrays((x,))), statistics[0], torch.float64)
        axes = {1: 0, 2: (0, 1, 2), 3: (0, 2, 3)}[len(row)]
        part = scaled[train].numpy()
        np.testing.assert_allclose(part.mean(axes), 0, atol=1e-6)
        np.testing.assert_allclose(part.std(axes), 1, atol=1e-6)

    def test_a_constant_channel_is_only_centred_and_integers_stay(self):
        x = torch.ones(8, 2, 3, 3)
        x[:, 1] = torch.randn(8, 3, 3)
        (statistics,) = fit_channels(as_arrays((x, IDS[:1].expand(8, 2))), [np.arange(8)], "standard")
        assert statistics.channels[0][1].flatten()[0] == 1 and statistics.channels[1] is None
        again = ArrayStatistics.from_json(statistics.to_json())
        np.testing.assert_array_equal(again.channels[0][0], statistics.channels[0][0])

    def test_bytes_become_floats(self):
        x = torch.randint(256, (20, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        (statistics,) = fit_channels(as_arrays(x), [np.arange(20)], "standard")
        (scaled,) = encode(as_arrays(x), ArrayLayout.of(as_arrays(x)), statistics, torch.float32)
        assert scaled.dtype == torch.float32 and abs(float(scaled.mean())) < 1e-5

    def test_quantiles_are_for_tables(self):
        with pytest.raises(InputError, match="numbers='quantile' is for tables"):
            fit_channels(as_arrays(IMAGES), [np.arange(6)], "quantile")


class TestLayout:
    LAYOUT = ArrayLayout.of(as_arrays({"ids": IDS, "image": IMAGES}))

    def test_it_is_read_back(self):
        assert ArrayLayout.from_json(self.LAYOUT.to_json()) == self.LAYOUT

    def test_inputs_are_found_by_name(self):
        arrays = self.LAYOUT.raw({"image": IMAGES.numpy(), "more": IDS, "ids": IDS})
        assert arrays.names == ("ids", "image") and torch.equal(arrays.parts[0], IDS)

    def test_floats_of_two_axes_too(self):
        layout = ArrayLayout.of(as_arrays((torch.rand(6, 2),)))
        assert layout.raw(np.zeros((3, 2))).parts[0].shape == (3, 2)

    @pytest.mark.parametrize(
        ("X", "message"),
        [
            ({"ids": IDS}, "X has no input 'image'; those seen in training are 'ids', 'image'"),
            (
                {"ids": IDS, "image": IMAGES[:, :1]},
                r"must be what was seen in training, .*float32 \(rows, 2, 3, 3\)",
            ),
            ({"ids": IDS.float(), "image": IMAGES}, "must be what was seen in training"),
        ],
    )
    def test_others_are_refused(self, X, message):
        with pytest.raises(InputError, match=message):
            self.LAYOUT.raw(X)
