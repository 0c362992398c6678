"""int8 features as a data model that any Zarr reader decodes: tokens[n, t, c] * scale[n, t] * channel_scale[c].

`scale` is an fp16 array beside the int8 tokens; `channel_scale` is an attribute of the tokens, taken once from a sample.
Per-token scales alone cost 5% relative RMSE on vision features with outlier channels, both together under 1%.
"""

import hashlib

import numpy as np

LIMIT = 127
TOKENS_AT_ONCE = 96  # of 1408 channels in float32 are 540 KB, which the CPU's cache holds


def channel_scales(sample: np.ndarray) -> np.ndarray:
    """float32 [channels]: the largest magnitude of each channel in float32 [images, tokens, channels]."""
    largest = np.abs(sample.astype(np.float32)).max((0, 1))
    return np.where(largest > 0, largest, 1).astype(np.float32)


def digest(channels: list[float] | None) -> str | None:
    """The sha256 of channel scales as float32, as it stands beside them; None where there are none."""
    return None if channels is None else hashlib.sha256(np.array(channels, "<f4").tobytes()).hexdigest()


def quantise(values: np.ndarray, channels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float [N, T, C] -> int8 [N, T, C] and its token scales, float16 [N, T]. A token of zeros has scale 0."""
    relative = values.astype(np.float32) / channels
    scale = (np.abs(relative).max(-1) / LIMIT).astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.clip(np.rint(relative / divisor[..., None]), -LIMIT, LIMIT).astype(np.int8), scale


def dequantise(tokens: np.ndarray, scale: np.ndarray, channels: np.ndarray) -> np.ndarray:
    """int8 [N, T, C] and float16 [N, T] -> float16 [N, T, C]."""
    return (tokens.astype(np.float32) * scale.astype(np.float32)[..., None] * channels).astype(np.float16)


def dequantise_into(out: np.ndarray, tokens: np.ndarray, scale: np.ndarray, channels: np.ndarray) -> None:
    """The same numbers into `out`, float16 [..., C]: torch converts to float32 and rounds to float16
    with vector instructions, and the float32 in between stays in the CPU's cache."""
    import torch

    width = len(channels)
    parts = out.reshape(-1, width), tokens.reshape(-1, width), scale.reshape(-1, 1).astype(np.float32)
    target, source, factor = (torch.from_numpy(part) for part in parts)
    step = -(-len(target) // max(1, -(-len(target) // TOKENS_AT_ONCE)))  # pieces of one size
    channel, between = torch.from_numpy(channels), torch.empty(step, width)
    for piece in zip(target.split(step), source.split(step), factor.split(step), strict=True):
        values = between[: len(piece[0])].copy_(piece[1])
        piece[0].copy_(values.mul_(piece[2]).mul_(channel))


def fidelity(exact: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """How far decoded features [N, T, C] are from the exact ones: relative RMSE, mean cosine, the worst token's both."""
    exact, decoded = exact.astype(np.float64), decoded.astype(np.float64)
    norm = np.sqrt((exact**2).sum(-1)) + 1e-12
    error = np.sqrt(((exact - decoded) ** 2).sum(-1))
    cosine = (exact * decoded).sum(-1) / (norm * (np.sqrt((decoded**2).sum(-1)) + 1e-12))
    return {
        "relative_rmse": float(np.sqrt((error**2).sum() / (norm**2).sum())),
        "cosine": float(cosine.mean()),
        "worst_token_relative_rmse": float((error / norm).max()),
        "worst_token_cosine": float(cosine.min()),
    }
