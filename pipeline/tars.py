"""Safe reading of tar files: headers only, nothing is ever unpacked, and every member is addressable by its offset.

Written for tars that nobody vouches for. Links, devices, sparse members, absolute paths and `..` are refused; headers
are checked and bounded; a tar that ends early is an error, never fewer samples. POSIX.1-2001 (pax) and GNU long names.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from xformer.errors import CorpusError

BLOCK = 512
MAX_HEADER_BYTES = 64 << 10  # of one pax or GNU long-name header
MAX_CHAIN = 4  # such headers before one member
MAX_NAME = 4096
FILE, DIRECTORY, LONG_NAME, PAX, PAX_GLOBAL = (b"0", b"\0"), b"5", b"L", b"x", b"g"


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of a tar in order. Raises CorpusError, with the offset, for anything hostile or damaged."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        offset, name, size, chain = 0, "", -1, 0
        while True:
            header = _block(file, path, offset, total)
            if not header.strip(b"\0"):
                return
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
                    name = _text(content.rstrip(b"\0"), path, offset)
                elif kind == PAX:
                    fields = _pax(content, path, offset)
                    name = fields.get("path", name)
                    size = _number(fields["size"], path, offset) if "size" in fields else size
            else:
                if kind != DIRECTORY:
                    yield Member(_safe(name or raw_name, path, offset), data, length)
                name, size, chain = "", -1, 0
            offset = after


def read(path: Path, offset: int, size: int) -> bytes:
    """The bytes of one member. Raises OSError where the tar is shorter."""
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise OSError(0, f"{path} is shorter than when it was indexed")
    return content


def _block(file: BinaryIO, path: Path, offset: int, total: int) -> bytes:
    file.seek(offset)
    header = file.read(BLOCK)
    if len(header) != BLOCK:
        raise CorpusError(f"{path}: cut off at byte {total}; a whole tar ends with a block of zeros.")
    return header


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
    return header[156:157], _text(prefix + b"/" * bool(prefix) + name, path, offset), size


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
            fields[key.decode()] = _text(value, path, offset)
        elif key.startswith(b"GNU.sparse"):
            raise CorpusError(f"{path} at byte {offset}: a sparse member.")
        content = content[count:]
    return fields


def _text(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise CorpusError(f"{path} at byte {offset}: a member's name is not UTF-8.") from None


def _safe(name: str, path: Path, offset: int) -> str:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name or len(name) > MAX_NAME:
        raise CorpusError(f"{path} at byte {offset}: the member name {name[:80]!r} leads out of the tar.")
    return "/".join(part for part in parts if part != ".")
