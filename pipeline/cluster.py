"""Shards on processes: in this one, on a Dask cluster of this machine, or on one that runs already."""

import asyncio
import concurrent.futures
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.encode import encode_shard, find_crashers, remember_crashers
from pipeline.index import Index
from xformer.console import say
from xformer.errors import StoreError

IN_FLIGHT = 3  # shards in a worker: one decodes, one is in the encoder, one is written
MAX_TRIES = 4  # of a shard whose worker died, each after a search for the image that did it


# by shard: the arrays to make, its dead letters that are known, and where it is made again the commit record of each array
Todo = dict[int, tuple[list[str], list[dict], dict[str, dict]]]


@dataclass(frozen=True)
class Job:
    """What all shards of an extraction share."""

    store: str
    settings_json: str
    root: str
    gpus: bool


def run_here(job: Job, todo: Todo, workers: int, scheduler: str | None) -> Iterator[dict]:
    """In this process; decoding, encoding and writing overlap."""
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        waiting, left = [], iter(todo.items())
        try:
            while True:
                while len(waiting) < IN_FLIGHT and (item := next(left, None)) is not None:
                    shard, what = item
                    task = (job.store, shard, *what, job.settings_json, job.root, 0, job.gpus)
                    waiting.append(pool.submit(encode_shard, *task))
                if not waiting:
                    return
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def run_on_dask(job: Job, todo: Todo, workers: int, scheduler: str | None) -> Iterator[dict]:
    """Keeps a bounded window of shards in flight, so memory does not grow with the corpus.

    A shard that kills its worker again and again is searched for the image that does it, which becomes a dead letter.
    Raises: StoreError where the scheduler cannot be reached or is lost.
    """
    if not todo:
        return
    import logging
    import os

    import dask
    from distributed import Client, LocalCluster, as_completed
    from distributed.comm.core import CommClosedError
    from distributed.scheduler import KilledWorker

    dask.config.set(
        {
            "distributed.comm.timeouts.connect": "10s",
            "distributed.comm.retry.count": 0,
            "distributed.scheduler.allowed-failures": 3,
            # unset: with Dask's 64 KiB the memory of every layer goes back to the system, a fifth of a CPU encoder's time
            "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
        }
    )
    if job.gpus and scheduler is None:
        import torch

        workers = max(workers, torch.cuda.device_count())
    workers = min(workers, len(todo))
    cluster, tries = None, dict.fromkeys(todo, 0)
    threads = 0 if scheduler else max(1, (os.cpu_count() or 1) // workers)
    lost = StoreError(
        f"the Dask scheduler {scheduler or ''} is lost; what was committed stays, run the same command again."
    )
    try:
        if scheduler is None:
            try:
                cluster = LocalCluster(
                    n_workers=workers, threads_per_worker=IN_FLIGHT, host="127.0.0.1", dashboard_address=None,  # type: ignore
                    scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},  # its HTTP server: any free port
                    silence_logs=logging.CRITICAL, memory_limit=0,
                )  # fmt: skip
            except RuntimeError as error:
                raise StoreError(f"Dask's workers do not start ({error}); run the same command again.") from None
        for name in [name for name in logging.root.manager.loggerDict if name.startswith(("distributed", "tornado"))]:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # one sentence of ours says what a person needs
        try:
            connected = Client(cluster or scheduler, timeout=10)
        except (TimeoutError, OSError):
            raise StoreError(f"no Dask scheduler answers at {scheduler or 'this machine'}; start it first.") from None
        with connected as client:
            width = max(workers, len(client.scheduler_info(n_workers=-1)["workers"])) * (IN_FLIGHT + 1)
            waiting, shard_of = iter(todo), {}

            def submit(shard: int):
                task = (job.store, shard, *todo[shard], job.settings_json, job.root, threads, job.gpus)
                future = client.submit(encode_shard, *task, pure=False)
                shard_of[future.key] = shard
                return future

            window = as_completed([submit(shard) for _, shard in zip(range(width), waiting, strict=False)])
            for future in window:
                shard = shard_of.pop(future.key)
                try:
                    result = future.result()
                except KilledWorker:
                    tries[shard] += 1
                    _search(job, shard, todo[shard][0], tries[shard])
                    window.add(submit(shard))
                    continue
                yield result
                if (shard := next(waiting, None)) is not None:
                    window.add(submit(shard))
            if client.status != "running":
                raise lost
    except (CommClosedError, TimeoutError, OSError, concurrent.futures.CancelledError, asyncio.CancelledError) as error:
        if (
            isinstance(error, OSError)
            and error.errno is not None
            and not isinstance(error, TimeoutError | ConnectionError)
        ):
            raise
        raise lost from None
    finally:
        if cluster is not None:
            with suppress(TimeoutError):  # on a busy machine; what is done is done, and the processes end with this one
                cluster.close(timeout=5)


def _search(job: Job, shard: int, names: list[str], tries: int) -> None:
    if tries == MAX_TRIES:
        raise StoreError(f"shard {shard} killed its worker {tries * 4} times; look at memory and at the system's log.")
    start, stop = Index(Path(job.store) / "index").bounds(shard)
    say(f"shard {shard} kills its workers; searching for the image that does it")
    rows = find_crashers(job.store, shard, (names, job.settings_json, job.root), list(range(start, stop)))
    remember_crashers(Path(job.store), rows)
