"""Safe reading of tar files: headers only, nothing is ever unpacked, and every member is addressable by its offset.

Written for tars that nobody vouches for. Links, devices, sparse members, absolute paths and `..` are refused; headers
are checked and bounded; a tar that ends early is an error, never fewer samples. POSIX.1-2001 (pax) and GNU long names.

Tars that were concatenated are read on, as by GNU tar's --ignore-zeros. What ends an archive must look like it: two
blocks of zeros, filled up to a whole record; a lone block of zeros with data behind it, or more zeros than a writer
leaves (a download that was preallocated and broke off), is an error.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from xformer.errors import CorpusError

BLOCK = 512
MAX_HEADER_BYTES = 64 << 10  # of one pax or GNU long-name header
MAX_CHAIN = 4  # such headers before one member
MAX_NAME = 4096
RECORD = 10240  # bytes that tar fills an archive up to a multiple of, unless it is told another power of two
MAX_RECORD = 1 << 20
FILE, DIRECTORY, LONG_NAME, PAX, PAX_GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def members(path: Path, opened: BinaryIO | None = None) -> Iterator[Member]:
    """The regular files of a tar in order. Raises CorpusError, with the offset, for anything hostile or damaged.

    Args:
        opened: the tar, where the caller reads members too, between two of them: each open of a file on a server costs.
    """
    with nullcontext(opened) if opened else path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        began, offset, name, size, chain = 0, 0, "", -1, 0
        while True:
            header = _block(file, path, offset, total)
            if not header.strip(b"\0"):
                if chain:
                    raise CorpusError(f"{path} at byte {offset}: cut off; a header's member is missing.")
                began = offset = _after_end(file, path, offset, began, total)
                if offset == total:
                    return
                continue
            kind, raw_name, raw_size = _parse(header, path, offset)
            if kind != FILE[0] and kind != FILE[1] and kind not in (DIRECTORY, LONG_NAME, PAX, PAX_GLOBAL):
                raise CorpusError(f"{path} at byte {offset}: a member that is no plain file (type {kind!r}).")
            extended = kind in (LONG_NAME, PAX, PAX_GLOBAL)
            length = raw_size if extended or size < 0 else size
            data = offset + BLOCK
            after = data + -(-length // BLOCK) * BLOCK
            if after > total:
                raise CorpusError(f"{path} at byte {offset}: cut off; the member needs {after} bytes of {total}.")
            if extended:
                chain += 1
                if length > MAX_HEADER_BYTES or chain > MAX_CHAIN:
                    raise CorpusError(f"{path} at byte {offset}: more header than {MAX_HEADER_BYTES} bytes allow.")
                content = file.read(length)
                if kind == LONG_NAME:
                    name = _text(content.rstrip(b"\0"))
                elif kind == PAX:
                    fields = _pax(content, path, offset)
                    name = fields.get("path", name)
                    size = _number(fields["size"], path, offset) if "size" in fields else size
            else:
                if kind != DIRECTORY:
                    yield Member(_safe(name or raw_name, path, offset), data, length)
                name, size, chain = "", -1, 0
            offset = after


def _block(file: BinaryIO, path: Path, offset: int, total: int) -> bytes:
    file.seek(offset)
    header = file.read(BLOCK)
    if len(header) != BLOCK:
        raise CorpusError(f"{path}: cut off at byte {total}; a whole tar ends with a block of zeros.")
    return header


def _after_end(file: BinaryIO, path: Path, offset: int, began: int, total: int) -> int:
    """Where the next archive begins after the zeros at `offset` that end the one that `began`; `total` at the end."""
    file.seek(offset)
    zeros = file.read(MAX_RECORD + 2 * BLOCK)
    count = len(zeros) - len(zeros.lstrip(b"\0"))
    after = total if offset + count == total else (offset + count) // BLOCK * BLOCK
    count = after - offset
    records = [RECORD, *(1 << n for n in range(14, 21) if (after - began) % (1 << n) == 0)]
    if count == BLOCK and after < total:
        raise CorpusError(f"{path} at byte {offset}: a lone block of zeros with data behind it; this is no whole tar.")
    if count > max(records) + BLOCK:
        raise CorpusError(
            f"{path} at byte {offset}: {count} bytes of zeros or more, which no tar ends with: preallocated and not "
            "filled, or damaged; fetch it again."
        )
    return after


def _parse(header: bytes, path: Path, offset: int) -> tuple[bytes, str, int]:
    """Type, name and size of a header whose checksum is right."""
    stored = _number(header[148:156].strip(b"\0 ").decode("ascii", "replace"), path, offset, 8)
    if stored != sum(header[:148]) + sum(header[156:]) + 8 * 32:
        raise CorpusError(f"{path} at byte {offset}: the header's checksum is wrong; this is no whole tar.")
    raw = header[124:136]
    if raw[0] & 0x80:  # GNU base-256
        size = int.from_bytes(bytes([raw[0] & 0x7F]) + raw[1:], "big")
    else:
        size = _number(raw.strip(b"\0 ").decode("ascii", "replace") or "0", path, offset, 8)
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return header[156:157], _text(prefix + b"/" * bool(prefix) + name), size


def _number(text: str, path: Path, offset: int, base: int = 10) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 20:
        raise CorpusError(f"{path} at byte {offset}: {text[:20]!r} is no number; this is no whole tar.")
    try:
        return int(text, base)
    except ValueError:
        raise CorpusError(f"{path} at byte {offset}: {text!r} is no number; this is no whole tar.") from None


def _pax(content: bytes, path: Path, offset: int) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records; only path and size are kept."""
    fields: dict[str, str] = {}
    while content:
        length, space, _ = content.partition(b" ")
        count = _number(length[:20].decode("ascii", "replace"), path, offset)
        record = content[len(length) + 1 : count]
        if not space or not len(length) + 1 < count <= len(content) or record[-1:] != b"\n":
            raise CorpusError(f"{path} at byte {offset}: a damaged pax header.")
        key, _, value = record[:-1].partition(b"=")
        if key in (b"path", b"size"):
            fields[key.decode()] = _text(value)
        elif key.startswith(b"GNU.sparse"):
            raise CorpusError(f"{path} at byte {offset}: a sparse member.")
        content = content[count:]
    return fields


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")  # a name that is not UTF-8 makes its sample a dead letter


def _safe(name: str, path: Path, offset: int) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or len(name) > MAX_NAME:
        raise CorpusError(f"{path} at byte {offset}: the member name {name[:80]!r} leads out of the tar.")
    return "/".join(part for part in parts if part != ".")
