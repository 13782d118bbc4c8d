"""Whatever lies at the place of a file that is read: an error in a few words, no hang, and little
memory."""

import contextlib
import gzip
import io
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import polars as pl
import pytest
import torch

import gputune
from gputune.data.array_files import read_array_file
from gputune.data.files import read_columns, read_table
from gputune.data.source import read_source
from gputune.ground import files, memory
from gputune.study.repair import repair
from refused import refused

TABLE = "a,b,y\n" + "1,2,3\n4,5,6\n" * 20 + "7,8,9"
FREE = memory.free_memory()
ROWS = np.arange(120.0).reshape(40, 3)


def make_npy(path):
    np.save(path, ROWS)


def make_npz(path):
    np.savez(path, X=ROWS, y=np.arange(40) % 2)


def make_pt(path):
    torch.save({"X": torch.from_numpy(ROWS), "y": torch.arange(40) % 2}, path)


def make_parquet(path):
    pl.read_csv(io.StringIO(TABLE)).write_parquet(path)


def make_csv(path):
    path.write_bytes(gzip.compress(TABLE.encode()) if path.suffix == ".gz" else TABLE.encode())


def make_tsv(path):
    path.write_text(TABLE.replace(",", "\t"))


def read_npy(path):
    np.save(path.with_name("of y.npy"), np.arange(40))
    return read_source(path, path.with_name("of y.npy"))


def read_target(path):
    np.save(path.with_name("of X.npy"), ROWS)
    return read_source(path.with_name("of X.npy"), path)


def read_model(path):
    return gputune.load_model(path.parent)


READERS = {
    "csv": ("t.csv", make_csv, lambda path: read_source(path, "y")),
    "tsv": ("t.tsv", make_tsv, lambda path: read_source(path, "y")),
    "packed csv": ("t.csv.gz", make_csv, lambda path: read_source(path, "y")),
    "parquet": ("t.parquet", make_parquet, lambda path: read_source(path, "y")),
    "--keep of csv": ("t.csv", make_csv, lambda path: read_columns(path, ["a"])),
    "--keep of parquet": ("t.parquet", make_parquet, lambda path: read_columns(path, ["a"])),
    "npy": ("t.npy", make_npy, read_npy),
    "npy of the target": ("t.npy", lambda path: np.save(path, np.arange(40)), read_target),
    "npz": ("t.npz", make_npz, lambda path: read_source(path, "y")),
    "pt": ("t.pt", make_pt, lambda path: read_source(path, "y")),
    "pth": ("t.pth", make_pt, lambda path: read_source(path, "y")),
    "study": ("study.db", None, gputune.Study.open),
    "repair": ("study.db", None, lambda path: repair(path, path.with_name("new.db"))),
    "model.json": ("model.json", None, read_model),
    "model.safetensors": ("model.safetensors", None, read_model),
}
"""Of each reader the name of a file, what writes a good one, and what reads it; None: one that a
search has made."""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """The contents of the files of a study and a model, by name."""
    folder = tmp_path_factory.mktemp("searched")
    study = gputune.tune(
        "logistic", ROWS, np.arange(40) % 2, n_trials=1, cv=2, study=folder / "study.db", verbose=0
    )
    study.best_model().save(folder / "model")
    return {
        path.name: path.read_bytes()
        for path in (folder / "study.db", *(folder / "model").iterdir())
    }


def good_file(reader, folder, searched):
    """Write a file that is read without an error; return it and its reader."""
    name, make, read = READERS[reader]
    path = folder / name
    if make is None:
        for part, content in searched.items():
            (folder / part).write_bytes(content)
    else:
        make(path)
    return path, read


@contextlib.contextmanager
def no_hang(seconds=10):
    """Fail a block that waits."""

    def stop(*_):
        pytest.fail("it waits")  # which nobody takes for an error of a file

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def message_of(read, path):
    """The message of the error that a reader ends with: one to three sentences about that file."""
    with (
        no_hang(),
        pytest.raises((gputune.InputError, FileNotFoundError, PermissionError)) as raised,
    ):
        read(path)
    error = raised.value
    message = (
        f"{error.strerror}: {error.filename!r}." if getattr(error, "strerror", None) else str(error)
    )
    plain = re.sub(r"'[^']*'", "NAME", message)
    assert path.name[:20] in message and len(plain) < 500 and "\n" not in message
    assert 1 <= len(re.findall(r"[.:](?= [A-Z]|$)", plain)) <= 4, message
    return message


