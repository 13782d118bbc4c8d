"""Inputs that are not tables: their checks, their scaling, the inputs of a prediction, and digests
of all inputs.
"""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from gputune.data.array_files import read_array_file
from gputune.data.arrays import ArrayLayout, ArrayStatistics, as_arrays, fit_channels
from gputune.data.containers import read_dataset, read_inputs
from gputune.data.dataset import encode
from gputune.data.files import read_table
from gputune.data.source import fingerprint, read_again, read_source, split_held_out
from gputune.data.table import as_table
from gputune.data.target import check_target
from refused import refused

IMAGES = torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(12).view(6, 2)


def _objects(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


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
    assert arrays.select(np.array([4, 1])).gathered()[0].equal(arrays.parts[0][[4, 1]])


def test_arrays_that_torch_does_not_take_are_those_of_a_type_that_it_does():
    x = np.arange(24).reshape(4, 3, 2)
    of_types = (x.astype(">f4"), x.astype(np.longdouble), x.astype(np.uint16), x[::-1].copy()[::-1])
    found = [as_arrays(of_type).parts[0] for of_type in of_types]
    assert [part.dtype for part in found] == [
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
    ]
    assert all(torch.equal(part.long(), torch.tensor(x)) for part in found)


@pytest.mark.parametrize(
    "X", [torch.rand(6, 2), np.zeros((6, 2)), np.arange(12).reshape(6, 2), [[1, 2]], "file"]
)
def test_a_table_is_no_array(X):
    assert as_arrays(X) is None


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


def test_a_dataset_of_dicts_has_its_target_under_labels():
    items = Items([{"ids": IDS[i], "labels": i % 2} for i in range(6)])
    inputs, y = read_dataset(items, None)
    assert list(inputs) == ["ids"] and inputs["ids"].equal(IDS)
    assert y.tolist() == [0, 1, 0, 1, 0, 1]
    inputs, given = read_dataset(items, y)
    assert list(inputs) == ["ids", "labels"] and given is y
    assert list(read_inputs(items, 1)) == ["ids"]
    assert list(read_inputs(items, 2)) == ["ids", "labels"]


UNLIKE = [(torch.zeros(2, 2), 0), (torch.zeros(2, 3), 1)]


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ({}, "X is empty"),
        ((IDS, IMAGES[:4]), r"the same number of rows in all inputs, got 6 in X\[0\], 4 in X\[1\]"),
        (np.full((2, 2, 2), "a"), "X must hold numbers or booleans, got <U1"),
        ({"a": IMAGES.to_sparse()}, r"X\['a'\] is a sparse tensor"),
        (IMAGES.to(torch.complex64), "must hold real numbers, got torch.complex64"),
        (torch.empty(0, 2, 2), r"no axis of length 0, got shape \(0, 2, 2\)"),
        (
            IMAGES.where(IMAGES[3, 0, 1, 1] != IMAGES, torch.nan),
            "got NaN or an infinite value in row 3",
        ),
        (IMAGES.to("meta"), "X is on the device 'meta', which holds no values"),
        (
            IMAGES.to(torch.float8_e4m3fn),
            "floats of 16 bits or more, got torch.float8_e4m3fn. Pass X.half()",
        ),
        (
            {"a": _objects([[1], [2, 3]])},
            r"X\['a'\] has rows of different shapes: row 0 has \(1,\)",
        ),
        (
            list(IMAGES),
            r"X is a list of 6 arrays of shape \(2, 3, 3\). Pass one array, torch.stack\(X\)",
        ),
        (list(IMAGES.numpy()), r"Pass one array, numpy.stack\(X\)"),
        (
            [*IMAGES, torch.zeros(2, 3, 4)],
            r"different shapes: X\[0\] has \(2, 3, 3\), X\[6\] has \(2, 3, 4\). Pad or crop",
        ),
        (_objects([[[1.0, 2.0]], [[1.0]]]), r"X is a list of 2 arrays of different shapes"),
        ([IDS, IMAGES], "If the arrays are the inputs of the module, pass a tuple of arrays"),
        ((IDS, IDS.tolist()), r"X\[1\] must be an array or a tensor, got a list"),
        (
            {"a": IDS, "b": [1] * 6},
            r"X\['b'\] must be an array or a tensor, .* Pass numpy.asarray\(X\['b'\]\)",
        ),
        (["a text", "another"], "X is a list of 2 texts. Turn words into numbers"),
        (
            DataLoader(TensorDataset(IMAGES)),
            "X is a DataLoader, .* Pass its dataset, loader.dataset",
        ),
        (Stream(), "Stream, which has no length. Pass a map-style Dataset"),
        (Items(UNLIKE), "cannot be stacked"),
        (Items([torch.zeros(2, 2)] * 3), "are not pairs"),
        (Items([]), r"X is a Items without items"),
        (
            Items({0: (torch.zeros(2), 0), 1: (torch.zeros(2), 0), 3: 4}),
            "Item 2 of X, a Items, raised KeyError: 2",
        ),
    ],
)
def test_what_is_no_array_is_refused_by_name(X, message):
    with refused(message):
        read_source(X, None if isinstance(X, Items) else [0] * 6, module=True)


