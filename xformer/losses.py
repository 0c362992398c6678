"""The four losses of stage 1 as pure functions on tensors (X-Former, section 3.2; LAVIS blip2_qformer.py).

Means are over samples that may be unequal in number on the ranks of one run: `count`, where given, is what a sum is
divided by instead of this rank's own number (xformer/gather.py, mean_over_ranks).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

ITM_CONSTANT = 0.6365141682948128  # loss of the predictor that says 1/3 always: the entropy of (1/3, 2/3)


def full(x: Tensor) -> Tensor:
    """At least float32: losses of half-precision logits are computed in float32, those of float64 stay float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def similarity(queries: Tensor, texts: Tensor) -> Tensor:
    """Normalised queries [I, Q, P] and texts [T, P] -> [I, T], the maximum over queries."""
    return torch.einsum("iqp,tp->itq", queries, texts).amax(-1)


def itc(
    queries: Tensor, texts: Tensor, all_queries: Tensor, all_texts: Tensor, temperature: Tensor, same: Tensor,
    smoothing: float,
) -> Tensor:  # fmt: skip
    """Image-text contrastive loss over the gathered batch.

    Args:
        queries: [B, Q, P] of this rank, normalised; texts: [B, P].
        all_queries: [G, Q, P] of all ranks in rank order; all_texts: [G, P].
        same: bool [B, G], true where the columns show this row's image or say the same; several are all positives.
        smoothing: label smoothing (LAVIS: 0.1).
    """
    targets = same.to(torch.promote_types(queries.dtype, torch.float32)) / same.sum(1, keepdim=True)
    targets = targets * (1 - smoothing) + smoothing / same.shape[1]
    to_text = similarity(queries, all_texts) / temperature
    to_image = similarity(all_queries, texts).T / temperature
    return -((targets * to_text.log_softmax(1)).sum(1) + (targets * to_image.log_softmax(1)).sum(1)).mean() / 2


def hard_negatives(similarities: Tensor, same: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One negative column per row, drawn from softmax(similarities) by inverting its distribution function.

    Args:
        similarities: [B, G], scaled by the temperature; zeros draw uniformly.
        same: bool [B, G], never drawn.
        uniform: [B] in [0, 1), what decides each row; the same number and row draw the same on any number of ranks.

    Returns: columns int64 [B] and bool [B], false where a row has no eligible column.
    """
    logits = similarities.double().masked_fill(same, float("-inf"))
    eligible = ~same.all(1)
    weights = torch.where(eligible[:, None], logits.softmax(1), torch.ones_like(logits)).cumsum(1)
    aim = uniform.to(weights)[:, None] * weights[:, -1:]
    columns = torch.searchsorted(weights, aim, right=True)[:, 0]  # right: never a column of weight 0
    return columns.clamp(max=same.shape[1] - 1), eligible


def itm(logits: Tensor, labels: Tensor, count: Tensor | None = None) -> Tensor:
    """Image-text matching: logits [N, Q, 2] averaged over the queries, labels int64 [N]."""
    total = F.cross_entropy(full(logits.mean(1)), labels, reduction="sum")
    return total / (len(labels) if count is None else count)


def itg(logits: Tensor, labels: Tensor, smoothing: float, count: Tensor | None = None) -> Tensor:
    """Image-grounded text generation: logits [B, T, V] for labels int64 [B, T], -100 = no loss; without any label 0."""
    total = F.cross_entropy(
        full(logits.flatten(0, 1)), labels.flatten(), ignore_index=-100, label_smoothing=smoothing, reduction="sum"
    )
    return total / ((labels != -100).sum() if count is None else count).clamp(min=1)


def patchify(pixels: Tensor, patch: int) -> Tensor:
    """[B, 3, S, S] -> [B, patches in raster order, patch * patch * 3], channels last (mae models_mae.py)."""
    b, c, s, _ = pixels.shape
    n = s // patch
    return pixels.reshape(b, c, n, patch, n, patch).permute(0, 2, 4, 3, 5, 1).reshape(b, n * n, patch * patch * c)


def reconstruction(
    predicted: Tensor, pixels: Tensor, kept: Tensor, patch: int, norm_pix: bool, count: Tensor | None = None
) -> Tensor:
    """The MAE loss: mean squared error on masked patches only (He et al. 2022; models_mae.py forward_loss).

    Args:
        predicted: [B, patches, patch * patch * 3]; pixels: [B, 3, S, S], normalised as the MAE was trained.
        kept: bool [B, patches], true = visible, carries no loss.
        norm_pix: targets normalised per patch with the unbiased variance + 1e-6.
    """
    target = patchify(full(pixels), patch)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = ((full(predicted) - target) ** 2).mean(-1)[~kept]
    return errors.sum() / (len(errors) if count is None else count)
