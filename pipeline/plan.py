"""`xformer plan`: what a store and its training will cost, before anything runs.

Bytes follow from shapes alone and are exact. Seconds on this machine are those of a short probe: some of the corpus's
images through the real encoders into a store that is thrown away; encoders whose weights are not here are counted. Seconds
on GPUs are operation counts at a stated throughput. Before any encoder runs, every image is read and hashed once; that is
as fast as the disk, and no GPU helps.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import images, places
from pipeline.captioned import Row
from pipeline.corpora import Corpus, open_corpus, read_image
from pipeline.extract import array_specs, extract
from pipeline.write_index import READERS, hashed, split_of
from xformer import console, weights
from xformer.console import say
from xformer.errors import CorpusError
from xformer.settings import Settings, with_overrides

SAMPLE = 512  # images decoded, captions read, and at most encoded, to measure
PROBE_SECONDS = 20.0  # of encoding, for each encoder
DRAWN = (640, 480)  # a COCO-sized picture, where there is no corpus to measure on
GPU_TFLOPS = 125.0
GPU_SOURCE = "40% of the 312 TFLOP/s of dense BF16 in NVIDIA's A100 datasheet"
RUNS = (1, 2, 3, 5, 10)


@dataclass(frozen=True)
class Machine:
    """The GPUs that are planned for: their number, the TFLOP/s that each achieves, and what the storage delivers."""

    gpus: int
    tflops: float
    storage_gb_per_second: float | None  # None: as much as the GPUs ask for


def count_rows(corpus: Corpus, settings: Settings) -> dict[str, Any]:
    """Counts images, captions and training pairs, and keeps a sample; no picture is opened."""
    found: dict[str, Any] = {"images": 0, "captions": 0, "pairs": 0, "sample": []}
    for row in corpus.rows():
        found["images"] += 1
        found["captions"] += len(row.captions)
        found["pairs"] += len(row.captions) * (split_of(row, settings.corpus.val_fraction) == "train")
        if len(found["sample"]) < SAMPLE:
            found["sample"].append(row)
    return found


def shard_bytes(index_rows: int, shard_rows: int, shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of all shards of one array: each row and its crc32c, each shard a table of 16 bytes a row and its crc32c."""
    row = math.prod(shape) * np.dtype(dtype).itemsize + 4
    shards = -(-index_rows // shard_rows)
    return index_rows * row + shards * (16 * shard_rows + 4)


def array_costs(settings: Settings, count: int, clip_tokens: dict[int, int]) -> dict[str, dict[str, Any]]:
    """Every array that both encoders will fill: shape, dtype, bytes."""
    found: dict[str, dict[str, Any]] = {}
    for kind in ("clip", "mae"):
        for name, (shape, dtype, _) in array_specs(kind, settings, False, clip_tokens).items():
            size = shard_bytes(count, settings.store.shard_rows, shape, dtype)
            per_image = math.prod(shape) * np.dtype(dtype).itemsize
            found[name] = {"shape": [count, *shape], "dtype": dtype, "bytes_per_image": per_image, "bytes": size}
    return found


def read_per_pair(arrays: dict[str, dict[str, Any]], settings: Settings, stage: str) -> int:
    """Bytes that one image-text pair reads: C, one draw of M with its kept patches, and in stage 1 the pixels; of however
    many views always one."""
    mae = "mae/draw-0" if settings.mae.mask_ratio else "mae/full"
    folders = (f"clip/{settings.clip.layers[0]}", mae)
    names = [f"{folder}/{part}" for folder in folders for part in ("tokens", "scale", "kept")]
    names += ["pixels/view-0"] if stage == "stage 1" else []
    return sum(arrays[name]["bytes_per_image"] for name in names if name in arrays)


def planning(corpus: Corpus, rows: list[Row]) -> dict[str, float]:
    """Bytes of one image and seconds to read and hash it, as the planning of a store does; the mean over a sample.

    A small sample is read again and again; the system is told to drop it from its cache each time, because a large corpus
    is not in memory either.
    """
    often = rows * -(-SAMPLE // len(rows))
    began = time.perf_counter()
    size = sum(found[2] for found in hashed(corpus.root, often, forget=True))
    seconds = time.perf_counter() - began
    return {"bytes": size / len(often), "seconds": seconds / len(often), "images": len(often)}


def decode_seconds(corpus: Corpus, rows: list[Row], settings: Settings) -> float:
    """Seconds of one core to read, decode and resize one image; the mean over a sample."""
    began, done = time.perf_counter(), 0
    for row in rows[:64]:
        try:
            picture = images.decode(read_image(corpus.root, row.location), settings.corpus.max_image_pixels)
            images.view(picture, settings.image_size, 0, 0, row.id)
        except (images.BadImage, OSError):
            continue
        done += 1
    return (time.perf_counter() - began) / max(1, done)


def drawn_corpus(folder: Path) -> Corpus:
    """Pictures of a photo's size, to measure on where no corpus is given."""
    draw = np.random.default_rng(0)
    for number in range(16):
        coarse = draw.integers(0, 255, (DRAWN[1] // 8, DRAWN[0] // 8, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize(DRAWN).save(folder / f"{number:03d}.jpg", quality=90)
    return open_corpus(folder)


NEEDED = {"clip": ("model.safetensors",), "mae": ("config.json", "model.safetensors|pytorch_model.bin")}


def probe(
    corpus: Corpus, rows: list[Row], kind: str, settings: Settings, gpus: bool, where: Path
) -> dict[str, Any] | None:
    """Seconds per image of one encoder's extraction in steady state, on this machine; None without its weights.

    Short runs first load the encoder and tell how many images fit into PROBE_SECONDS. Nothing is downloaded, and the
    stores, which lie below `where` for its disk's sake, are removed.
    """
    section = settings.clip if kind == "clip" else settings.mae
    if not weights.is_here(section.weights, NEEDED[kind]):
        return None

    def run(count: int, shard_rows: int) -> float:
        picked = [replace(rows[i % len(rows)], id=str(i)) for i in range(count)]
        few = replace(corpus, read=lambda: iter(picked), tars=())
        given = [f"store.shard_rows={shard_rows}", "corpus.max_dead_fraction=1", "store.dtype=fp16"]
        with tempfile.TemporaryDirectory(prefix=".xformer-plan-", dir=where) as folder:
            path = Path(folder) / "probe.zarr"
            report = extract(few, path, [kind], with_overrides(settings, given), gpus=gpus, in_process=True)
        return report["encoders"][kind]["seconds"] / count

    run(2, 2)
    count = int(min(max(SAMPLE, 3 * section.batch), PROBE_SECONDS / max(run(4, 4), 1e-6)))
    count = max(count, 4)
    return {"seconds": run(count, max(2, min(settings.store.shard_rows, count // 4))), "images": count}


def plan(
    corpus: Corpus | None,
    wanted: int | None,
    settings: Settings,
    machine: Machine,
    operations: dict[str, Any],
    training: Callable[[list[str]], dict[str, dict[str, Any]]],
    encoder_rate: Callable[[], float],
    gpus: bool,
    store: Path,
) -> dict[str, Any]:
    """Bytes, seconds, the read rate that training asks for, and when the cache pays. Returns what plan_tables.show prints.

    Args:
        corpus: None plans for `wanted` images with one caption each.
        wanted: plan for so many images instead of the corpus's own number, with as many captions each.
        operations: FLOP of one image: `clip`, and `mae` for one draw; `clip_tokens` of one image by block.
        training: captions -> what one pair costs in each stage (xformer/operations.py).
        encoder_rate: FLOP per second of this machine, asked for only where an encoder's weights are missing.
        gpus: probe this machine's CUDA device instead of its CPU.
    """
    around = [Path.cwd()] if places.is_object(store) else store.resolve().parents
    where = next(p for p in around if p.is_dir())
    with tempfile.TemporaryDirectory(prefix="xformer-plan-") as folder:
        source = corpus or drawn_corpus(Path(folder))
        counted = count_rows(source, settings)
        if corpus is None:
            counted |= {"captions": counted["images"], "pairs": counted["images"]}
        if not counted["images"]:
            raise CorpusError(f"--corpus {source.source}: no images to plan for.")
        scale = (wanted or counted["images"]) / counted["images"]
        count, captions, pairs = (round(counted[key] * scale) for key in ("images", "captions", "pairs"))
        arrays = array_costs(settings, count, operations["clip_tokens"])
        say("measuring this machine, a minute or two")
        read = planning(source, counted["sample"])
        decode = decode_seconds(source, counted["sample"], settings)
        with console.quietly():
            probes = {kind: probe(source, counted["sample"], kind, settings, gpus, where) for kind in NEEDED}
    trained = training([text for row in counted["sample"] for text in row.captions])
    rate = 0.0 if all(probes.values()) else encoder_rate()
    views = settings.store.views
    draws = settings.mae.draws if settings.mae.mask_ratio else 1
    phases = []
    for kind, made in (("clip", views), ("mae", draws)):
        flop, measured = operations[kind] * made, probes[kind]
        size = sum(a["bytes_per_image"] for name, a in arrays.items() if name.startswith("clip/") == (kind == "clip"))
        here = measured["seconds"] if measured else flop / rate
        how = f"probe of {measured['images']} images" if measured else "operations, no weights here"
        phases.append(_phase(f"extract {kind}", count, flop, size, here, how, machine))
    for stage, cost in trained.items():
        recipe = settings.stage1 if stage == "stage 1" else settings.stage2
        steps = recipe.epochs * max(1, pairs // recipe.batch)
        steps = min(steps, recipe.max_steps) if recipe.max_steps else steps
        here = cost["flop"] / cost["flop_per_second"]
        how = "timed steps, random weights" if cost["measured"] else "operations, at stage 1's rate"
        size = read_per_pair(arrays, settings, stage)
        phases.append(
            _phase(f"train {stage}", steps * min(recipe.batch, max(1, pairs)), cost["flop"], size, here, how, machine)
        )
    how = f"{READERS} threads, {read['images']} images, {read['bytes'] / read['seconds'] / 1e6:,.0f} MB/s"
    first = _phase("plan the store", count, 0, round(read["bytes"]), read["seconds"], how, machine)
    seconds = max(first["gpu_seconds"], first["here_seconds"])  # one machine reads, and no GPU helps it
    first |= {"gpu_seconds": seconds, "gpu_gb_per_second": count * read["bytes"] / 1e9 / seconds}
    return {
        "preset": settings.preset,
        "corpus": str(corpus.source) if corpus else None,
        **{"images": count, "captions": captions, "training_pairs": pairs},
        "arrays": arrays,
        "bytes": sum(array["bytes"] for array in arrays.values()),
        "free_bytes": shutil.disk_usage(where).free,
        "machine": asdict(machine) | {"source": GPU_SOURCE if machine.tflops == GPU_TFLOPS else "as given"},
        "phases": [first, *phases],
        "decode_core_seconds": decode,
        "decode_cores_for_gpus": decode * count / min(phase["gpu_seconds"] for phase in phases[:2]),
        "when_it_pays": {
            "gpus": _when_it_pays([first, *phases], pairs, views, draws, "gpu_seconds", "gpu_compute_seconds"),
            "here": _when_it_pays([first, *phases], pairs, views, draws, "here_seconds", "here_seconds"),
        },
    }


def _phase(name: str, samples: int, flop: float, size: int, here: float, how: str, machine: Machine) -> dict[str, Any]:
    """One phase: `samples` images or pairs, each of `flop` operations, `size` bytes and `here` seconds on this machine."""
    compute = samples * flop / (machine.gpus * machine.tflops * 1e12)
    moved = samples * size / 1e9
    storage = moved / machine.storage_gb_per_second if machine.storage_gb_per_second else 0.0
    return {
        "phase": name,
        **{"samples": samples, "flop_per_sample": flop, "bytes_per_sample": size},
        **{"here_seconds": samples * here, "here_flop_per_second": flop / here, "here": how},
        "gpu_seconds": max(compute, storage),
        "gpu_compute_seconds": compute,
        "gpu_gb_per_second": moved / max(compute, 1e-12),  # what keeps the GPUs busy
    }


def _when_it_pays(
    phases: list[dict[str, Any]], pairs: int, views: int, draws: int, cached: str, compute: str
) -> dict[str, Any]:
    """From which epoch of stage 1, and from which whole run of both stages, encoding once beats encoding every pair online.

    Online a pair costs one forward pass of each encoder beside the step itself, and reads no features.
    """
    planned, clip, mae, *stages = phases
    encode = planned[cached] + clip[cached] + mae[cached]
    online = clip[compute] / clip["samples"] / views + mae[compute] / mae["samples"] / draws
    cached_run = sum(stage[cached] for stage in stages)
    online_run = sum(stage[compute] + stage["samples"] * online for stage in stages)
    first = stages[0]
    saved_epoch = pairs * (online + (first[compute] - first[cached]) / first["samples"])

    def beaten(saved: float) -> int | None:
        return math.floor(encode / saved) + 1 if saved > 0 else None

    runs = [{"runs": n, "cached": encode + n * cached_run, "online": n * online_run} for n in RUNS]
    return {"from_epoch": beaten(saved_epoch), "from_run": beaten(online_run - cached_run), "runs_in_seconds": runs}
