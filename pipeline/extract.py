"""The offline job: a corpus through a frozen encoder into the store, shard by shard, on a Dask cluster.

One task = one whole shard of every array that is still missing there. Rerunning does only what is missing.
"""

import hashlib
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import images, masks, store
from pipeline.corpora import Corpus, read_image
from pipeline.index import Index
from pipeline.plan import write_index
from xformer.console import progress, say
from xformer.errors import CorpusError, StoreError
from xformer.settings import Settings

FP16_MAX = float(np.finfo(np.float16).max)


@cache
def _encoder(kind: str, settings_json: str, gpus: bool, worker: int) -> Any:
    """One encoder per worker process, loaded once."""
    from pipeline.encoders import ClipEncoder, MaeEncoder, pick_device

    settings = Settings.model_validate_json(settings_json)
    device = pick_device(gpus, worker)
    if kind == "clip":
        return ClipEncoder(settings.clip, settings.image_size, device)
    return MaeEncoder(settings.mae, settings.image_size, device)


def declare(path: Path, index: Index, kind: str, settings: Settings, whole: bool) -> list[str]:
    """Declares the arrays of one encoder; returns their names. Raises StoreError where they exist and differ."""
    encoder, names = _encoder(kind, settings.model_dump_json(), False, 0), []
    view = {"view": 0, "crop": "resize"}
    if kind == "clip":
        for layer in settings.clip.layers:
            name = f"clip/{layer}/tokens"
            shape = (encoder.tokens, settings.clip.width)
            store.create_array(path, name, index, shape, "float16", encoder.layer_identity(layer), view)
            names.append(name)
        return names
    side, mae = settings.image_size, settings.mae
    ratio = 0.0 if whole else mae.mask_ratio
    draws: dict[str, int | None] = {f"mae/draw-{d}": d for d in range(mae.draws)} if ratio else {"mae/full": None}
    for prefix, draw in draws.items():
        usage = view | {"mask_ratio": ratio, "draw": draw, "mask_seed": mae.mask_seed if draw is not None else None}
        tokens = 1 + masks.kept_count(encoder.patches, ratio)
        store.create_array(path, f"{prefix}/tokens", index, (tokens, mae.width), "float16", encoder.identity, usage)
        names.append(f"{prefix}/tokens")
        if draw is not None:
            bits = (-(-encoder.patches // 8),)
            store.create_array(path, f"{prefix}/kept", index, bits, "uint8", encoder.identity, usage)
            names.append(f"{prefix}/kept")
    pixel_identity = {"schema": 1, "encoder": "pixels", "image_size": side}
    store.create_array(path, "pixels/view-0", index, (3, side, side), "uint8", pixel_identity, view)
    return [*names, "pixels/view-0"]


def encode_shard(
    path: str,
    shard: int,
    names: list[str],
    kind: str,
    settings_json: str,
    root: str,
    threads: int,
    gpus: bool,
    worker: int,
) -> dict[str, Any]:
    """Encodes and commits one shard; runs in a worker. Returns its number, rows, dead letters and seconds."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    settings = Settings.model_validate_json(settings_json)
    encoder, index, where = _encoder(kind, settings_json, gpus, worker), Index(Path(path) / "index"), Path(path)
    started = time.perf_counter()
    records = index.shard(shard)
    start, _ = index.bounds(shard)
    side = settings.image_size
    pixels = np.zeros((len(records), 3, side, side), np.uint8)
    dead: dict[int, str] = {}
    for i, record in enumerate(records):
        if record["status"] == "dead":
            dead[i] = record["reason"]
            continue
        try:
            content = read_image(Path(root), record["location"])
            if hashlib.sha256(content).digest() != record["sha256"]:
                raise images.BadImage("the file has changed since the store was planned")
            pixels[i] = images.evaluation_view(images.decode(content, settings.corpus.max_image_pixels), side)
        except (images.BadImage, OSError) as error:
            dead[i] = str(error)
    alive = np.array([i for i in range(len(records)) if i not in dead], np.int64)
    ids = [record["id"] for record in records]
    blocks = _encode(encoder, kind, settings, pixels, alive, ids, names)
    for name, block in blocks.items():  # NaN or fp16 overflow: a dead letter, before the commit
        if block.dtype.kind == "f":
            flat = block.reshape(len(block), -1)
            for i in alive:
                if i not in dead and not (np.abs(flat[i]) <= FP16_MAX).all():
                    dead[int(i)] = f"{name}: a feature is NaN or beyond fp16"
    seconds = (time.perf_counter() - started) / max(1, len(blocks))
    letters = [
        {"row": start + i, "id": ids[i], "source": records[i]["source"], "reason": dead[i]} for i in sorted(dead)
    ]
    for name, block in blocks.items():
        is_float = block.dtype.kind == "f"
        for i in dead:
            block[i] = np.nan if is_float else 0
        final = block.astype(np.float16) if is_float else block
        store.write_shard(where, name, index, shard, final, ids, letters, seconds)
    return {"shard": shard, "rows": len(records), "dead": letters, "seconds": time.perf_counter() - started}


def _encode(encoder, kind: str, settings: Settings, pixels, alive, ids: list[str], names: list[str]) -> dict:
    """Every wanted array's block, float32 or uint8 [rows, ...]; rows that are not alive hold the fill value."""
    rows, blocks = len(pixels), {}
    if "pixels/view-0" in names:
        blocks["pixels/view-0"] = pixels
    if kind == "clip":
        layers = [int(name.split("/")[1]) for name in names]
        for chosen in _batches(alive, settings.clip.batch):
            for layer, tokens in encoder.encode(pixels[chosen], layers).items():
                name = f"clip/{layer}/tokens"
                if name not in blocks:
                    blocks[name] = np.full((rows, *tokens.shape[1:]), np.nan, np.float32)
                blocks[name][chosen] = tokens
        shape = (encoder.tokens, settings.clip.width)
        return {n: blocks.get(n, np.full((rows, *shape), np.nan, np.float32)) for n in names}
    mae = settings.mae
    for prefix in sorted({name.rpartition("/")[0] for name in names if name.startswith("mae/")}):
        draw = None if prefix == "mae/full" else int(prefix.rpartition("-")[2])
        count = encoder.patches if draw is None else masks.kept_count(encoder.patches, mae.mask_ratio)
        kept = np.tile(np.arange(count), (rows, 1))
        if draw is not None:
            kept = np.stack(
                [masks.kept_patches(mae.mask_seed, draw, key, encoder.patches, mae.mask_ratio) for key in ids]
            )
            blocks[f"{prefix}/kept"] = np.stack([masks.pack(k, encoder.patches) for k in kept])
        tokens = np.full((rows, 1 + count, mae.width), np.nan, np.float32)
        for chosen in _batches(alive, mae.batch):
            tokens[chosen] = encoder.encode(pixels[chosen], kept[chosen])
        blocks[f"{prefix}/tokens"] = tokens
    return {name: blocks[name] for name in names}


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def plan_index(path: Path, corpus: Corpus, settings: Settings, limit: int | None) -> Index:
    """Makes the index, or opens the one that is there. Raises StoreError where it belongs to another corpus."""
    if (path / "index" / "index.json").is_file():
        index = Index(path / "index")
        have = index.description["corpus"]
        want = {
            "kind": corpus.kind, "identity": corpus.identity, "limit": limit,
            "val_fraction": settings.corpus.val_fraction,
        }  # fmt: skip
        if difference := store.first_difference(have, want):
            raise StoreError(f"{path} was planned for another corpus: {difference}; give another --store.")
        return index
    import zarr

    zarr.open_group(path, mode="a", zarr_format=3, attributes={"xformer_schema": store.SCHEMA})
    shutil.rmtree(path / "index", ignore_errors=True)  # of a planning that did not finish; nothing refers to it yet
    say(f"planning {path}: reading every image once")
    write_index(path / "index", corpus, settings.store.shard_rows, settings.corpus.val_fraction, limit)
    return Index(path / "index")


def extract(
    corpus: Corpus,
    path: Path,
    kinds: list[str],
    settings: Settings,
    limit: int | None = None,
    whole: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    gpus: bool = False,
    in_process: bool = False,
) -> dict[str, Any]:
    """Fills `path` with the features of a corpus. Returns what was done.

    Args:
        kinds: "clip", "mae", or both.
        whole: MAE features of the whole image (`mae/full`) instead of mask draws.
        in_process: no cluster; for temporary stores of a few images.

    Raises: CorpusError, StoreError, WeightsError.
    """
    started = time.perf_counter()
    report: dict[str, Any] = {"store": str(path), "corpus": str(corpus.root), "encoders": {}}
    with store.owner(path):
        index = plan_index(path, corpus, settings, limit)
        planned_dead = index.description["dead"]
        _check_dead(planned_dead, index.count, settings)
        for kind in kinds:
            names = declare(path, index, kind, settings, whole)
            done = {name: set(store.committed(path, name)) for name in names}
            todo = {s: [n for n in names if s not in done[n]] for s in range(index.shards)}
            todo = {s: missing for s, missing in todo.items() if missing}
            skipped = index.shards - len(todo)
            if skipped:
                say(f"{kind}: {skipped} of {index.shards} shards are committed already")
            args = (kind, settings.model_dump_json(), str(corpus.root.resolve()))
            dead: dict[int, dict] = {}
            began = time.perf_counter()
            rows = sum(index.bounds(s)[1] - index.bounds(s)[0] for s in todo)
            with progress(f"extract {kind}", rows, "images") as bar:
                run = _run_here if in_process else _run_on_dask
                for result in run(str(path), todo, args, workers or settings.store.workers, scheduler, gpus):
                    dead |= {letter["row"]: letter for letter in result["dead"]}
                    _check_dead(len(dead), index.count, settings)
                    bar.advance(result["rows"], note=f"{len(dead)} dead letters" if dead else "")
            seconds = time.perf_counter() - began
            report["encoders"][kind] = {
                "images": rows,
                "seconds": round(seconds, 2),
                "arrays": names,
                "shards done before": skipped,
            }
        description = store.describe(path)
    report |= {key: description[key] for key in ("images", "captions", "train", "val", "dead")}
    report["bytes"] = sum(array["bytes"] for array in description["arrays"].values())
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def _check_dead(dead: int, planned: int, settings: Settings) -> None:
    if dead > max(1, settings.corpus.max_dead_fraction * planned):
        raise CorpusError(
            f"{dead} of {planned} images are unusable, more than corpus.max_dead_fraction = "
            f"{settings.corpus.max_dead_fraction}; see the reasons with: xformer corpus info SRC"
        )


def _run_here(path: str, todo: dict, args: tuple, workers: int, scheduler: str | None, gpus: bool) -> Iterator[dict]:
    kind, settings_json, root = args
    for shard, names in todo.items():
        yield encode_shard(path, shard, names, kind, settings_json, root, 0, gpus, 0)


def _run_on_dask(path: str, todo: dict, args: tuple, workers: int, scheduler: str | None, gpus: bool) -> Iterator[dict]:
    """Keeps a bounded window of shards in flight, so memory does not grow with the corpus."""
    if not todo:
        return
    import logging
    import os

    import dask
    from distributed import Client, LocalCluster, as_completed

    dask.config.set({"distributed.comm.timeouts.connect": "10s", "distributed.scheduler.allowed-failures": 3})
    kind, settings_json, root = args
    absolute = str(Path(path).resolve())
    workers = min(workers, len(todo))
    cluster = None
    if scheduler is None:
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None,  # type: ignore[arg-type]
            silence_logs=logging.ERROR, memory_limit=0,
        )  # fmt: skip
    threads = 0 if scheduler else max(1, (os.cpu_count() or 1) // workers)
    try:
        with Client(cluster or scheduler, timeout=10) as client:
            width = max(workers, len(client.scheduler_info(n_workers=-1)["workers"])) * 2
            waiting = iter(enumerate(todo.items()))

            def submit(item: tuple[int, tuple[int, list[str]]]):
                number, (shard, names) = item
                return client.submit(
                    encode_shard, absolute, shard, names, kind, settings_json, root, threads, gpus, number, pure=False
                )

            window = as_completed([submit(item) for _, item in zip(range(width), waiting, strict=False)])
            for future in window:
                yield future.result()
                if (item := next(waiting, None)) is not None:
                    window.add(submit(item))
    finally:
        if cluster is not None:
            cluster.close(timeout=5)
