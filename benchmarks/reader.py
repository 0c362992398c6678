"""Reading shuffled rows of 257 x 1408, as fp16 and as int8, in every way that is in use, side by side.

All read the same rows in one round, in one thread, into a buffer that was touched before, from files in the page cache;
what is printed is the median over the rounds, and of the ratios within a round. A tar cannot be read at random: its
samples come in their order, which is kind to it. Checked means that a flipped bit is an error: ours, tensorstore, zarr
and zarrs verify a crc32c of every row; h5py, .pt and tar verify nothing of the payload.
"""

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np

from xformer.console import say, table

SHAPE, ROWS, SHARD_ROWS, BATCH, ROUNDS = (257, 1408), 512, 64, 32, 15
ARRAY = "clip/39/tokens"
LIMIT, OURS = "np.take of a memory map", "xformer"
Readers = dict[str, Callable[[np.ndarray], np.ndarray]]  # row numbers -> the rows, in a buffer that all share


def reader() -> dict:
    """GB/s of what is stored, and how many times as fast the reader is."""
    found = {}
    for dtype in ("float16", "int8"):
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            found[dtype] = measure(readers(Path(folder), dtype, pool), np.dtype(dtype).itemsize)
        rates, ratios = found[dtype]["GB/s"], found[dtype]["xformer is so many times as fast"]
        rows = [(name, f"{rate:.2f}", ratios.get(name)) for name, rate in rates.items()]
        table(f"shuffled rows of 257x1408 {dtype}", ("one thread", "GB/s", "xformer : it"), rows)
    return found


def measure(ways: Readers, item_bytes: int) -> dict:
    size = BATCH * int(np.prod(SHAPE)) * item_bytes
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    draw = np.random.default_rng(1)
    for turn in range(ROUNDS + 1):
        chosen = draw.permutation(ROWS)[:BATCH]
        for name, read in ways.items():
            began = time.perf_counter()
            read(chosen)
            if turn:  # the first round warms everything up
                seconds[name].append(time.perf_counter() - began)
    rates = {name: size / 1e9 / statistics.median(values) for name, values in seconds.items()}
    pairs = {name: OURS + name.removeprefix(LIMIT) if name.startswith(LIMIT) else OURS for name in ways}
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[against], strict=True))
        for name, against in pairs.items()
        if not name.startswith(OURS)
    }
    return {"GB/s": rates, "xformer is so many times as fast": ratios}


def readers(folder: Path, dtype: str, pool: ThreadPoolExecutor) -> Readers:
    """Writes the same rows in every format and returns how each is read, into one buffer."""
    import torch
    import zarr

    from pipeline.store import FeatureArray

    torch.set_num_threads(1)
    store = folder / "s.zarr"
    index, plain = write_everything(folder, store, dtype)
    ours, out = FeatureArray(store, ARRAY, index), np.ones((BATCH, *SHAPE), dtype)
    whole = zarr.open_array(store, path=ARRAY, mode="r")
    wide, halves = np.ones((BATCH, *SHAPE), np.float16), (slice(0, BATCH // 2), slice(BATCH // 2, BATCH))

    def torch_files(chosen: np.ndarray) -> np.ndarray:
        for place, row in zip(out, chosen, strict=True):
            np.copyto(place, torch.load(folder / f"{row}.pt", weights_only=True).numpy())
        return out

    samples = tar_samples(folder / "rows.tar")

    def tar(chosen: np.ndarray) -> np.ndarray:
        for place in out:
            np.copyto(place, next(samples))
        return out

    def halved(chosen: np.ndarray) -> np.ndarray:
        list(pool.map(lambda part: np.take(plain, chosen[part], 0, out=out[part], mode="clip"), halves))
        return out

    ways: Readers = {
        LIMIT: lambda chosen: np.take(plain, chosen, 0, out=out, mode="clip"),
        OURS: lambda chosen: ours.raw(chosen, out),
        f"{LIMIT}, 2 threads": halved,
        f"{OURS}, 2 threads": lambda chosen: ours.raw(chosen, out, pool),
    }
    if dtype == "int8":
        ways[f"{OURS}, to float16 features on the CPU"] = lambda chosen: ours.read(chosen, wide)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})  # from here on, for every reading
    ways["zarr oindex"] = lambda chosen: np.asarray(whole.oindex[chosen])
    for name, made in (("zarr + zarrs", with_zarrs), ("tensorstore", with_tensorstore), ("h5py", with_h5py)):
        try:
            ways[name] = made(folder, store, out)
        except ImportError:
            say(f"{name} is not installed: pip install 'xformer-mllm[bench]'")
    return ways | {"one .pt per sample": torch_files, "webdataset, a tar of .npy": tar}


