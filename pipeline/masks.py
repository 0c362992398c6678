"""Mask draws: which patches of an image the MAE sees. A pure function of (mask seed, draw, sample id, geometry)."""

import hashlib

import numpy as np

ALGORITHM = "philox4x64/sha256(seed,draw,id)/smallest-noise/raster"


def noise(mask_seed: int, draw: int, sample_id: str, patches: int) -> np.ndarray:
    """Uniform noise, float64 [patches], the same on every machine, in every order, on every worker."""
    digest = hashlib.sha256(f"{mask_seed}/{draw}/{sample_id}".encode()).digest()
    key = np.frombuffer(digest[:16], "<u8")
    return np.random.Generator(np.random.Philox(key=key)).random(patches)


def kept_count(patches: int, mask_ratio: float) -> int:
    """How many patches stay visible; facebookresearch/mae models_mae.py truncates in the same way."""
    return int(patches * (1 - mask_ratio))


def kept_patches(mask_seed: int, draw: int, sample_id: str, patches: int, mask_ratio: float) -> np.ndarray:
    """The visible patches: those with the smallest noise, in raster order; int64 [kept]."""
    values = noise(mask_seed, draw, sample_id, patches)
    return np.sort(np.argsort(values, kind="stable")[: kept_count(patches, mask_ratio)])


def pack(kept: np.ndarray, patches: int) -> np.ndarray:
    """Visible patches as bits, uint8 [ceil(patches / 8)], patch 0 in the highest bit of byte 0."""
    bits = np.zeros(patches, bool)
    bits[kept] = True
    return np.packbits(bits)


def unpack(packed: np.ndarray, patches: int) -> np.ndarray:
    """Bits back to a boolean array [..., patches], true = visible."""
    return np.unpackbits(packed, axis=-1, count=patches).astype(bool)
