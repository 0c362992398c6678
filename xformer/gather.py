"""Gathering across ranks, explicit and outside the losses. On one process everything is the identity."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def gather(x: Tensor) -> Tensor:
    """[B, ...] of every rank -> [world * B, ...] in rank order; gradients flow back to every rank."""
    if rank_and_world()[1] == 1:
        return x
    warnings.filterwarnings("ignore", message=".*all_gather is deprecated", category=FutureWarning)
    return torch.cat(list(all_gather(x.contiguous())))
