"""Rows of the large caption corpora: webdataset tars (SBU, CC3M, CC12M), Visual Genome, and tables of path + caption.

Each reads its source as a stream: memory does not grow with the corpus.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import tars
from xformer.errors import CorpusError

PICTURES = {
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
}  # fmt: skip
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
    reason: str = ""  # why it cannot be used, where the source itself tells: it is a dead letter

    def clean(self) -> "Row":
        """As an index can hold it: captions are one line each, without NUL and without the half of a surrogate pair that
        a cut emoji leaves in JSON. A row without any caption left, or with such a half in its file name, is dead."""
        captions = tuple(text for text in map(_one_line, self.captions) if text)
        reason = self.reason or ("all its captions are blank" if self.captions and not captions else "")
        key, location = (_escaped(text) for text in (self.id, self.location))
        if (key, location) != (self.id, self.location):
            reason = "its file name is no Unicode text"
        return replace(self, id=key, location=location, captions=captions, reason=reason)


def _one_line(text: str) -> str:
    return " ".join(text.encode("utf-8", "ignore").decode().replace("\0", " ").split())


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


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
    Raises: CorpusError for a damaged tar, and for one with another number of pictures than img2dataset's _stats.json
    beside it says: a tar whose end is missing can look whole.
    """
    for file in files:
        count = 0
        try:
            for row in _samples(root, file):
                count += 1
                yield row
        except OSError as error:
            raise CorpusError(f"{file}: cannot be read: {error.strerror}.") from None
        said = _said(file)
        if said is not None and said != count:
            raise CorpusError(
                f"{file}: holds {count} pictures, its _stats.json says {said}; fetch it again, or remove that file where "
                "the tar was changed on purpose."
            )


def _said(file: Path) -> int | None:
    """How many pictures img2dataset wrote into a tar, as its NNNNN_stats.json says; None without one."""
    try:
        with file.with_name(f"{file.stem}_stats.json").open("rb") as stream:
            said = json.loads(stream.read(MAX_TEXT_BYTES))["successes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return said if isinstance(said, int) else None


def _samples(root: Path, file: Path) -> Iterator[Row]:
    key, parts, name = "", {}, file.relative_to(root).as_posix()
    with file.open("rb") as stream:
        for member in tars.members(file, stream):
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            now = str(path.parent / stem)
            if now != key:
                yield from _sample(name, stream, parts)
                key, parts = now, {}
            extension = f".{extension.lower()}"
            if extension in parts:
                raise CorpusError(f"{file}: the member {member.name!r} stands twice in one sample.")
            parts[extension] = member
        yield from _sample(name, stream, parts)


def _sample(tar: str, stream: BinaryIO, parts: dict[str, tars.Member]) -> Iterator[Row]:
    picture = next((parts[e] for e in sorted(parts) if e in PICTURES), None)
    if picture is None:
        return
    captions, reason = (), ""
    try:
        captions = _caption(stream, parts)
    except ValueError as error:
        reason = str(error)
    location = f"{tar}:{picture.offset}+{picture.size}"
    yield Row(image_id(picture.name), location, captions, reason=reason)


def _caption(stream: BinaryIO, parts: dict[str, tars.Member]) -> tuple[str, ...]:
    """A sample's one caption, or none. Raises ValueError with the reason where it cannot be read."""
    for extension in (".txt", ".json"):
        if (member := parts.get(extension)) is None:
            continue
        if member.size > MAX_TEXT_BYTES:
            raise ValueError(f"its {extension} has {member.size} bytes, more than {MAX_TEXT_BYTES}")
        try:
            stream.seek(member.offset)
            text = stream.read(member.size).decode("utf-8")
            caption = text if extension == ".txt" else json.loads(text).get("caption")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"its {extension} cannot be read: {error}") from None
        if isinstance(caption, str):
            return (caption,)
        if caption is not None:
            raise ValueError(f"the caption in its {extension} is no text")
    return ()


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
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CorpusError(f"{file}: not Visual Genome's region descriptions: {error!r}.") from None
        if odd := [phrase for phrase in phrases if not isinstance(phrase, str)]:
            raise CorpusError(f"{file}: a phrase of image {key} is {json.dumps(odd[0])[:60]}, not a text.")
        found = (f"{f}/{key}.jpg" for f in folders if (root / f / f"{key}.jpg").is_file())
        yield Row(str(key), next(found, f"{key}.jpg"), phrases)


def table_rows(file: Path) -> Iterator[Row]:
    """A CSV, TSV or Parquet of image path + caption; rows of one image that follow each other are one image."""
    path, captions = "", []
    for image, more in (_parquet if file.suffix.lower() == ".parquet" else _csv)(file):
        if image != path and path:
            yield Row(image_id(path), path, tuple(captions))
            captions = []
        path = inside(image, file)
        captions += [caption for caption in more if caption]
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


def _csv(file: Path) -> Iterator[tuple[str, list[str]]]:
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
                yield line[image], [line[caption]] if caption is not None else []
        except (csv.Error, UnicodeDecodeError) as error:
            raise CorpusError(f"{file} line {lines.line_num + 1}: {error}.") from None


def _parquet(file: Path) -> Iterator[tuple[str, list[str]]]:
    """A caption column may hold a text or a list of texts."""
    row = 0
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            image, caption = _columns(file, names)
            wanted = [names[image]] + ([names[caption]] if caption is not None else [])
            for batch in table.iter_batches(batch_size=4096, columns=wanted):
                columns = [batch[name].to_pylist() for name in wanted]
                captions = columns[1] if caption is not None else [None] * len(columns[0])
                for path, value in zip(columns[0], captions, strict=True):
                    texts: list[str] = [
                        text for text in (value if isinstance(value, list) else [value]) if text is not None
                    ]
                    if not isinstance(path, str) or not all(isinstance(text, str) for text in texts):
                        what = "caption" if isinstance(path, str) else "image path"
                        raise CorpusError(f"{file} row {row}: its {what} is missing or no text.")
                    yield path, texts
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise CorpusError(f"{file} row {row}: cannot be read as Parquet: {' '.join(str(error).split())}.") from None
