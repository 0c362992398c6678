"""What int8 costs, measured on a sample of the store's own images against the encoder's fp16 features."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline import encode, int8, provenance, store
from pipeline.index import Index
from xformer import publish
from xformer.console import say, table
from xformer.errors import CorpusError, StoreError
from xformer.settings import Settings

SAMPLE = 64  # images


def exact(
    index: Index, shards: list[int], names: list[str], settings: Settings, root: Path, most: int
) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
    """The rows that could be encoded, int64 [n], fp16 features [n, T, C] of each named array, and what was wrong with
    the first image that could not be encoded ("" where there is none)."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rows: list[int] = []
    failed = ""
    views = sorted({encode.view_of(name, settings.store.views) for name in names})
    for shard in shards:
        records, dead = index.shard(shard)[: most - len(rows)], {}
        pixels = encode.decode(records, root, settings, views, dead, None, 0)
        alive = np.array([i for i in range(len(records)) if i not in dead], np.int64)
        ids = [record["id"] for record in records]
        text = settings.model_dump_json()
        blocks = dict(encode.encode(settings, text, pixels, alive, ids, names, False, dead))
        failed = failed or next((f"{ids[i]}: {dead[i]}" for i in sorted(dead)), "")
        good = [i for i in range(len(records)) if i not in dead]
        rows += [index.bounds(shard)[0] + i for i in good]
        for name in names:
            found[name].append(blocks[name][good])
        if len(rows) >= most:
            break
    return np.array(rows, np.int64), {name: np.concatenate(parts) for name, parts in found.items()}, failed


def calibrate(index: Index, names: list[str], settings: Settings, root: Path, force: bool) -> dict[str, np.ndarray]:
    """Channel scales of each array from the corpus's first images; refused where int8 would lose too much.

    Half of the sample gives the scales, the other half is measured. Raises StoreError, and CorpusError where no image
    is usable.
    """
    rows, sample, failed = exact(index, list(range(index.shards)), names, settings, root, SAMPLE)
    if not len(rows):
        raise CorpusError(f"no image of {index.count} is usable; the first: {failed}.")
    scales = {}
    for name, values in sample.items():
        half = max(1, len(values) // 2)
        scales[name] = int8.channel_scales(values[:half])
        held = values[half:] if len(values) > half else values
        measured = int8.fidelity(held, int8.dequantise(*int8.quantise(held, scales[name]), scales[name]))
        _judge(name, measured, settings, force)
    return scales


def _judge(name: str, measured: dict[str, float], settings: Settings, force: bool) -> None:
    limit = settings.store.int8_max_rmse
    if measured["relative_rmse"] > limit:
        text = f"{name}: int8 has a relative RMSE of {measured['relative_rmse']:.4f} on a sample, above {limit}"
        if not force:
            raise StoreError(f"{text} (store.int8_max_rmse); use --dtype fp16, or --force.")
        say(f"{text}; forced")


def report(path: Path, json_file: Path | None, images: Path | None = None, sample: int = SAMPLE) -> dict[str, Any]:
    """Encodes a sample of the store's images again and compares every int8 array with it.

    Args:
        images: where the pictures lie now; left out, where they lay.

    Raises: StoreError where the store holds no int8 array, its images are gone, or, after the table and the JSON, where
    an array loses more than the store.int8_max_rmse that it was made with.
    """
    opened, found, limits = store.FeatureStore(path), {}, {}
    passes: dict[tuple[str, Path], list[str]] = {}
    for name in opened.names():
        if opened.array(name).channels is not None:
            settings, root = provenance.how(path, name, images)
            limits[name] = settings.store.int8_max_rmse
            passes.setdefault((settings.model_dump_json(), root), []).append(name)
    if not passes:
        raise StoreError(f"{path} holds no int8 features; make some with: xformer extract --dtype int8")
    shards = np.random.default_rng(0).permutation(opened.index.shards).tolist()
    for (text, root), names in passes.items():
        rows, values, _ = exact(opened.index, shards, names, Settings.model_validate_json(text), root, sample)
        if not len(rows):
            raise StoreError(f"{path}: none of its images can be read under {root}.")
        for name in names:
            found[name] = int8.fidelity(values[name], opened.array(name).read(rows))
    columns = ("relative_rmse", "cosine", "worst_token_relative_rmse", "worst_token_cosine")
    header = ("array", "relative RMSE", "cosine", "worst token RMSE", "worst token cosine")
    table(f"{path}: int8 against fp16", header, [(n, *(f"{m[c]:.5f}" for c in columns)) for n, m in found.items()])
    if json_file:
        publish.write_json(json_file, found)
    if above := [name for name in found if found[name]["relative_rmse"] > limits[name]]:
        raise StoreError(
            f"{path}: {above[0]} has a relative RMSE of {found[above[0]]['relative_rmse']:.4f}, above "
            f"store.int8_max_rmse = {limits[above[0]]} ({len(above)} of {len(found)} int8 arrays are); make it again with "
            "--dtype fp16."
        )
    return found
