"""Damaged stores: every flipped bit is named and repaired, and a cut shard never gives zeros."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline import store, upkeep
from pipeline.extract import extract_again
from tests.faults.report import line
from tests.pipeline.test_extract import shards
from xformer.console import quietly
from xformer.errors import StoreError


@pytest.mark.parametrize("flips", [12, pytest.param(300, marks=pytest.mark.slow)])
def test_flipped_bits_are_named_and_only_their_shards_are_made_again(
    features: Path, tmp_path: Path, flips: int
) -> None:
    """Flips come in groups of four shards, in any array, so that a repair has several to do and the rest to leave."""
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    wanted, draw, named, repaired = shards(path), random.Random(0), 0, 0
    files = [path / name for name in wanted if not name.startswith("index/")]
    for _ in range(flips // 4):
        chosen = draw.sample(files, 4)
        times = {file: file.stat().st_mtime_ns for file in files}
        for file in chosen:
            content = bytearray(file.read_bytes())
            bit = draw.randrange(len(content) * 8)
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
        problems = upkeep.verify(path, repair=True)
        named += sum(any(problem.startswith(f"{file}:") for problem in problems) for file in chosen)
        assert len(problems) == 4
        with quietly():
            extract_again(path)
        changed = {file for file in files if file.stat().st_mtime_ns != times[file]}
        repaired += 4 * (shards(path) == wanted and changed == set(chosen))
    line("a flipped bit: named by verify", flips, named)
    line("a flipped bit: exactly its shard made again", flips, repaired)


@pytest.mark.parametrize("part", [0, 0.01, 0.25, 0.5, 0.75, 0.99])
def test_a_cut_shard_of_any_array_is_an_error_and_never_zeros(features: Path, tmp_path: Path, part: float) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    names = store.array_names(path)
    refused = 0
    for name in names:
        array = store.FeatureStore(path).array(name)
        file = store.shard_file(path, name, 1, 1 + len(array.shape))
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * part)])
        for row in (32, 47, 63):
            out = np.full((1, *array.shape), 7, array.dtype)
            with pytest.raises(StoreError, match="damaged"):
                array.read([row], out)
            refused += bool((out == 7).all())
        assert array.read([0, 64]).any()
        file.write_bytes(content)
    line(f"a shard cut to {part:.0%}: rows asked for, none delivered", 3 * len(names), refused)


def test_a_flipped_bit_of_the_index_is_named(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    draw, named = random.Random(0), 0
    files = [path / "index/rows.parquet", path / "index/captions.arrow", path / "index/c/0/0"]
    for file in files:
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(StoreError) as caught:
            upkeep.verify(path)
        named += str(caught.value).startswith(f"{file}: its bytes")
        file.write_bytes(content)
    assert upkeep.verify(path) == []
    line("a flipped bit of the index: named by verify", len(files), named)