def test_images_of_pil_are_to_be_stacked():
    image = pytest.importorskip("PIL.Image").fromarray(np.zeros((3, 3), np.uint8))
    with refused(r"X is a list of 6 PIL images. Pass numpy.stack\("):
        read_source([image] * 6, [0] * 6, module=True)
    with refused("X is one PIL image. Pass all images"):
        read_source(image, [0] * 6, module=True)
    with refused(r"Item 0 of X, a Items, is a PIL image. .*transforms.ToTensor"):
        read_dataset(Items([(image, 0)] * 6), None)


def test_a_mapped_file_and_rows_held_out_of_it_are_not_copied(tmp_path):
    np.save(tmp_path / "x.npy", IMAGES.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert as_arrays(mapped).parts[0].data_ptr() == mapped.ctypes.data
    np.save(tmp_path / "y.npy", np.arange(6) % 2)
    source = read_source(tmp_path / "x.npy", tmp_path / "y.npy", module=True)
    rest, test = split_held_out(
        source, check_target(source.y, n_rows=6), test_size=0.4, cv="2", seed=0
    )
    for part in (rest, test):
        assert part.X.parts[0].data_ptr() == source.X.parts[0].data_ptr()
        copied = as_arrays(part.X.as_given())
        assert fingerprint(part.X, part.y) == fingerprint(copied, part.y)
    assert len(rest.X) + len(test.X) == 6
    again = test.X.select(np.array([1, 0]))  # of rows that are some alone
    np.testing.assert_array_equal(again.as_given(), test.X.as_given()[[1, 0]])


def test_a_digest_tells_inputs_apart():
    y = np.array([0, 1] * 3)
    digests = {
        fingerprint(as_arrays(X), y)["sha256"]
        for X in (IMAGES, IMAGES.double(), IMAGES + 1, (IMAGES, IDS), {"a": IMAGES, "b": IDS})
    }
    assert len(digests) == 5
    arrays = as_arrays(IMAGES)
    y = torch.arange(6) % 2
    assert fingerprint(arrays, y) == fingerprint(arrays, y.numpy())  # the target of a .pt file


COLUMNS = {"a": [1.0, None, 3.0], "s": ["x", None, "yz"], "b": [True, False, True]}
Y = np.array(["no", "yes", "no"])


def digest(columns=COLUMNS, y=Y):
    return fingerprint(as_table(pd.DataFrame(columns)), check_target(y, n_rows=len(y)))["sha256"]


def test_equal_tables_give_equal_digests(tmp_path):
    pl.DataFrame(COLUMNS).write_csv(tmp_path / "t.csv")
    target = check_target(Y, n_rows=3)
    whole = fingerprint(as_table(pd.DataFrame(COLUMNS)), target)
    assert (whole["rows"], whole["columns"], len(whole["sha256"])) == (3, 3, 64)
    for table in (as_table(pl.DataFrame(COLUMNS)), read_table(tmp_path / "t.csv")):
        assert fingerprint(table, target)["sha256"] == digest()
        assert fingerprint(table, Y)["sha256"] == digest()
    assert digest(y=Y.astype(object)) == digest()
    assert digest({"a": [0.0, 1]}, y=Y[:2]) == digest({"a": [-0.0, 1]}, y=Y[:2])


@pytest.mark.parametrize(
    ("columns", "y"),
    [
        (COLUMNS | {"a": [1.0, 2.0, 3.0]}, Y),
        (COLUMNS | {"a": [1.0, None, 3.0 + 1e-15]}, Y),
        (COLUMNS | {"s": ["x", "None", "yz"]}, Y),
        (COLUMNS | {"s": ["xy", None, "z"]}, Y),
        (COLUMNS | {"b": [1, 0, 1]}, Y),
        (COLUMNS | {"c": [1, 2, 3]}, Y),
        ({name.replace("a", "A"): values for name, values in COLUMNS.items()}, Y),
        (dict(reversed(COLUMNS.items())), Y),
        (COLUMNS, np.array(["no", "no", "yes"])),
        (COLUMNS, np.array([0, 1, 0])),
    ],
)
def test_any_change_of_a_table_changes_its_digest(columns, y):
    assert digest(columns, y) != digest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_digests_of_tensors(dtype):
    X = torch.arange(6).reshape(2, 3).to(dtype)
    y = check_target([0.5, 1.5], n_rows=2)
    found = fingerprint(X, y)
    assert (found["rows"], found["columns"]) == (2, 3) and fingerprint(
        X.T.contiguous().T, y
    ) == found
    assert found["sha256"] not in [
        fingerprint(other, y)["sha256"] for other in (X.reshape(3, 2)[:2], X + 1)
    ]


class TestFiles:
    def test_arrays_by_name(self, tmp_path):
        np.savez(tmp_path / "d.npz", image=IMAGES.numpy(), label=np.arange(6) % 2)
        torch.save({"image": IMAGES, "label": torch.arange(6) % 2}, tmp_path / "d.pt")
        for name in ("d.npz", "d.pt"):
            source = read_source(tmp_path / name, "label", module=True)
            assert torch.equal(source.X.parts[0], IMAGES) and source.X.names is None
            assert source.origin == {
                "path": str(tmp_path / name),
                "target": "label",
                "groups": None,
            }

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
            (
                "lable",
                None,
                "target must be the name of an array in .*, which holds 'image', 'label', got 'lable'",
            ),
            ("label", "who", "groups must be the name of an array in .*got 'who'"),
            ("label", "label", "groups must not be the array of the target, got 'label'"),
        ],
    )
    def test_names_are_checked(self, tmp_path, y, groups, message):
        np.savez(tmp_path / "d.npz", image=IMAGES.numpy(), label=np.arange(6))
        with refused(message):
            read_source(tmp_path / "d.npz", y, groups, module=True)
        np.savez(tmp_path / "d.npz", label=np.arange(6))
        with refused("no array to predict from, only the target 'label'"):
            read_source(tmp_path / "d.npz", "label", module=True)

    def test_what_is_no_array_is_not_unpickled(self, tmp_path):
        np.savez(tmp_path / "d.npz", a=np.array([{}], dtype=object))
        torch.save([1, 2], tmp_path / "d.pt")
        torch.save(torch.nn.Linear(2, 2), tmp_path / "m.pt")
        (tmp_path / "e.pt").write_bytes(b"PK nothing")
        (tmp_path / "half.pt").write_bytes((tmp_path / "m.pt").read_bytes()[:700])
        for name in ("n.npz", "n.npy", "n.pt"):
            (tmp_path / name).write_bytes(b"nothing" * (name != "n.pt"))
        (tmp_path / "f.npz").mkdir()
        for name, message in [
            ("d.npz", "holds Python objects"),
            ("d.pt", "a dict of tensors, got list"),
            ("e.pt", "the file is damaged, or was not written by torch.save"),
            ("n.npz", "the file is damaged, or was not written by NumPy"),
            ("n.npy", "or was not written by NumPy"),
            ("n.pt", "the file is empty"),
            ("half.pt", "the file is damaged"),
            ("m.pt", "holds more than tensors. gputune does not unpickle"),
            ("f.npz", "is a folder. Give the file"),
        ]:
            with refused(message):
                read_array_file(tmp_path / name)

    def test_rows_and_targets_of_two_files(self, tmp_path):
        np.save(tmp_path / "x.npy", IMAGES.numpy())
        np.save(tmp_path / "label.npy", np.arange(6) % 2)
        source = read_source(tmp_path / "x.npy", tmp_path / "label.npy", module=True)
        assert torch.equal(source.X.parts[0], IMAGES) and source.target == "label"
        again = read_again(source.origin, module=True)
        assert fingerprint(again.X, again.y) == fingerprint(source.X, source.y)
        for y, message in [
            ("label", "y must be the path of a .npy file with one value per row"),
            (tmp_path / "no.npy", "y must be the path of a .npy file, but there is no file"),
        ]:
            with refused(message):
                read_source(tmp_path / "x.npy", y, module=True)


