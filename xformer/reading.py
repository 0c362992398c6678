"""Batches read ahead of the steps: in threads, straight into buffers that are used again and again."""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from xformer.data import Features, Pairs
from xformer.model import Batch
from xformer.order import Schedule


@dataclass
class Reading:
    """One step's samples. `batch` and `captions` are this process's; `numbers`, int64 [global batch], are all its pairs."""

    step: int
    epoch: int
    draw: int
    numbers: np.ndarray
    batch: Batch
    captions: list[str]

    @property
    def digest(self) -> str:
        """A short hash of the pairs of all processes in order: runs that agree in it were fed the same samples."""
        return hashlib.sha256(self.numbers.astype("<i8").tobytes()).hexdigest()[:16]


def stream(
    pairs: Pairs, schedule: Schedule, start: int, rank: int, world: int, draws: int, parts: int = 1, threads: int = 2,
    ahead: int = 2,
) -> Iterator[Reading]:  # fmt: skip
    """Yields every step from `start` on. A batch's memory is used again once the next one is asked for.

    Args:
        parts: gradient accumulation; a batch holds this process's share of each part, one part after the other.
        threads: read the rows; one more prepares the batches in order. ahead: batches read before they are asked for.
    """
    share = schedule.batch // world
    order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
    pinned = torch.cuda.is_available()
    free = deque(pairs.caches[0].buffers(share, pinned) for _ in range(ahead + 1))
    waiting: deque[tuple[Future[Reading], Features]] = deque()

    def load(step: int, numbers: np.ndarray, buffers: Features) -> Reading:
        epoch = step // schedule.per_epoch
        draw = epoch % draws if draws else 0
        mine = numbers.reshape(parts, world, -1)[:, rank].ravel()
        return Reading(step, epoch, draw, numbers.ravel(), *pairs.batch(mine, draw, buffers, readers))

    with ThreadPoolExecutor(threads, "reader") as readers, ThreadPoolExecutor(1, "batches") as batches:
        for step in range(start, schedule.steps + ahead):
            if step < schedule.steps:
                epoch = step // schedule.per_epoch
                if order[0] != epoch:
                    order = (epoch, schedule.order(epoch))
                buffers = free.popleft()
                numbers = schedule.numbers(order[1], step, parts)
                waiting.append((batches.submit(load, step, numbers, buffers), buffers))
            if step - start >= ahead and waiting:
                future, buffers = waiting.popleft()
                yield future.result()
                free.append(buffers)
