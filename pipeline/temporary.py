"""Answering from pictures: extract them into a temporary store, then do what is done on features. One path."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.corpora import Row, open_corpus
from pipeline.extract import extract
from xformer.checkpoint import newest, read_state
from xformer.errors import CorpusError
from xformer.settings import settings_from, with_overrides


def temporary_store(folder: Path, run: Path, wanted: set[str] | None) -> Path:
    """Encodes the pictures with the `wanted` ids (None: all), as the checkpoint's features were made.

    Returns: a store that is removed when the process ends.
    """
    state = read_state(newest(run))
    settings = settings_from(state["settings"], str(run))
    settings = with_overrides(settings, [f"mae.draws={settings.eval.draw + 1}", "store.shard_rows=64"])
    corpus = open_corpus(folder)

    def rows() -> Iterator[Row]:
        for row in corpus.rows():
            if wanted is None or row.id in wanted:
                yield row

    if next(rows(), None) is None:
        raise CorpusError(f"--images {folder}: none of its pictures is asked about.")
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="xformer-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, parent, True)
    kinds = ["clip", "mae"] if state["model"] == "xformer" else ["clip"]
    store = parent / "store.zarr"
    extract(replace(corpus, rows=rows), store, kinds, settings, whole=settings.mae.mask_ratio == 0, in_process=True)
    return store
