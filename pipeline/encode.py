"""One shard: decode each image once, run every wanted encoder, layer, draw and view on it, commit each array.

Several shards are in flight in a worker; a lock lets one of them use the encoders while others decode or write.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import images, int8, masks, places, store
from pipeline.corpora import read_image
from pipeline.index import Index
from xformer.settings import Settings

FP16_MAX = float(np.finfo(np.float16).max)
CRASHES = "its image crashes the process that decodes or encodes it"
_forward = threading.RLock()


@cache
def _load(kind: str, settings_json: str, gpus: bool) -> Any:
    from pipeline.encoders import ClipEncoder, MaeEncoder, pick_device

    settings = Settings.model_validate_json(settings_json)
    device = pick_device(gpus)
    if kind == "clip":
        return ClipEncoder(settings.clip, settings.image_size, device)
    return MaeEncoder(settings.mae, settings.image_size, device)


def encoder(kind: str, settings_json: str, gpus: bool = False) -> Any:
    """One encoder per process, loaded once."""
    with _forward:
        return _load(kind, settings_json, gpus)


def view_of(name: str, views: int) -> int:
    """Which view an array is made from: its own for CLIP and pixels, draw mod V for MAE."""
    for part in name.split("/"):
        if part.startswith("view-"):
            return int(part[5:])
        if part.startswith("draw-"):
            return int(part[5:]) % views
    return 0


def crashed_file(path: Path) -> Path:
    """Rows whose image crashed an encoding process, found by bisection: {row: reason}."""
    return path / "index" / "crashed.json"


def crashed(path: Path) -> dict[int, str]:
    try:
        return {int(k): v for k, v in places.read_json(crashed_file(path), remedy="remove it").items()}
    except FileNotFoundError:
        return {}


def encode_shard(
    path: str,
    shard: int,
    names: list[str],
    known: list[dict],
    old: dict[str, dict],
    settings_json: str,
    root: str,
    threads: int,
    gpus: bool,
    only: list[int] | None = None,
) -> dict[str, Any]:
    """Encodes and commits one shard of the named arrays; runs in a worker.

    Args:
        known: dead letters that arrays of the same pass hold already for this shard, so that all arrays agree.
        old: where the shard is committed and is made again, the commit record of each array, or as much as is known of
            it: {"dead": letters}. An array in which a picture would die that is alive is left as it is; any other keeps
            its commit record until the new bytes are there.
        only: encode only these rows and commit nothing; used to find an image that crashes the process.

    Returns: its number, rows, dead letters, arrays that were left with the reason, seconds in all and inside the
    encoders, and when it ended: by the machine's clock, which all processes share, and by the processor seconds of this
    one.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    settings = Settings.model_validate_json(settings_json)
    where = Path(path)
    index = Index(where / "index")
    began = time.perf_counter()
    records = index.shard(shard)
    start, _ = index.bounds(shard)
    ids = [record["id"] for record in records]
    dead = {row - start: reason for row, reason in crashed(where).items() if start <= row < start + len(records)}
    dead |= {d["row"] - start: d["reason"] for d in known}
    left: dict[str, str] = {}
    views = sorted({view_of(name, settings.store.views) for name in names})
    pixels = decode(records, Path(root), settings, views, dead, only, start)
    alive = np.array([i for i in range(len(records)) if i not in dead], np.int64)
    names = _spared(names, old, left, dead, start, ids)
    with _forward:
        started = time.perf_counter()
        blocks = dict(encode(settings, settings_json, pixels, alive, ids, names, gpus, dead))
        forward = time.perf_counter() - started
    names = _spared(names, old, left, dead, start, ids)
    result = {"shard": shard, "rows": len(records), "dead": [], "left": left, "forward": forward}
    if only is None and names:
        letters = [
            {"row": start + i, "id": ids[i], "source": records[i]["source"], "reason": dead[i]} for i in sorted(dead)
        ]
        for name in names:
            if name.endswith("/scale"):
                continue
            for part, block in _stored(where, name, blocks.pop(name), dead):
                if part in names:
                    seconds = forward / len(names)
                    store.write_shard(where, part, index, shard, block, ids, letters, seconds, old.get(part))
        result["dead"] = letters
    ended = time.perf_counter()
    return result | {"seconds": ended - began, "ended": ended, "processor": time.process_time()}


def _spared(names: list[str], old: dict, left: dict[str, str], dead: dict, start: int, ids: list[str]) -> list[str]:
    """The arrays in which nothing dies that their old commit record has alive; the others go into `left`."""
    for name in names:
        if was := old.get(name):
            lost = sorted(set(dead) - {letter["row"] - start for letter in was["dead"]})
            if lost:
                left.setdefault(name, f"{ids[lost[0]]}: {dead[lost[0]]}")
    return [name for name in names if name not in left]


def planned_image(root: Path, record: dict) -> bytes:
    """The bytes of an image as they were planned. Raises OSError, or BadImage where they are others now."""
    content = read_image(root, record["location"])
    if hashlib.sha256(content).digest() != record["sha256"]:
        raise images.BadImage("the file has changed since the store was planned")
    return content


