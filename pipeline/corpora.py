"""Corpora: every kind gives the same rows (id, location, captions, split), one by one, without holding pictures."""

import errno
import glob
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.captioned import PICTURES, Row, genome_rows, image_id, inside, table_rows, tar_rows
from xformer.errors import CorpusError

MAX_JSON_BYTES = 4 << 30
MAX_IMAGE_BYTES = 1 << 30
IN_TAR = re.compile(r"(.+\.tar):(\d+)\+(\d+)", re.IGNORECASE)
TABLES = (".csv", ".tsv", ".parquet")
CAPTION_FILES = (".json", *TABLES)  # whose pictures lie elsewhere
SHORTER = "it is shorter than when it was indexed"


@dataclass(frozen=True)
class Corpus:
    """A recognised source: its kind, where its pictures lie, what identifies it, and how its rows are read."""

    kind: str
    root: Path
    source: Path
    identity: str  # sha256 of what decides the rows: caption files or file names
    read: Callable[[], Iterator[Row]]
    tars: tuple[Path, ...] = ()

    def rows(self) -> Iterator[Row]:
        return (row.clean() for row in self.read())

    def expected(self, limit: int | None = None) -> int:
        """How many rows there are, at most `limit`; of tars an estimate from the first, for a progress bar."""
        if not self.tars:
            count = sum(1 for _ in self.read())
        else:
            sizes = [file.stat().st_size for file in self.tars]
            first = sum(1 for _ in tar_rows(self.root, [self.tars[0]]))
            count = round(first * sum(sizes) / max(1, sizes[0]))
        return count if limit is None else min(count, limit)


@contextmanager
def _opened(root: Path, location: str) -> Iterator[tuple[BinaryIO, int]]:
    """The bytes of one image, a file below `root` or a member of a tar there: a stream, and how many to read from it.

    Raises: OSError, also for what is no regular file: reading a pipe would wait for ever.
    """
    match = IN_TAR.fullmatch(location)
    file = root / (match[1] if match else location)
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    size = int(match[3]) if match else about.st_size
    if size > MAX_IMAGE_BYTES:
        raise OSError(errno.EFBIG, f"{size} bytes are more than an image may have")
    with file.open("rb") as stream:
        stream.seek(int(match[2]) if match else 0)
        yield stream, size


def read_image(root: Path, location: str) -> bytes:
    """The bytes of one image. Raises OSError."""
    with _opened(root, location) as (stream, size):
        content = stream.read(size)
    if len(content) != size:
        raise OSError(errno.EIO, SHORTER)
    return content


def hash_image(root: Path, location: str, forget: bool = False) -> tuple[bytes, int]:
    """sha256 and bytes of one image, read in pieces. Raises OSError.

    Args:
        forget: let the system drop the file from its cache first, to time the disk.
    """
    digest = hashlib.sha256()
    with _opened(root, location) as (stream, size):
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = size
        while left:
            if not (piece := stream.read(min(left, 1 << 20))):
                raise OSError(errno.EIO, SHORTER)
            digest.update(piece)
            left -= len(piece)
    return digest.digest(), size


def open_corpus(source: Path, image_root: Path | None = None) -> Corpus:
    """Recognises a source by what it is.

    Args:
        source: a shapes folder, a folder, file or glob of webdataset tars, a COCO caption JSON, Visual Genome's
            region_descriptions.json, a CSV, TSV or Parquet of image path + caption, or a folder of pictures.
        image_root: where the pictures of a caption file lie; left out, beside a CSV, TSV or Parquet.

    Raises: CorpusError, which says what is wrong with which path.
    """
    if image_root is not None and source.suffix.lower() not in CAPTION_FILES:
        raise CorpusError(f"--images goes with a caption file; {source} holds its own pictures, leave it out.")
    if not source.exists() and glob.has_magic(source.name):
        return _tars(source, source.parent, sorted(source.parent.glob(source.name)))
    if not source.exists():
        raise CorpusError(f"--corpus {source}: there is no such file or folder.")
    if source.is_dir() and (source / "shapes.json").is_file():
        return _shapes(source)
    if source.is_dir():
        return _folder(source)
    if not source.is_file():
        raise CorpusError(f"--corpus {source}: neither a file nor a folder.")
    kind = source.suffix.lower()
    if kind == ".tar":
        return _tars(source, source.parent, [source])
    if kind in TABLES and image_root is None:
        image_root = source.parent
    if kind in CAPTION_FILES:
        if image_root is None:
            raise CorpusError(f"--corpus {source}: a caption file needs --images with the folder of its pictures.")
        if not image_root.is_dir():
            raise CorpusError(f"--images {image_root}: there is no such folder.")
        root = image_root
        if kind in TABLES:
            return Corpus("table", root, source, _sha256(source), lambda: table_rows(source))
        with source.open("rb") as stream:
            is_list = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
        if is_list:
            return Corpus("visual genome", root, source, _sha256(source), lambda: genome_rows(source, root))
        return _coco(source, root)
    raise CorpusError(
        f"--corpus {source}: neither a shapes folder, tars, a COCO or Visual Genome JSON, a CSV, TSV or Parquet, nor a "
        "folder of pictures."
    )