def as_pipe(path, _):
    os.mkfifo(path)


def as_socket(path, _):
    # a path of at most 107 bytes
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path.name)


def as_sparse(path, content):
    """A file that is larger than memory, and takes no space on the disk."""
    path.write_bytes(content)
    os.truncate(path, 2 * FREE)


HOSTILE = {
    "missing": (lambda path, _: None, "there is no|has no"),
    "folder": (lambda path, _: path.mkdir(), "is a folder"),
    "pipe": (as_pipe, "is a pipe, not a file. Write the content into a file first"),
    "device": (lambda path, _: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "socket": (as_socket, "is a socket, not a file"),
    "loop of links": (
        lambda path, _: path.symlink_to(path.name),
        "there is no|has no|too many levels",
    ),
    "link to nothing": (lambda path, _: path.symlink_to("nothing"), "there is no|has no"),
    "empty": (
        lambda path, _: path.touch(),
        "empty|Parquet|damaged|could not be read as a text table",
    ),
    "cut": (lambda path, content: path.write_bytes(content[: len(content) // 2]), ""),
    "other": (lambda path, _: path.write_bytes(b"\0\1\2\3" * 5000), ""),
    "sparse": (as_sparse, "memory|could not be read|cannot be read|damaged|bytes of value 0"),
}
"""What lies in the place of the file, and what the error says."""

_TAKEN = {
    *[("npy", "sparse"), ("npy of the target", "sparse")],  # more bytes after the array
    *[("csv", "cut"), ("tsv", "cut"), ("--keep of csv", "cut")],  # fewer lines
    ("repair", "cut"),  # which is what it is for
}
"""Files that are as good as whole."""


@pytest.mark.parametrize("reader", READERS)
def test_a_hostile_file_is_refused_in_words(reader, searched, tmp_path):
    for kind, (make, words) in HOSTILE.items():
        folder = tmp_path / kind
        folder.mkdir()
        path, read = good_file(reader, folder, searched)
        content = path.read_bytes()
        path.unlink()
        make(path, content)
        if (reader, kind) not in _TAKEN:
            message = message_of(read, path)
            assert re.search(words, message), (kind, message)


@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
def test_a_pipe_in_the_place_of_a_file_of_sqlite(ending, searched, tmp_path):
    path, read = good_file("study", tmp_path, searched)
    os.mkfifo(tmp_path / f"study.db{ending}")
    assert f"study.db{ending}' is not a regular file; remove it" in message_of(read, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("reader", READERS)
def test_a_file_without_the_right_to_read_it(reader, searched, tmp_path):
    path, read = good_file(reader, tmp_path, searched)
    path.chmod(0)
    assert "check the permissions" in message_of(read, path)


@pytest.mark.parametrize("reader", READERS)
def test_a_link_to_a_file_is_as_good_as_the_file(reader, searched, tmp_path):
    (tmp_path / "there").mkdir()
    path, read = good_file(reader, tmp_path, searched)
    path.rename(tmp_path / "there" / path.name)
    path.symlink_to(tmp_path / "there" / path.name)
    read(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("-", "there is no file '-'; write standard input into a file first"),
        ("https://example.org/t.csv", "download the URL into a file first"),
        ("s3://bucket/t.npz", "download the URL into a file first"),
    ],
)
def test_what_is_no_file_of_this_machine(name, words):
    with pytest.raises(FileNotFoundError, match=words):
        read_source(name, "y")


def test_a_name_that_no_file_can_have():
    for name in ("x" * 5000 + ".csv", "a\0b.npz"):
        with refused("cannot be read: .*Check the path"):
            read_source(name, "y")


def header(shape, descr="<f8"):
    """The beginning of a .npy file with such an array."""
    file = io.BytesIO()
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}"
    file.write(b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n")
    return file.getvalue()


ARRAYS = {
    "huge": (header((10**11, 10)), "does not fit into the file"),
    "overflow": (header((2**62, 2**62)), "does not fit into the file"),
    "negative": (header((-1, 3)) + bytes(24), "does not fit into the file"),
    "negative twice": (header((-3, -1)) + bytes(24), "does not fit into the file"),
    "text of no letters": (header((10**12,), "<U0"), "does not fit into the file"),
    "objects": (
        header((3,), "|O") + bytes(24),
        "holds Python objects, which may run code",
    ),
    "fields": (header((1,), [("a", "<f8"), ("b", "<f8")]) + bytes(16), "holds named fields"),
    "wide fields": (header((1,), [("a", "<f8", (10**12,))]) + bytes(16), "damaged"),
    "no type": (
        header((1,), "hello") + bytes(16),
        "the file is damaged, or was not written by NumPy",
    ),
    "no shape": (header("x") + bytes(16), "the file is damaged, or was not written by NumPy"),
    "many axes": (header((1,) * 1000) + bytes(8), "damaged"),
    "long header": (b"\x93NUMPY\x02\x00" + (2**31).to_bytes(4, "little") + bytes(100), "damaged"),
    "new version": (b"\x93NUMPY\x07\x00" + bytes(100), "named fields|damaged"),
}
"""Files of NumPy's of which nothing must be read, and what is said of them."""


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_hostile_array(kind, tmp_path):
    content, words = ARRAYS[kind]
    for suffix in (".npy", ".npz"):
        path = tmp_path / f"t{suffix}"
        path.write_bytes(content)
        if suffix == ".npz":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr("y.npy", content)
        assert re.search(words, message_of(read_array_file, path)), (
            suffix,
            message_of(read_array_file, path),
        )


def packed(path):
    """Write the archive of torch's at a path again, with packed records."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def nested():
    with warnings.catch_warnings(action="ignore"):  # nested tensors are a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])


TENSORS = {
    "stride 0": (
        lambda: torch.zeros(1).expand(10**10, 2),
        "needs about 74.5 GiB of memory or more, but only .* are free",
    ),
    "nested": (nested, "'X' in .*t.pt' is a nested tensor, .*to_padded_tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "'X' in .* is a sparse tensor"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "'X' in .* must hold real numbers"),
    "meta": (lambda: torch.zeros(3, device="meta"), "'X' in .* is on the device 'meta'"),
    "a list": (lambda: [torch.zeros(3)], "must hold a dict of tensors"),
    "code": (lambda: io.BytesIO, "holds more than tensors. gputune does not unpickle"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_hostile_tensor(kind, tmp_path):
    make, words = TENSORS[kind]
    path = tmp_path / "t.pt"
    torch.save({"X": make(), "y": torch.zeros(3)}, path)
    assert re.search(words, message_of(read_array_file, path)), message_of(read_array_file, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (packed, "the records are compressed"),
        (
            lambda path: torch.save(
                {"X": torch.zeros(3)}, path, _use_new_zipfile_serialization=False
            ),
            "damaged, or was not",
        ),
    ],
)
def test_a_hostile_archive_of_tensors(change, words, tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"X": torch.zeros(7), "y": torch.zeros(3)}, path)
    change(path)
    assert re.search(words, message_of(read_array_file, path)), message_of(read_array_file, path)


TEXTS = {
    "UTF-16": (
        TABLE.encode("utf-16"),
        "is text in UTF-16, but gputune reads UTF-8. Save the file as UTF-8",
    ),
    "UTF-16, big": (b"\xfe\xff" + TABLE.encode("utf-16-be"), "is text in UTF-16"),
    "UTF-32": (TABLE.encode("utf-32"), "is text in UTF-32"),
    "UTF-16 without a mark": (
        TABLE.encode("utf-16-le"),
        "bytes of value 0. If the file is text in UTF-16, save the file as",
    ),
    "binary": (
        TABLE.encode() + b"1,2,\0\n",
        "is not a text table, because it has bytes of value 0",
    ),
    "Latin-1": ("a,b\ncaf\xe9,1\n".encode("latin-1"), "Write UTF-8 text"),
    "a long line": (
        b"a,b\n1," + b"x" * 3_000_000 + b",3\n1,2\n",
        "could not be read|3 fields in line 2",
    ),
    "a long name": (
        b"a," + b"x" * 3_000_000 + b"\n1,2\n",
        "must hold the names of the columns, got a field of 3000000 characters",
    ),
    "an open quotation": (b'a,b\n"' + b"1,2\n" * 100_000, "could not be read|has 1 field in line"),
    "two names": (b"a,b,a\n1,2,3\n", "Column names must differ, but 'a' occurs more than once"),
    "many names": (
        b",".join([b"a"] * 3000) + b"\n" + b",".join([b"1"] * 3000) + b"\n",
        "Column names must differ",
    ),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_a_hostile_text(kind, name, tmp_path):
    content, words = TEXTS[kind]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    with no_hang(), refused(words) as raised:
        read_source(path, "b")
    assert len(str(raised.value)) < 1000


def test_a_byte_order_mark_of_utf8_is_no_part_of_a_name(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + TABLE.encode())
    assert read_table(tmp_path / "t.csv").names == ("a", "b", "y")


def test_nested_columns_and_texts_that_memory_does_not_hold(monkeypatch, tmp_path):
    path = tmp_path / "t.parquet"
    for column in ([[1.0] * 9] * 3, [{"b": 1}] * 3, [b"1"] * 3):
        pl.DataFrame({"a": column, "y": [1, 2, 3]}).write_parquet(path)
        with refused(
            "Column 'a' of .*t.parquet' holds .*, not single values. Write columns of numbers"
        ):
            read_source(path, "y")
    # A dictionary has each text once; the table has an object of Python's for each row.
    pl.DataFrame({"a": ["x" * 1000] * 10_000, "y": [1] * 10_000}).write_parquet(path)
    assert path.stat().st_size < 10_000
    monkeypatch.setattr(files, "free_memory", lambda: 8 << 20)
    with refused("t.parquet' needs about 10.1 MiB of memory or more, but only 8.0 MiB are free"):
        read_source(path, "y")


def test_rows_of_a_file_that_become_a_table_need_memory(monkeypatch, tmp_path):
    # of which a table makes numbers of eight bytes
    np.save(tmp_path / "X.npy", np.zeros((20_000, 10), np.uint8))
    np.save(tmp_path / "y.npy", np.zeros(20_000))
    np.savez(tmp_path / "t.npz", X=np.zeros((20_000, 10), np.uint8), y=np.zeros(20_000))
    np.savez_compressed(tmp_path / "bomb.npz", X=np.zeros((20_000, 10)), y=np.zeros(20_000))
    torch.save(
        {"X": torch.zeros(20_000, 10, dtype=torch.uint8), "y": torch.zeros(20_000)},
        tmp_path / "t.pt",
    )
    monkeypatch.setattr(files, "free_memory", lambda: 1 << 20)
    for name, y in (
        ("X.npy", tmp_path / "y.npy"),
        ("t.npz", "y"),
        ("t.pt", "y"),
        ("bomb.npz", "y"),
    ):
        with refused(rf"{name}' needs about 1.\d MiB of memory or more, but only 1.0 MiB are free"):
            read_source(tmp_path / name, y)


# 8 MB of .npz that ask for 7.45 GiB, and the like, on a smaller scale.
LIMITED = """
import resource, sys
from pathlib import Path
from gputune.data.source import read_source
from gputune.ground.errors import InputError

taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), -1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        read_source(path, "y")
    except InputError as error:
        print(error)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # in KiB
assert peak < 50_000, peak
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses of a process")
def test_bombs_take_little_memory(tmp_path):
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(
        tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as archive:
        for name in ("X.npy", "y.npy"):
            with archive.open(name, "w") as file:
                file.write(header((1 << 22,)))  # 32 MiB
                for _ in range(32):
                    file.write(zeros)
    torch.save({"X": torch.zeros(1).expand(1 << 24, 2), "y": torch.zeros(3)}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.csv.gz").write_bytes(gzip.compress(b"a,y\n" + b"1,2\n" * 5_000_000, 1))
    command = [sys.executable, "-P", "-c", LIMITED, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and all("needs about" in line for line in lines), run.stdout
