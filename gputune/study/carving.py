"""Rows of a damaged SQLite file, found by their own shape and not through its tree of pages.

Every row of ours but a claim ends in a checksum of 16 characters, so the header of its record ends in the same byte
wherever it lies. A row counts only if its checksum fits; a page that is lost takes its own rows with it and no others.
Format: https://www.sqlite.org/fileformat2.html (records, overflow pages, write-ahead log).
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gputune.study.rows import Row, checksum

_CHECKSUM_TYPE = 0x2D  # SQLite's serial type of a text of 16 bytes
_LONGEST_HEADER = 48
_PAGE = 4096  # SQLite's default, where the file's header is lost
_INTEGER_BYTES = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}

Page = tuple[int, bytes]


def carve(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the whole rows of a file and of its write-ahead log: their rowids, and their values with the checksum.

    An integer primary key is among the values. Rows may come twice, and rows that were replaced may come too.
    """
    raw = path.read_bytes()
    log = path.resolve().with_name(path.resolve().name + "-wal")
    frames = log.read_bytes() if log.is_file() else b""
    for size in sorted({_page_size(raw, 16, 2), _page_size(frames, 8, 4)}):
        reserved = raw[20] if len(raw) > 20 and raw[20] < 64 else 0
        pages = [(n + 1, raw[at : at + size]) for n, at in enumerate(range(0, len(raw), size))]
        logged = list(_logged(frames, size))
        newest = dict([*pages, *logged])
        for _, page in [*pages, *logged]:
            for book in (newest, dict(pages)) if logged else (newest,):
                yield from _rows(page, size - reserved, book)


def _page_size(raw: bytes, offset: int, width: int) -> int:
    size = int.from_bytes(raw[offset : offset + width], "big")
    size = 65536 if size == 1 else size
    return size if 512 <= size <= 65536 and size & (size - 1) == 0 else _PAGE


def _logged(frames: bytes, size: int) -> Iterator[Page]:
    """Yield the pages of a write-ahead log, in the order in which they were written."""
    for at in range(32, len(frames) - 24 - size + 1, 24 + size):
        yield int.from_bytes(frames[at : at + 4], "big"), frames[at + 24 : at + 24 + size]


def _rows(page: bytes, usable: int, book: dict[int, bytes]) -> Iterator[tuple[int, Row]]:
    for match in re.finditer(bytes([_CHECKSUM_TYPE]), page):
        for length in range(4, min(_LONGEST_HEADER, match.end() - 1)):
            start = match.end() - length
            if page[start] == length:
                found = _row(page, start, length, usable, book)
                if found is not None:
                    yield found


def _row(page: bytes, start: int, length: int, usable: int, book: dict[int, bytes]) -> tuple[int, Row] | None:
    """Return the row whose record begins at ``start`` with a header of ``length`` bytes, if there is a whole one."""
    types = _varints(page[start + 1 : start + length])
    sizes = [_size(kind) for kind in types or []]
    if not sizes or None in sizes:
        return None
    payload = _payload(page, start, length + sum(s for s in sizes if s is not None), usable, book)
    if payload is None:
        return None
    rowid = _rowid_before(page, start)
    values, at = [], length
    for position, (kind, size) in enumerate(zip(types or [], sizes)):
        assert size is not None
        content = payload[at : at + size]
        at += size
        try:
            values.append(rowid if position == 0 and kind == 0 else _value(kind, content))
        except UnicodeDecodeError:
            return None
    *row, held = values
    return (rowid, (*row, held)) if held == checksum(*row) else None


def _payload(page: bytes, start: int, total: int, usable: int, book: dict[int, bytes]) -> bytes | None:
    """Return the bytes of a record, those on overflow pages too."""
    most, least = usable - 35, (usable - 12) * 32 // 255 - 23
    if total <= most:
        return page[start : start + total] if start + total <= len(page) else None
    local = least + (total - least) % (usable - 4)
    local = local if local <= most else least
    parts, missing = [page[start : start + local]], total - local
    following = int.from_bytes(page[start + local : start + local + 4], "big")
    while missing > 0:
        spilled = book.get(following)
        if spilled is None or len(spilled) < usable:
            return None
        parts.append(spilled[4 : 4 + min(missing, usable - 4)])
        missing -= usable - 4
        following = int.from_bytes(spilled[:4], "big")
    return b"".join(parts)


def _rowid_before(page: bytes, end: int) -> int:
    """Return the integer that ends before ``end``: its bytes but the last have their high bit set."""
    begin = end - 1
    while begin > max(0, end - 9) and page[begin - 1] & 0x80:
        begin -= 1
    found = _varints(page[begin:end])
    return found[0] if found else -1


def _varints(raw: bytes) -> list[int] | None:
    """Return the integers that fill ``raw``, or None where the last is not whole."""
    values, value = [], 0
    for byte in raw:
        value = value << 7 | byte & 0x7F
        if not byte & 0x80:
            values.append(value)
            value = 0
    return values if raw and not raw[-1] & 0x80 else None


def _size(kind: int) -> int | None:
    return (kind - 12) // 2 if kind >= 12 else _INTEGER_BYTES.get(kind)


def _value(kind: int, content: bytes) -> Any:
    if kind >= 12:
        return content.decode() if kind % 2 else content
    if kind in (8, 9):
        return kind - 8
    return None if kind == 0 else int.from_bytes(content, "big", signed=True)