class TestDatasets:
    def test_the_tensors_of_a_tensor_dataset_are_taken_as_they_lie(self):
        dataset = TensorDataset(IMAGES, torch.arange(6))
        X, y = read_dataset(dataset, None, bar=lambda numbers: pytest.fail("items were read"))
        assert X.data_ptr() == IMAGES.data_ptr() and y.tolist() == [0, 1, 2, 3, 4, 5]
        X, y = read_dataset(TensorDataset(IMAGES), [0, 1])  # a target beside them
        assert torch.equal(X, IMAGES) and y == [0, 1]

    def test_named_inputs(self):
        X, _ = read_dataset(Items([({"a": IDS[i], "b": IMAGES[i]}, i) for i in range(6)]), None)
        assert torch.equal(X["a"], IDS) and torch.equal(X["b"], IMAGES)


class TestScaling:
    @pytest.mark.parametrize("row", [(3,), (4, 5), (3, 4, 5)])
    def test_training_rows_have_mean_0_and_variance_1(self, row):
        x = (
            torch.randn(40, *row, generator=torch.Generator().manual_seed(1))
            .mul(3)
            .add(100)
            .float()
        )
        train = np.arange(30)
        statistics = fit_channels(as_arrays((x,)), [train, np.arange(10, 40)], "standard")
        (scaled,) = encode(
            as_arrays((x,)), ArrayLayout.of(as_arrays((x,))), statistics[0], torch.float64
        )
        axes = {1: 0, 2: (0, 1, 2), 3: (0, 2, 3)}[len(row)]
        part = scaled[train].numpy()
        np.testing.assert_allclose([part.mean(axes), part.std(axes) - 1], 0, atol=1e-6)

    def test_a_constant_channel_is_only_centred_and_integers_stay(self):
        x = torch.ones(8, 2, 3, 3)
        x[:, 1] = torch.randn(8, 3, 3)
        (statistics,) = fit_channels(
            as_arrays((x, IDS[:1].expand(8, 2))), [np.arange(8)], "standard"
        )
        assert statistics.channels[0][1].flatten()[0] == 1 and statistics.channels[1] is None
        again = ArrayStatistics.from_json(statistics.to_json())
        np.testing.assert_array_equal(again.channels[0][0], statistics.channels[0][0])

    def test_bytes_become_floats(self):
        x = torch.randint(256, (20, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(
            torch.uint8
        )
        (statistics,) = fit_channels(as_arrays(x), [np.arange(20)], "standard")
        (scaled,) = encode(as_arrays(x), ArrayLayout.of(as_arrays(x)), statistics, torch.float32)
        assert scaled.dtype == torch.float32 and abs(float(scaled.mean())) < 1e-5

    @pytest.mark.parametrize("numbers", ["quantile", "robust", "piecewise-tree"])
    def test_quantiles_are_for_tables(self, numbers):
        with refused(f"numbers must be 'standard' or 'none' for images.*, got '{numbers}'"):
            fit_channels(as_arrays(IMAGES), [np.arange(6)], numbers)


class TestLayout:
    LAYOUT = ArrayLayout.of(as_arrays({"ids": IDS, "image": IMAGES}))

    def test_it_is_read_back_and_finds_inputs_by_name(self):
        assert ArrayLayout.from_json(self.LAYOUT.to_json()) == self.LAYOUT
        arrays = self.LAYOUT.raw({"image": IMAGES.numpy(), "more": IDS, "ids": IDS})
        assert arrays.names == ("ids", "image") and torch.equal(arrays.parts[0], IDS)
        layout = ArrayLayout.of(as_arrays((torch.rand(6, 2),)))
        assert layout.raw(np.zeros((3, 2))).parts[0].shape == (3, 2)

    @pytest.mark.parametrize(
        ("X", "message"),
        [
            (
                {"ids": IDS, "pixels": IMAGES},
                "X has no input 'image', got the inputs 'ids', 'pixels'. The inputs in training "
                "were 'ids', 'image'",
            ),
            (
                (IDS, IMAGES),
                r"must be as in training, .* Pass a dict, \{'ids': ..., 'image': ...\}, because",
            ),
            (
                {"ids": IDS, "image": IMAGES[:, :1]},
                r"must be as in training, .*float32 \(rows, 2, 3, 3\)",
            ),
            ({"ids": IDS.float(), "image": IMAGES}, "must be as in training"),
        ],
    )
    def test_others_are_refused(self, X, message):
        with refused(message):
            self.LAYOUT.raw(X)


def test_a_dict_is_refused_if_the_inputs_of_training_had_no_names():
    one = ArrayLayout.of(as_arrays(IDS))
    with refused("must be as in training, .* Pass the array itself instead of a dict"):
        one.raw({"ids": IDS})
    two = ArrayLayout.of(as_arrays((IDS, IMAGES)))
    with refused("must be as in training, .* Pass a tuple of the arrays instead of a dict"):
        two.raw({"ids": IDS, "image": IMAGES})
