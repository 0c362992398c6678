"""What the ranks of one run tell each other, explicit and outside the losses. On one process everything is the identity.

Features are frozen rows of a cache that no gradient reaches. So ranks exchange projections, texts and choices, which
are small, and of the images' tokens only the rows that were drawn as negatives.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

_alone = False


def rank_and_world() -> tuple[int, int]:
    together = not _alone and dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if together else (0, 1)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: for validation, which one rank does by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(found, x)
        return torch.cat(found)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)  # every rank's loss depends on every rank's part
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x: Tensor) -> Tensor:
    """[B, ...] of every rank -> [world * B, ...] in rank order; gradients flow back to every rank."""
    if rank_and_world()[1] == 1:
        return x
    return _Gather.apply(x.contiguous())  # type: ignore[return-value]


def gather_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of every rank, ids int64 [world * B, T] and mask bool, padded to the longest of all."""
    if rank_and_world()[1] == 1:
        return ids, mask
    pad = (0, int(gather(torch.tensor([ids.shape[1]], device=ids.device)).max()) - ids.shape[1])
    return gather(F.pad(ids, pad)), gather(F.pad(mask, pad).byte()).bool()


def mean_over_ranks(counts: Tensor) -> Tensor:
    """The mean of a number over the ranks, float32. Sums divided by it, and gradients averaged over the ranks as DDP
    does, give the mean over all samples, where each rank's own mean would weigh a rank with few samples too much."""
    counts = counts.float()
    world = rank_and_world()[1]
    if world > 1:
        dist.all_reduce(counts)
    return counts / world


def exchange_rows(tensors: list[Tensor], chosen: Tensor) -> tuple[list[Tensor], Tensor]:
    """Brings the rows that this rank has chosen from other ranks, each once, and no others.

    Args:
        tensors: [B, ...] each, of equal B on every rank; no gradient flows.
        chosen: int64 [B], rows of the gathered batch [world * B].

    Returns: per tensor the foreign rows [n, ...], and int64 [B], the chosen rows' places among own rows, then foreign.
    """
    rank, world = rank_and_world()
    if world == 1:
        return [x[:0] for x in tensors], chosen
    size = len(chosen)
    wanted = [torch.unique(part[part // size != r]) for r, part in enumerate(gather(chosen).chunk(world))]
    take = [rows[rows // size == rank] - rank * size for rows in wanted]  # what each of the others gets from here
    received = [int((wanted[rank] // size == r).sum()) for r in range(world)]
    found = []
    for x in tensors:
        out = x.new_empty((sum(received), *x.shape[1:]))
        dist.all_to_all_single(out, x[torch.cat(take)].contiguous(), received, [len(rows) for rows in take])
        found.append(out)
    own = chosen // size == rank
    return found, torch.where(own, chosen - rank * size, size + torch.searchsorted(wanted[rank], chosen))