def write_everything(folder: Path, store: Path, dtype: str):
    """Returns the store's index and a memory map of all rows."""
    import torch

    from pipeline import int8
    from pipeline.index import Index
    from pipeline.store import create_array, write_shard

    index = Index.__new__(Index)  # of rows that have no images
    index.folder, index.count, index.shard_rows, index.shards = store / "index", ROWS, SHARD_ROWS, ROWS // SHARD_ROWS
    index.description = {}
    channels = [1.0] * SHAPE[-1]
    more = {"channel_scale": channels, "channel_scale_sha256": int8.digest(channels)} if dtype == "int8" else {}
    create_array(store, ARRAY, index, SHAPE, dtype, {}, {}, more)
    if dtype == "int8":
        create_array(store, "clip/39/scale", index, SHAPE[:1], "float16", {}, {})
    plain = np.lib.format.open_memmap(folder / "m.npy", "w+", np.dtype(dtype), (ROWS, *SHAPE))
    draw, ids = np.random.default_rng(0), [str(i) for i in range(SHARD_ROWS)]
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for shard in range(index.shards):
            block = draw.standard_normal((SHARD_ROWS, *SHAPE), np.float32)
            block = (block * (40 if dtype == "int8" else 1)).astype(dtype)
            write_shard(store, ARRAY, index, shard, block, ids, [], 0.0)
            if dtype == "int8":
                write_shard(
                    store, "clip/39/scale", index, shard, np.ones((SHARD_ROWS, SHAPE[0]), np.float16), ids, [], 0.0
                )
            first = shard * SHARD_ROWS
            plain[first : first + SHARD_ROWS] = block
            for row, values in enumerate(block, first):
                torch.save(torch.from_numpy(values.copy()), folder / f"{row}.pt")
                member, content = tarfile.TarInfo(f"{row:06}.npy"), io.BytesIO()
                np.save(content, values)
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)
    return index, plain


def tar_samples(file: Path) -> Iterator[np.ndarray]:
    """The arrays of a tar again and again, by webdataset where it is installed."""
    try:
        import webdataset

        dataset = webdataset.WebDataset(str(file), shardshuffle=False)  # type: ignore[attr-defined]
        while True:
            for sample in dataset:
                yield np.load(io.BytesIO(sample["npy"]))
    except ImportError:
        say("webdataset is not installed: Python's tarfile reads the tar")
        for _ in cycle([0]):
            with tarfile.open(file) as tar:
                for member in tar:
                    yield np.load(tar.extractfile(member))  # type: ignore[arg-type]


def with_zarrs(folder: Path, store: Path, out: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    import zarr
    import zarrs  # noqa: F401 - registers the pipeline

    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}):
        array = zarr.open_array(store, path=ARRAY, mode="r")
    return lambda chosen: np.asarray(array.oindex[chosen])


def with_tensorstore(folder: Path, store: Path, out: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    import tensorstore

    one = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}
    place = {"driver": "file", "path": str(store / ARRAY)}
    array = tensorstore.open({"driver": "zarr3", "kvstore": place, "context": one}).result()

    def read(chosen: np.ndarray) -> np.ndarray:
        with tensorstore.Batch() as batch:
            waiting = [array[row].read(batch=batch) for row in chosen.tolist()]
        for place, future in zip(out, waiting, strict=True):
            np.copyto(place, future.result())
        return out

    return read


def with_h5py(folder: Path, store: Path, out: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    import h5py

    with h5py.File(folder / "m.h5", "w") as file:
        file.create_dataset("x", data=np.load(folder / "m.npy", mmap_mode="r"))
    dataset = h5py.File(folder / "m.h5")["x"]

    def read(chosen: np.ndarray) -> np.ndarray:
        for place, row in zip(out, chosen.tolist(), strict=True):
            dataset.read_direct(place, np.s_[row], np.s_[:])  # type: ignore[union-attr]
        return out

    return read
