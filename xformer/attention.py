"""Where queries look: attention weights of the last cross-attention to each kind of tokens, recomputed from its inputs."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xformer.dual import CrossAttention
from xformer.model import XFormer
from xformer.qformer import Attention, split_heads


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """[B, heads, Q, d] and [B, heads, N, d] -> [B, Q, N], the mean over heads."""
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1).mean(1)


@contextmanager
def _watch(blocks: dict[str, torch.nn.Module], seen: dict[str, Tensor]) -> Iterator[None]:
    def note(name: str):
        def hook(block: torch.nn.Module, inputs: tuple) -> None:
            if isinstance(block, Attention):
                seen[name] = _weights(split_heads(block.query(inputs[0]), block.heads), inputs[1][0])
            elif isinstance(block, CrossAttention):
                query = split_heads(block.query(block.norm(inputs[0])), block.heads)
                seen[name] = _weights(query, split_heads(block.key(inputs[1]), block.heads))

        return hook

    handles = [block.register_forward_pre_hook(note(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_maps(
    bridge: XFormer, clip: Tensor, local: Tensor | None
) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
    """C [B, N, Wc] and M [B, L, Wm] -> weights {"clip": [B, Q, N], "local": [B, Q, L] where M is read}, Z', and M'.

    X-Former's queries see M through block 2 of the dual cross-attention; early cross-attention's through its own layers;
    a concatenation's weights over (C, M*) are cut in two.
    """
    qformer, seen = bridge.qformer, {}
    layers: Any = qformer.layers
    numbered = [(i, layer.crossattention) for i, layer in enumerate(layers)]
    blocks = {"clip": [b for i, b in numbered if i % qformer.cross_every == 0][-1]}
    early = [b for i, b in numbered if i % qformer.cross_every and b is not None]
    if early:
        blocks["local"] = early[-1]
    if bridge.dual is not None:
        last: Any = bridge.dual.layers[-1]
        blocks["local"] = last["queries"]
    with _watch(blocks, seen):
        enhanced, rebuilt = bridge(clip, local)
    if bridge.concat is not None:
        n = clip.shape[1]
        seen = {"clip": seen["clip"][..., :n], "local": seen["clip"][..., n:]}
    return seen, enhanced, rebuilt


def query_similarity(enhanced: Tensor) -> Tensor:
    """Z' [B, Q, W] -> cosine similarity of the queries, [B, Q, Q]."""
    unit = torch.nn.functional.normalize(enhanced, dim=-1)
    return unit @ unit.transpose(1, 2)
