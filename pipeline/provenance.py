"""Where an array's features came from: source, pictures, settings and versions, in ARRAY/made.json beside its zarr.json.

`store info` shows it, and `store verify --repair`, `retry` and `fidelity` make features again by it. It also holds the
text of that zarr.json, without whose identity and int8 scales no feature could be read.
"""

import hashlib
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

    Raises StoreError where an array's zarr.json is not what it was when it was declared.
    """
    made = {
        "source": str(corpus.source.resolve()),
        "images": str(corpus.root.resolve()),
        "versions": {name: version(name) for name in LIBRARIES},
        "settings": settings.dump(),
    }
    for name in names:
        text = places.read(path / name / "zarr.json").decode()
        try:
            was = read(path, name)
        except StoreError:  # not there, or damaged
            was = {}
        if was.get("zarr.json", text) != text:
            said = f"{places.shown(path / name / 'zarr.json')} is damaged: it is not what it was when it was declared"
            raise StoreError(f"{said}; run: xformer store verify {places.shown(path)} --repair")
        if was and name in finished:
            continue
        # what its first shards were made with stays
        before = {key: value.split(", ") for key, value in was.get("versions", {}).items()}
        versions = {key: ", ".join(dict.fromkeys([*before.get(key, []), now])) for key, now in made["versions"].items()}
        new = json.loads(json.dumps(made | {"versions": versions, "zarr.json": text}))
        new["check"] = check_of(new)
        if new != was:
            places.write(path / name / MADE, (json.dumps(new, indent=2) + "\n").encode())


def check_of(made: dict[str, Any]) -> str:
    """The hash that made.json carries of everything else in it."""
    made = {key: value for key, value in made.items() if key != "check"}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path, name: str) -> dict[str, Any]:
    """How an array was made. Raises StoreError where the store does not say."""
    remedy = f"nobody knows how {name} was made: run the extraction again that made it, which writes it anew"
    keys = "source", "images", "versions", "settings", "zarr.json"
    try:
        made = places.read_json(path / name / MADE, *keys, remedy=remedy)
    except FileNotFoundError:
        raise StoreError(f"{path / name / MADE} is not there; {remedy}.") from None
    if made.get("check", "") not in ("", check_of(made)):
        raise StoreError(f"{path / name / MADE} is damaged (it does not match its check); {remedy}.")
    return made


def how(path: Path, name: str, images: Path | None) -> tuple[Settings, Path]:
    """The settings an array was made with, and where its pictures lie: in `images`, or where they lay then.

    Raises StoreError where the store does not say, or there is no such folder.
    """
    made = read(path, name)
    root = images or Path(made["images"])
    if not root.is_dir():
        raise StoreError(f"the pictures of {path} are not in {root}; say where they lie now with --images DIR.")
    return settings_from(made["settings"], str(path / name / MADE)), root.resolve()
