"""Where a store's features came from: source, settings and versions of each extraction, for `store info` and `retry`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.corpora import Corpus
from xformer import publish
from xformer.settings import Settings

LIBRARIES = ("torch", "timm", "transformers", "zarr", "pillow", "numpy")


def record(path: Path, kind: str, corpus: Corpus, settings: Settings, names: list[str]) -> None:
    """Writes STORE/index/made-KIND.json, the newest extraction of one encoder."""
    publish.write_json(
        path / "index" / f"made-{kind}.json",
        {
            "encoder": kind,
            "arrays": names,
            "source": str(corpus.source.resolve()),
            "images": str(corpus.root.resolve()),
            "versions": {name: version(name) for name in LIBRARIES},
            "settings": settings.dump(),
        },
    )


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each encoder's newest extraction, by encoder."""
    files = sorted((path / "index").glob("made-*.json"))
    return {file.stem.removeprefix("made-"): json.loads(file.read_text(encoding="utf-8")) for file in files}
