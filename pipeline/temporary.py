"""Answering from pictures: extract them into a temporary store, then do what is done on features. One path."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.captioned import Row
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer.checkpoint import newest, read_state
from xformer.errors import CorpusError, EvaluationError
from xformer.settings import settings_from, with_overrides


def temporary_store(folder: Path, run: Path, questions: Path | None) -> Path:
    """Encodes the pictures that the questions ask about, as the checkpoint's features were made.

    Returns: a store that is removed when the process ends.
    """
    state = read_state(newest(run))
    settings = settings_from(state["settings"], str(run))
    settings = with_overrides(settings, [f"mae.draws={settings.eval.draw + 1}", "store.shard_rows=64"])
    corpus = open_corpus(folder)
    wanted = None if questions is None else _asked(questions)

    def rows() -> Iterator[Row]:
        for row in corpus.rows():
            if wanted is None or row.id in wanted:
                yield row

    if next(rows(), None) is None:
        raise CorpusError(f"--images {folder}: none of its pictures is asked about in {questions}.")
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="xformer-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, parent, True)
    kinds = ["clip", "mae"] if state["model"] == "xformer" else ["clip"]
    store = parent / "store.zarr"
    extract(replace(corpus, rows=rows), store, kinds, settings, whole=settings.mae.mask_ratio == 0, in_process=True)
    return store


def _asked(questions: Path) -> set[str]:
    try:
        content = json.loads(questions.read_text(encoding="utf-8"))
        rows = content["questions"] if isinstance(content, dict) else content
        return {str(row["image_id"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"--questions {questions}: cannot be read: {error}") from None