def decode(
    records: list[dict],
    root: Path,
    settings: Settings,
    views: list[int],
    dead: dict,
    only: list[int] | None,
    start: int,
) -> dict[int, np.ndarray]:
    """uint8 [rows, 3, S, S] for each view; what cannot be decoded is added to `dead`."""
    side, seed = settings.image_size, settings.store.view_seed
    pixels = {view: np.zeros((len(records), 3, side, side), np.uint8) for view in views}
    for i, record in enumerate(records):
        if i in dead:
            continue
        if only is not None and start + i not in only:
            dead[i] = "not asked for"
        elif record["status"] == "dead":
            dead[i] = record["reason"]
        else:
            try:
                image = images.decode(planned_image(root, record), settings.corpus.max_image_pixels)
                for view in views:
                    made = images.view(image, side, view, seed, record["id"])
                    pixels[view][i] = made
            except (images.BadImage, OSError) as error:
                dead[i] = str(error)
    return pixels


def encode(
    settings: Settings, settings_json: str, pixels: dict, alive: np.ndarray, ids: list[str], names: list[str],
    gpus: bool, dead: dict[int, str],
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    """Every wanted array and its block, float16 or uint8 [rows, ...]; a row that is not finite is added to `dead`."""
    rows = len(ids)

    def keep(blocks: dict, name: str, chosen: np.ndarray, tokens: np.ndarray) -> None:
        if name not in blocks:
            blocks[name] = np.full((rows, *tokens.shape[1:]), np.nan, np.float16)
        for i, row in zip(chosen, tokens, strict=True):  # NaN or fp16 overflow: a dead letter, before the commit
            if not np.abs(row).max() <= FP16_MAX:
                dead.setdefault(int(i), f"{name}: a feature is NaN or beyond fp16")
            else:
                blocks[name][i] = row

    for view, seen in pixels.items():
        mine = [n for n in names if view_of(n, settings.store.views) == view and not n.endswith("/scale")]
        if f"pixels/view-{view}" in mine:
            yield f"pixels/view-{view}", seen
        layers = {int(n.split("/")[1]): n for n in mine if n.startswith("clip/")}
        if layers:
            clip, blocks = encoder("clip", settings_json, gpus), {}
            for chosen in _batches(alive, settings.clip.batch):
                for layer, tokens in clip.encode(seen[chosen], sorted(layers)).items():
                    keep(blocks, layers[layer], chosen, tokens)
            for layer, name in layers.items():
                if name not in blocks:  # nothing alive here
                    blocks[name] = np.full((rows, clip.tokens(layer), settings.clip.width), np.nan, np.float16)
                yield name, blocks[name]
        for prefix in sorted({n.rpartition("/")[0] for n in mine if n.startswith("mae/")}):
            yield from _encode_mae(settings, settings_json, prefix, seen, alive, ids, gpus, keep)


def _encode_mae(
    settings: Settings, settings_json: str, prefix: str, seen: np.ndarray, alive: np.ndarray, ids: list[str], gpus: bool,
    keep,
) -> Iterator[tuple[str, np.ndarray]]:  # fmt: skip
    mae, model = settings.mae, encoder("mae", settings_json, gpus)
    draw = None if prefix == "mae/full" else int(prefix.rpartition("-")[2])
    count = model.patches if draw is None else masks.kept_count(model.patches, mae.mask_ratio)
    kept = np.tile(np.arange(count), (len(ids), 1))
    if draw is not None:
        kept = np.stack([masks.kept_patches(mae.mask_seed, draw, key, model.patches, mae.mask_ratio) for key in ids])
        yield f"{prefix}/kept", np.stack([masks.pack(k, model.patches) for k in kept])
    blocks = {f"{prefix}/tokens": np.full((len(ids), 1 + count, mae.width), np.nan, np.float16)}
    for chosen in _batches(alive, mae.batch):
        keep(blocks, f"{prefix}/tokens", chosen, model.encode(seen[chosen], kept[chosen]))
    yield from blocks.items()


def _stored(where: Path, name: str, block: np.ndarray, dead: dict) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays that hold one block on disk: itself, or int8 tokens and their scales. Dead rows get the fill value."""
    channels = store.attributes(where, name).get("channel_scale")
    gone = sorted(dead)
    if channels is None:
        block[gone] = np.nan if block.dtype.kind == "f" else 0
        yield name, block
        return
    block[gone] = 0
    tokens, scale = int8.quantise(block, np.array(channels, np.float32))
    scale[gone] = np.nan
    yield f"{name.rpartition('/')[0]}/scale", scale  # first: where tokens are committed, their scales are
    yield name, tokens


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def find_crashers(path: str, shard: int, args: tuple, rows: list[int]) -> list[int]:
    """The rows whose image kills the process that encodes it: halves are tried in processes of their own."""
    import multiprocessing

    names, settings_json, root = args  # of one shard
    child = multiprocessing.get_context("spawn").Process(
        target=encode_shard, args=(path, shard, names, [], {}, settings_json, root, 1, False, rows)
    )
    child.start()
    child.join()
    if child.exitcode is not None and child.exitcode >= 0:
        return []
    if len(rows) == 1:
        return rows
    half = len(rows) // 2
    return [*find_crashers(path, shard, args, rows[:half]), *find_crashers(path, shard, args, rows[half:])]


def remember_crashers(path: Path, rows: Iterable[int]) -> None:
    """These images become dead letters of every shard that is made from now on."""
    _write_crashed(path, crashed(path) | dict.fromkeys(rows, CRASHES))


def forget_crashers(path: Path, rows: set[int]) -> None:
    """These images are tried again."""
    known = crashed(path)
    if rows & known.keys():
        _write_crashed(path, {row: reason for row, reason in known.items() if row not in rows})


def _write_crashed(path: Path, known: dict[int, str]) -> None:
    places.write(crashed_file(path), (json.dumps(known, indent=2) + "\n").encode())
