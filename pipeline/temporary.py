"""Answering from pictures: extract them into a temporary store, then do what is done on features. One path."""

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipeline.captioned import Row, image_id
from pipeline.corpora import Corpus, open_corpus
from pipeline.extract import extract
from pipeline.store import describe
from xformer.errors import CorpusError
from xformer.local import local_tokens, mask_ratio
from xformer.saved import model_folder, read_config
from xformer.settings import settings_from, with_overrides


def temporary_store(folder: Path, run: Path, wanted: set[str] | None, overrides: list[str] | None = None) -> Path:
    """Encodes the pictures with the `wanted` ids (None: all), as the checkpoint's features were made.

    Returns: a store that is removed when the process ends. Raises: CorpusError for a wanted picture that is not there
    or cannot be used, and what an extraction raises.
    """
    if not folder.is_dir():
        raise CorpusError(f"--images {folder}: there is no such folder.")
    corpus = open_corpus(folder)

    def rows() -> Iterator[Row]:
        for row in corpus.rows():
            if wanted is None or row.id in wanted:
                yield row

    if missing := sorted((wanted or set()) - {row.id for row in rows()}):
        raise CorpusError(
            f"--images {folder}: {len(missing)} of {len(wanted or ())} pictures that are asked about are not there "
            f"(first: {', '.join(missing[:3])})."
        )
    store = _encode(replace(corpus, read=rows), run, overrides or [])
    if wanted and (dead := describe(store)["dead"]):
        raise CorpusError(f"--images {folder}: {dead[0]['id']} cannot be used: {dead[0]['reason']}.")
    return store


def picture_store(pictures: list[Path], run: Path, overrides: list[str] | None = None) -> Path:
    """Encodes single pictures; row i of the store that is returned is pictures[i]. Masks are keyed as everywhere by
    the image id, or by the whole path where two pictures have the same."""
    for picture in pictures:
        if not picture.is_file():
            raise CorpusError(f"{picture}: there is no such picture.")
    absolute = [picture.resolve() for picture in pictures]
    ids = [image_id(picture.name) for picture in absolute]
    ids = [key if ids.count(key) == 1 else str(place) for key, place in zip(ids, absolute, strict=True)]
    if len(set(ids)) != len(ids):
        raise CorpusError(f"{next(key for key in ids if ids.count(key) > 1)} stands twice; name each picture once.")
    root = Path("/")

    def rows() -> Iterator[Row]:
        for key, place in zip(ids, absolute, strict=True):
            yield Row(key, place.relative_to(root).as_posix(), ())

    return _encode(Corpus("pictures", root, root, "", rows), run, ["corpus.max_dead_fraction=1.0", *(overrides or [])])


def _encode(corpus: Corpus, run: Path, overrides: list[str]) -> Path:
    config = read_config(model_folder(run))
    settings, model = settings_from(config["settings"], str(run)), config["variant"]
    settings, layers = with_overrides(settings, overrides), settings.clip.layers[:1]
    local, ratio = local_tokens(settings, model), mask_ratio(settings, model, "eval")
    layers += [settings.local.layer] if local == "clip" else []
    needed = [f"clip.layers={layers}", f"mae.draws={settings.eval.draw + 1}", "store.shard_rows=64"]
    settings = with_overrides(settings, [*needed, f"mae.mask_ratio={ratio}"] if ratio else needed)
    memory = Path("/dev/shm")
    parent = Path(tempfile.mkdtemp(prefix="xformer-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, parent, True)
    kinds = ["clip", "mae"] if local == "mae" else ["clip"]
    store = parent / "store.zarr"
    extract(corpus, store, kinds, settings, whole=ratio == 0, in_process=True)
    return store
