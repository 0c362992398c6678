"""Rows of the large caption corpora: webdataset tars (SBU, CC3M, CC12M), Visual Genome, and tables of path + caption.

Each reads its source as a stream: memory does not grow with the corpus.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tars
from xformer.errors import CorpusError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_TEXT_BYTES = 1 << 20  # of one caption file, JSON sidecar or table cell
MAX_ELEMENT_BYTES = 64 << 20  # of one element of a JSON list
IMAGE_COLUMNS = ("image", "image_path", "file_name", "filepath", "filename", "path", "file")
CAPTION_COLUMNS = ("caption", "text", "title", "description")


@dataclass(frozen=True)
class Row:
    """One image of a corpus. `split` is "" where the corpus has none of its own."""

    id: str
    location: str  # relative to the corpus's image root; inside a tar TAR:OFFSET+SIZE
    captions: tuple[str, ...]
    split: str = ""


def image_id(name: str) -> str:
    """COCO-style names carry their integer image id (COCO_val2014_000000000042.jpg -> 42); others are their own id."""
    stem = Path(name).stem
    digits = stem.rpartition("_")[2]
    return str(int(digits)) if len(digits) == 12 and digits.isascii() and digits.isdigit() else name


def inside(location: str, where: Path) -> str:
    """A location that stays below its root. Raises CorpusError for absolute paths and `..`."""
    path = Path(location)
    if path.is_absolute() or ".." in path.parts or "\0" in location or not path.parts:
        raise CorpusError(f"{where}: the file name {location!r} leads out of the picture folder.")
    return path.as_posix()


def tar_rows(root: Path, files: list[Path]) -> Iterator[Row]:
    """Samples as img2dataset writes them: KEY.jpg with KEY.txt and KEY.json beside it, one after the other.

    A caption is the .txt, else the "caption" of the .json. A sample without a picture is one that failed to download.
    """
    for file in files:
        key, parts = "", {}
        for member in tars.members(file):
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            now = str(path.parent / stem)
            if now != key:
                yield from _sample(root, file, parts)
                key, parts = now, {}
            extension = f".{extension.lower()}"
            if extension in parts:
                raise CorpusError(f"{file}: the member {member.name!r} stands twice in one sample.")
            parts[extension] = member
        yield from _sample(root, file, parts)


def _sample(root: Path, file: Path, parts: dict[str, tars.Member]) -> Iterator[Row]:
    picture = next((parts[e] for e in sorted(parts) if e in PICTURES), None)
    if picture is None:
        return
    caption: Any = None
    for extension in (".txt", ".json"):
        if (member := parts.get(extension)) is None or caption is not None:
            continue
        if member.size > MAX_TEXT_BYTES:
            raise CorpusError(
                f"{file}: {member.name} holds {member.size} bytes; a caption has at most {MAX_TEXT_BYTES}."
            )
        try:
            text = tars.read(file, member.offset, member.size).decode("utf-8")
            caption = text if extension == ".txt" else json.loads(text).get("caption")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CorpusError(f"{file}: {member.name} cannot be read: {error}.") from None
    location = f"{file.relative_to(root).as_posix()}:{picture.offset}+{picture.size}"
    yield Row(image_id(picture.name), location, (caption,) if isinstance(caption, str) else ())


def json_elements(file: Path) -> Iterator[Any]:
    """The elements of a JSON file that is one list, one at a time. Raises CorpusError where it is not."""
    decoder, buffer, began = json.JSONDecoder(), "", False
    with file.open(encoding="utf-8") as stream:
        while True:
            try:
                block = stream.read(1 << 20)
            except UnicodeDecodeError as error:
                raise CorpusError(f"{file}: not UTF-8: {error}.") from None
            buffer += block
            if not began:
                buffer = buffer.lstrip("\ufeff \t\r\n")
                if buffer and buffer[0] != "[":
                    raise CorpusError(f"{file}: the JSON is not a list.")
                began, buffer = bool(buffer), buffer[1:]
            place = 0
            while True:
                while place < len(buffer) and buffer[place] in " \t\r\n,":
                    place += 1
                if buffer[place : place + 1] == "]":
                    return
                try:
                    element, place = decoder.raw_decode(buffer, place)
                except (ValueError, RecursionError) as error:
                    if not block or len(buffer) - place > MAX_ELEMENT_BYTES or isinstance(error, RecursionError):
                        raise CorpusError(f"{file}: damaged or cut-off JSON: {error}.") from None
                    break
                yield element
            buffer = buffer[place:]


def genome_rows(file: Path, root: Path) -> Iterator[Row]:
    """Visual Genome's region_descriptions.json: every region's phrase is a caption of its image."""
    folders = [folder for folder in ("VG_100K", "VG_100K_2", "images") if (root / folder).is_dir()]
    for element in json_elements(file):
        try:
            key = int(element["id"] if "id" in element else element["image_id"])
            phrases = tuple(region["phrase"] for region in element["regions"])
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{file}: not Visual Genome's region descriptions: {error!r}.") from None
        if odd := [phrase for phrase in phrases if not isinstance(phrase, str)]:
            raise CorpusError(f"{file}: a phrase of image {key} is {json.dumps(odd[0])[:60]}, not a text.")
        found = (f"{f}/{key}.jpg" for f in folders if (root / f / f"{key}.jpg").is_file())
        yield Row(str(key), next(found, f"{key}.jpg"), phrases)


def table_rows(file: Path) -> Iterator[Row]:
    """A CSV, TSV or Parquet of image path + caption; rows of one image that follow each other are one image."""
    path, captions = "", []
    for image, caption in (_parquet if file.suffix.lower() == ".parquet" else _csv)(file):
        if image != path and path:
            yield Row(image_id(path), path, tuple(captions))
            captions = []
        path = inside(image, file)
        captions += [caption] if caption else []
    if path:
        yield Row(image_id(path), path, tuple(captions))


def _columns(file: Path, names: list[str]) -> tuple[int, int | None]:
    lower = [name.strip().lower() for name in names]
    image = next((lower.index(n) for n in IMAGE_COLUMNS if n in lower), None)
    if image is None:
        raise CorpusError(
            f"{file}: none of its columns ({', '.join(names)[:200]}) is one of {', '.join(IMAGE_COLUMNS)}."
        )
    return image, next((lower.index(n) for n in CAPTION_COLUMNS if n in lower), None)


def _csv(file: Path) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    tabs = file.suffix.lower() == ".tsv"
    with file.open(encoding="utf-8-sig", newline="") as stream:
        lines = csv.reader(stream, delimiter="\t" if tabs else ",", strict=True)
        try:
            names = next(lines, [])
            image, caption = _columns(file, names)
            for line in lines:
                if len(line) != len(names):
                    raise CorpusError(f"{file} line {lines.line_num}: {len(line)} cells, the header has {len(names)}.")
                yield line[image], line[caption] if caption is not None else ""
        except (csv.Error, UnicodeDecodeError) as error:
            raise CorpusError(f"{file} line {lines.line_num + 1}: {error}.") from None


def _parquet(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            image, caption = _columns(file, names)
            wanted = [names[image]] + ([names[caption]] if caption is not None else [])
            for batch in table.iter_batches(batch_size=4096, columns=wanted):
                columns = [batch[name].to_pylist() for name in wanted]
                captions = columns[1] if caption is not None else [None] * len(columns[0])
                for path, text in zip(columns[0], captions, strict=True):
                    yield str(path), "" if text is None else str(text)
    except (pa.ArrowInvalid, OSError) as error:
        raise CorpusError(f"{file}: not a Parquet file: {' '.join(str(error).split())}.") from None
