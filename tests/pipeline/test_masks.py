"""Masks are a pure function of (seed, draw, sample id)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline import masks


def test_the_generator_has_not_changed() -> None:
    assert masks.kept_patches(0, 0, "42", 64, 0.75).tolist() == GOLDEN


GOLDEN = [4, 8, 9, 17, 18, 20, 24, 26, 30, 36, 39, 43, 47, 54, 58, 61]


@given(st.text(max_size=20), st.integers(0, 5), st.sampled_from([0.0, 0.5, 0.75, 0.9]))
def test_kept_patches_are_sorted_distinct_and_survive_packing(key: str, draw: int, ratio: float) -> None:
    kept = masks.kept_patches(1, draw, key, 256, ratio)
    assert len(kept) == masks.kept_count(256, ratio) and (np.diff(kept) > 0).all()
    assert np.flatnonzero(masks.unpack(masks.pack(kept, 256), 256)).tolist() == kept.tolist()
    assert kept.tolist() == masks.kept_patches(1, draw, key, 256, ratio).tolist()


def test_the_paper_keeps_64_of_256_in_32_bytes() -> None:
    assert masks.kept_count(256, 0.75) == 64
    assert len(masks.pack(masks.kept_patches(0, 0, "a", 256, 0.75), 256)) == 32


def test_draws_ids_and_seeds_give_other_masks() -> None:
    base = masks.kept_patches(0, 0, "a", 256, 0.75).tolist()
    assert all(base != masks.kept_patches(*key, 256, 0.75).tolist() for key in ((1, 0, "a"), (0, 1, "a"), (0, 0, "b")))


def test_masks_are_uniform() -> None:
    seen = sum(masks.unpack(masks.pack(masks.kept_patches(0, 0, str(i), 64, 0.75), 64), 64) for i in range(2000))
    assert abs(seen / 2000 - 0.25).max() < 0.05
