"""Where an array's features came from: source, pictures, settings and versions, in ARRAY/made.json beside its zarr.json.

`store info` shows it, and `store verify --repair`, `retry` and `fidelity` make features again by it. It also holds the
text of that zarr.json, without whose identity and int8 scales no feature could be read.
"""

import json
from collections.abc import Container
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.corpora import Corpus
from pipeline.store import MADE
from xformer.errors import StoreError
from xformer.settings import Settings, settings_from

LIBRARIES = ("torch", "timm", "transformers", "zarr", "pillow", "numpy")


def record(path: Path, names: list[str], corpus: Corpus, settings: Settings, finished: Container[str] = ()) -> None:
    """Writes ARRAY/made.json of each declared array, unless it says this already.

    Args:
        finished: arrays of which nothing is made now; theirs is written only where it is not there or damaged.
    """
    made = {
        "source": str(corpus.source.resolve()),
        "images": str(corpus.root.resolve()),
        "versions": {name: version(name) for name in LIBRARIES},
        "settings": settings.dump(),
    }
    for name in names:
        try:
            was = read(path, name)
        except StoreError:  # not there, or damaged
            was = {}
        if was and name in finished:
            continue
        # what its first shards were made with stays; a zarr.json that is damaged since does not replace its copy
        text = was.get("zarr.json") or places.read(path / name / "zarr.json").decode()
        before = {key: value.split(", ") for key, value in was.get("versions", {}).items()}
        versions = {key: ", ".join(dict.fromkeys([*before.get(key, []), now])) for key, now in made["versions"].items()}
        new = made | {"versions": versions, "zarr.json": text}
        if new != was:
            places.write(path / name / MADE, (json.dumps(new, indent=2) + "\n").encode())


def read(path: Path, name: str) -> dict[str, Any]:
    """How an array was made. Raises StoreError where the store does not say."""
    remedy = f"nobody knows how {name} was made: run the extraction again that made it, which writes it anew"
    try:
        return places.read_json(
            path / name / MADE, "source", "images", "versions", "settings", "zarr.json", remedy=remedy
        )
    except FileNotFoundError:
        raise StoreError(f"{path / name / MADE} is not there; {remedy}.") from None


def how(path: Path, name: str, images: Path | None) -> tuple[Settings, Path]:
    """The settings an array was made with, and where its pictures lie: in `images`, or where they lay then.

    Raises StoreError where the store does not say, or there is no such folder.
    """
    made = read(path, name)
    root = images or Path(made["images"])
    if not root.is_dir():
        raise StoreError(f"the pictures of {path} are not in {root}; say where they lie now with --images DIR.")
    return settings_from(made["settings"], str(path / name / MADE)), root.resolve()
