"""Corpora: every kind gives the same rows (id, location, captions, split), one by one, without holding pictures."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from xformer.errors import CorpusError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
MAX_JSON_BYTES = 4 << 30


@dataclass(frozen=True)
class Row:
    """One image of a corpus. `split` is "" where the corpus has none of its own."""

    id: str
    location: str  # relative to the corpus's image root
    captions: tuple[str, ...]
    split: str = ""


@dataclass(frozen=True)
class Corpus:
    """A recognised source: its kind, where its pictures lie, what identifies it, and its rows."""

    kind: str
    root: Path
    identity: str  # sha256 of what decides the rows: caption files or file names
    rows: Callable[[], Iterator[Row]]


def image_id(name: str) -> str:
    """COCO-style names carry their integer image id (COCO_val2014_000000000042.jpg -> 42); others are their own id."""
    stem = Path(name).stem
    digits = stem.rpartition("_")[2]
    return str(int(digits)) if len(digits) == 12 and digits.isascii() and digits.isdigit() else name


def open_corpus(source: Path, image_root: Path | None = None) -> Corpus:
    """Recognises a source by what it is.

    Args:
        source: a shapes folder, a COCO caption JSON, or a folder of pictures.
        image_root: where a caption file's pictures lie.

    Raises: CorpusError, which says what is wrong with which path.
    """
    if not source.exists():
        raise CorpusError(f"--corpus {source}: there is no such file or folder.")
    if source.is_dir() and (source / "shapes.json").is_file():
        return _shapes(source)
    if source.is_dir():
        return _folder(source)
    if source.suffix.lower() == ".json":
        if image_root is None:
            raise CorpusError(f"--corpus {source}: a caption file needs --images with the folder of its pictures.")
        if not image_root.is_dir():
            raise CorpusError(f"--images {image_root}: there is no such folder.")
        return _coco(source, image_root)
    raise CorpusError(f"--corpus {source}: neither a shapes folder, a COCO caption JSON, nor a folder of pictures.")


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
        names = {int(i["id"]): str(i["file_name"]) for i in content["images"]}
        captions: dict[int, list[str]] = {i: [] for i in names}
        for row in content["annotations"]:
            captions[int(row["image_id"])].append(str(row["caption"]))
    except (ValueError, TypeError, RecursionError) as error:
        raise CorpusError(f"{file}: not a COCO caption file: {error}.") from None
    except KeyError as error:
        raise CorpusError(f"{file}: not a COCO caption file: {error} is missing.") from None
    if not names:
        raise CorpusError(f"{file}: holds no images.")
    return names, captions


def _inside(location: str, where: Path) -> str:
    """A location that stays below its root. Raises CorpusError for absolute paths and `..`."""
    path = Path(location)
    if path.is_absolute() or ".." in path.parts or "\0" in location or not path.parts:
        raise CorpusError(f"{where}: the file name {location!r} leads out of the picture folder.")
    return path.as_posix()


def _coco(file: Path, root: Path) -> Corpus:
    def rows() -> Iterator[Row]:
        names, captions = _read_coco(file)
        for key in sorted(names):
            yield Row(str(key), _inside(names[key], file), tuple(captions[key]))

    return Corpus("coco", root, _sha256(file), rows)


def _folder(root: Path) -> Corpus:
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.suffix.lower() in PICTURES)
    if not names:
        raise CorpusError(f"--corpus {root}: no pictures in this folder ({', '.join(sorted(PICTURES))}).")

    def rows() -> Iterator[Row]:
        for name in names:
            yield Row(image_id(name), name, ())

    return Corpus("folder", root, hashlib.sha256("\n".join(names).encode()).hexdigest(), rows)


def _shapes(root: Path) -> Corpus:
    files = {split: root / split / "captions.json" for split in ("train", "val")}
    for file in files.values():
        if not file.is_file():
            raise CorpusError(f"{file} is missing; this shapes corpus is incomplete.")

    def rows() -> Iterator[Row]:
        for split, file in files.items():
            names, captions = _read_coco(file)
            for key in sorted(names):
                yield Row(str(key), f"{split}/images/{_inside(names[key], file)}", tuple(captions[key]), split)

    return Corpus("shapes", root, _sha256(*files.values()), rows)
