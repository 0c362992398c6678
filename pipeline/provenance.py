"""Where a store's features came from: source, settings and versions of each extraction, for `store info` and `retry`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import places
from pipeline.corpora import Corpus
from xformer.settings import Settings

LIBRARIES = ("torch", "timm", "transformers", "zarr", "pillow", "numpy")


def record(path: Path, kind: str, corpus: Corpus, settings: Settings, names: list[str]) -> None:
    """Writes STORE/index/made-KIND.json, the newest extraction of one encoder."""
    made = {
        "encoder": kind,
        "arrays": names,
        "source": str(corpus.source.resolve()),
        "images": str(corpus.root.resolve()),
        "versions": {name: version(name) for name in LIBRARIES},
        "settings": settings.dump(),
    }
    places.write(path / "index" / f"made-{kind}.json", (json.dumps(made, indent=2) + "\n").encode())


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each encoder's newest extraction, by encoder."""
    files = [name for name in places.children(path / "index")[0] if name.startswith("made-") and name.endswith(".json")]
    known, remedy = ("source", "images", "settings", "arrays", "versions"), "remove it and extract again"
    return {
        name[len("made-") : -len(".json")]: places.read_json(path / "index" / name, *known, remedy=remedy)
        for name in files
    }
