"""Commit records that are lost: they come back from whole shards, and no alive row ever dies of it."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import adopt, audit, commits, store, upkeep
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from pipeline.redo import repair
from tests.pipeline.test_extract import shards, withdraw
from xformer.settings import load_settings


def world(tmp_path: Path, *overrides: str) -> tuple[Path, Path]:
    """A store of sixteen pictures, of which 05 and 12 are dead in all arrays, and 03 is black; and an empty folder."""
    folder, path, draw = tmp_path / "pictures", tmp_path / "s.zarr", random.Random(0)
    folder.mkdir()
    (tmp_path / "empty").mkdir()
    for i in range(16):
        colour = (0, 0, 0) if i == 3 else (draw.randrange(1, 256), i, 9)
        Image.new("RGB", (8, 8), colour).save(folder / f"{i:02d}.png")
    given = ["store.shard_rows=4", "mae.draws=1", "corpus.max_dead_fraction=0.5", *overrides]
    settings, source = load_settings(overrides=given), open_corpus(folder)
    (folder / "12.png").write_bytes(b"broken")
    plan_index(path, source, settings, None)
    (folder / "05.png").write_bytes(b"changed since")
    extract(source, path, ["clip", "mae"], settings, in_process=True, force=True)
    return folder, path


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_lost_commit_record_comes_back_from_its_whole_shard(tmp_path: Path, dtype: str) -> None:
    """No picture is there, so that nothing can be encoded; records come back but for the seconds."""
    _, path = world(tmp_path, f"store.dtype={dtype}")
    before, names = shards(path), store.array_names(path)
    records = {name: commits.committed(path, name) for name in names}
    for name in names:
        withdraw(path, name, set())
        for shard in (0, 1, 3):
            if name != "mae/draw-0/tokens":
                commits.commit_file(path, name, shard).write_text("{")
    repaired, left = repair(path, tmp_path / "empty", in_process=True)
    assert len(repaired) == 3 * (len(names) - 1) and left == [] and shards(path) == before
    told = {name: {s: r | {"seconds": 0} for s, r in commits.committed(path, name).items()} for name in names}
    assert told == {name: {s: r | {"seconds": 0} for s, r in records[name].items()} for name in names}
    assert audit.verify(path) == [] and (path / names[0] / "commits" / commits.SEALED).is_file()


def test_whole_shards_without_any_record_are_adopted(tmp_path: Path) -> None:
    _, path = world(tmp_path)
    before, name = shards(path), "clip/5/tokens"
    shutil.rmtree(path / name / "commits")
    file = store.shard_file(path, name, 2, 3)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    repaired, left = repair(path, tmp_path / "empty", in_process=True)
    assert "3 of 4 shards are whole and have one again" in repaired[0] and left == []
    assert sorted(commits.committed(path, name)) == [0, 1, 3] and shards(path).keys() == before.keys()
    array = store.FeatureStore(path).array(name)
    assert array.missing_shards == [2] and array.dead_rows.tolist() == [5, 12]


def test_a_reason_that_nothing_tells_is_said_to_be_lost(tmp_path: Path) -> None:
    _, path = world(tmp_path)
    upkeep.drop(path, ["mae", "pixels"])
    withdraw(path, "clip/5/tokens", set())
    commits.commit_file(path, "clip/5/tokens", 1).write_text("{")
    assert repair(path, tmp_path / "empty", in_process=True)[1] == []
    assert store.FeatureStore(path).array("clip/5/tokens").dead[5] == adopt.LOST


def test_no_alive_row_dies_of_a_lost_record(tmp_path: Path) -> None:
    """Record and shard are damaged, and a picture is away: the shard stays as it is and is named, until it is back."""
    folder, path = world(tmp_path)
    before, name = shards(path), "clip/5/tokens"
    withdraw(path, name, set())
    record, file = commits.commit_file(path, name, 1), store.shard_file(path, name, 1, 3)
    record.write_text("{")
    file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    damaged = shards(path)
    away = (folder / "06.png").rename(tmp_path / "06.png")
    _, left = repair(path, in_process=True)
    assert shards(path) == damaged and record.read_text() == "{"
    assert any("clip/5/tokens shard 1: 06.png: " in line for line in left)
    away.rename(folder / "06.png")
    assert repair(path, in_process=True)[1] == [] and shards(path) == before
    assert store.FeatureStore(path).array(name).dead_rows.tolist() == [5, 12]


def test_a_shard_that_is_not_whole_has_no_rows() -> None:
    block = np.arange(24, dtype=np.float16).reshape(3, 4, 2)
    content = bytes(store.shard_bytes(block, 4))
    found = adopt.rows_of(content, block.shape, block.dtype, 4)
    assert found is not None and (found == block).all()
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert adopt.rows_of(bytes(flipped), block.shape, block.dtype, 4) is None
    assert adopt.rows_of(content[:-1], block.shape, block.dtype, 4) is None
