"""Runs of an ablation side by side on Dask workers: one or more per GPU, or several processes of this machine.

A slow test runs two processes on one CPU machine; the GPU path is the same code with one CUDA device per worker, and has
not run on several GPUs yet.
"""

import asyncio
import concurrent.futures
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from xformer.console import say
from xformer.errors import TrainingError
from xformer.lab.run import Run, finish, train_first

TOPIC = "xformer runs"  # what workers tell


def on_dask(runs: list[Run], workers: int, gpus: bool, scheduler: str | None) -> Iterator[Run]:
    """Yields runs as they are finished; a stage 1 that several variants share is trained once, before them.

    Args:
        gpus: the workers share the CUDA devices of this machine, each of which has at least one.
        scheduler: the address of a cluster that runs already, whose workers see one device each and the same folders.

    Raises: TrainingError where a worker dies again and again, or the scheduler is lost; and what a run raises.
    """
    import dask
    from distributed import Client, as_completed
    from distributed.scheduler import KilledWorker

    dask.config.set({"distributed.scheduler.allowed-failures": 2})
    cluster = None if scheduler else _cluster(min(workers, len(runs)), gpus)
    try:
        with Client(cluster or scheduler, timeout=20) as client:
            client.subscribe_topic(TOPIC, lambda event: say(event[1]))
            first = {}
            for place, run in enumerate(runs):
                if run.stage1 not in first:
                    first[run.stage1] = client.submit(_first, run, pure=False, priority=-place)
            last = {
                client.submit(_last, run, first[run.stage1], pure=False, priority=-place): run
                for place, run in enumerate(runs)
            }
            for future in as_completed(list(last)):
                try:
                    future.result()
                except KilledWorker:
                    raise TrainingError(
                        f"{last[future].name} killed its worker three times; look at memory and at the system's log. What "
                        "is finished stays: run the same command again to go on."
                    ) from None
                yield last[future]
    except (TimeoutError, ConnectionError, concurrent.futures.CancelledError, asyncio.CancelledError) as error:
        raise TrainingError(f"the Dask scheduler is lost ({error}); run the same command again to go on.") from None
    finally:
        if cluster is not None:
            with suppress(TimeoutError):  # on a busy machine; what is done is done
                cluster.close(timeout=5)


def devices(workers: int) -> list[int]:
    """The CUDA device of each worker: every device has one, and further workers share them in turn. Raises TrainingError
    where there is none."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise TrainingError("--gpus: this machine has no CUDA device; use --workers N.")
    return [number % count for number in range(max(workers, count))]


def _cluster(workers: int, gpus: bool):
    """Worker processes on this machine that share its cores, and with `gpus` its CUDA devices."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    # unset: with Dask's 64 KiB the memory of every layer goes back to the system, a third of a CPU trainer's time
    dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None})
    places: list[int | None] = [*devices(workers)] if gpus else [None] * workers
    threads = str(max(1, (os.cpu_count() or 1) // len(places)))
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # a share of the machine's: its first is this process's device 0
    visible = given.split(",") if given else [str(device) for device in range(len(places))]
    specs = {}
    for number, device in enumerate(places):
        environment = {"OMP_NUM_THREADS": threads}
        environment |= {} if device is None else {"CUDA_VISIBLE_DEVICES": visible[device]}
        options = {"nthreads": 1, "env": environment, "memory_limit": 0, "host": "127.0.0.1", "dashboard_address": None}
        specs[number] = {"cls": Nanny, "options": options | {"silence_logs": logging.CRITICAL}}
    http = "127.0.0.1:0"  # any free port: two ablations of one machine do not meet
    head = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard": False, "dashboard_address": http}}
    return SpecCluster(workers=specs, scheduler=head, silence_logs=logging.CRITICAL)  # type: ignore[arg-type]  # a level, as in LocalCluster


def _first(run: Run) -> Path:
    _prepare()
    if not (run.stage1 / "summary.json").is_file():
        _tell(f"{run.stage1.name} begins")
    train_first(run)
    return run.stage1


def _last(run: Run, stage1: Path) -> str:
    _prepare()
    _tell(f"{run.name}: stage 2 and evaluation begin")
    finish(run)
    return run.name


def _tell(text: str) -> None:
    from distributed import get_worker

    get_worker().log_event(TOPIC, text)


def _prepare() -> None:
    import torch

    from xformer.console import set_quiet

    set_quiet(True)  # several runs share one terminal; the ablation speaks for them
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