def _tars(source: Path, root: Path, files: list[Path]) -> Corpus:
    files = [file for file in files if file.suffix.lower() == ".tar"]
    if not files:
        raise CorpusError(f"--corpus {source}: no tar of this name.")
    if odd := [file for file in files if not file.is_file()]:
        raise CorpusError(f"--corpus {source}: {odd[0]} is no regular file.")
    names = "\n".join(f"{f.relative_to(root).as_posix()} {f.stat().st_size}" for f in files)
    identity = hashlib.sha256(os.fsencode(names)).hexdigest()
    return Corpus("tars", root, source, identity, lambda: tar_rows(root, files), tuple(files))


def _sha256(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _read_coco(file: Path) -> tuple[dict[int, str], dict[int, list[str]]]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise CorpusError(f"{file}: larger than {MAX_JSON_BYTES >> 30} GiB.")
    try:
        content = json.loads(file.read_bytes())
        names: dict[int, str] = {}
        for image in content["images"]:
            key = int(image["id"])
            if key in names:
                raise CorpusError(f"{file}: the image id {key} stands twice; make every id unique.")
            names[key] = _text(image, "file_name", file)
        captions: dict[int, list[str]] = {i: [] for i in names}
        for row in content["annotations"]:
            key = int(row["image_id"])
            if key not in captions:
                raise CorpusError(f"{file}: a caption is of the image {key}, which is not among its images.")
            captions[key].append(_text(row, "caption", file))
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise CorpusError(f"{file}: not a COCO caption file: {error}.") from None
    except KeyError as error:
        raise CorpusError(f"{file}: not a COCO caption file: {error} is missing.") from None
    if not names:
        raise CorpusError(f"{file}: holds no images.")
    return names, captions


def _text(row: dict, key: str, file: Path) -> str:
    if not isinstance(row[key], str):
        of = row["image_id"] if "image_id" in row else row["id"]
        raise CorpusError(f"{file}: the {key} of image {of} is {json.dumps(row[key])[:60]}, not a text.")
    return row[key]


def _coco(file: Path, root: Path) -> Corpus:
    def rows() -> Iterator[Row]:
        names, captions = _read_coco(file)
        for key in sorted(names):
            yield Row(str(key), inside(names[key], file), tuple(captions[key]))

    return Corpus("coco", root, file, _sha256(file), rows)


def _folder(root: Path) -> Corpus:
    """A folder of tars or of pictures. Raises CorpusError for one that holds neither or both."""
    names, files = [], []
    for path in root.rglob("*"):
        if (kind := path.suffix.lower()) in PICTURES:
            names.append(path.relative_to(root).as_posix())
        elif kind == ".tar":
            files.append(path)
    if names and files:
        raise CorpusError(
            f"--corpus {root}: holds {len(files)} tars and {len(names)} pictures; give '{root}/*.tar', or a folder of "
            "the pictures alone."
        )
    if files:
        return _tars(root, root, sorted(files))
    names.sort()
    if not names:
        raise CorpusError(f"--corpus {root}: no pictures in this folder ({', '.join(sorted(PICTURES))}).")

    def rows() -> Iterator[Row]:
        for name in names:
            yield Row(image_id(name), name, ())

    return Corpus("folder", root, root, hashlib.sha256(os.fsencode("\n".join(names))).hexdigest(), rows)


def _shapes(root: Path) -> Corpus:
    files = {split: root / split / "captions.json" for split in ("train", "val")}
    for file in files.values():
        if not file.is_file():
            raise CorpusError(f"{file} is missing; this shapes corpus is incomplete.")

    def rows() -> Iterator[Row]:
        for split, file in files.items():
            names, captions = _read_coco(file)
            for key in sorted(names):
                yield Row(str(key), f"{split}/images/{inside(names[key], file)}", tuple(captions[key]), split)

    return Corpus("shapes", root, root, _sha256(*files.values()), rows)
