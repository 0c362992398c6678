"""Merging stores: the bytes of one extraction, whatever was made where; what differs is refused by name."""

import shutil
from pathlib import Path

import pytest

from cli import main
from pipeline import audit, commits, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from pipeline.merge import merge
from pipeline.redo import repair
from tests.pipeline.test_extract import shards, withdraw
from xformer.errors import StoreError
from xformer.settings import Settings, load_settings


def test_partial_stores_become_the_store_of_one_extraction(
    features: Path, corpus: Path, settings: Settings, tmp_path: Path
) -> None:
    """One machine made CLIP and half of a draw, another the other half and the rest."""
    source = open_corpus(corpus)
    for name, kinds in (("a", ["clip", "mae"]), ("b", ["mae"])):
        extract(source, tmp_path / f"{name}.zarr", kinds, settings, in_process=True)
    withdraw(tmp_path / "a.zarr", "mae/draw-0/tokens", {1, 2})
    withdraw(tmp_path / "b.zarr", "mae/draw-0/tokens", {0})
    shutil.rmtree(tmp_path / "a.zarr/mae/draw-1")
    out = tmp_path / "all.zarr"
    main(["store", "merge", str(out), str(tmp_path / "a.zarr")])
    assert store.FeatureStore(out).array("mae/draw-0/tokens").missing_shards == [1, 2]
    main(["store", "merge", str(out), str(tmp_path / "b.zarr")])
    assert audit.verify(out) == [] and shards(out) == shards(features)
    assert all((out / name / "commits/sealed.parquet").is_file() for name in store.array_names(out))
    file = store.shard_file(out, "mae/draw-1/tokens", 1, 3)  # of the second source, whose provenance came with it
    file.write_bytes(b"damaged")
    repaired, left = repair(out, in_process=True)
    assert len(repaired) == 1 and left == [] and shards(out) == shards(features)
    again = merge(out, [tmp_path / "a.zarr", tmp_path / "b.zarr"])
    assert again["copied"] == 0 and again["missing"] == {}


def test_what_does_not_belong_together_is_named_and_nothing_is_copied(
    features: Path, corpus: Path, settings: Settings, tmp_path: Path
) -> None:
    source, before = open_corpus(corpus), shards(features)
    other = load_settings(overrides=["store.shard_rows=32", "clip.mean=[0,0,0]"])
    extract(source, tmp_path / "norm.zarr", ["clip"], other, in_process=True)
    with pytest.raises(StoreError, match="clip/5/tokens was made in another way.*norm is"):
        merge(features, [tmp_path / "norm.zarr"])
    extract(source, tmp_path / "few.zarr", ["clip"], settings, limit=40, in_process=True)
    with pytest.raises(StoreError, match="other rows.*captions is 384"):
        merge(features, [tmp_path / "few.zarr"])
    damaged = Path(shutil.copytree(features, tmp_path / "damaged.zarr"))
    file = store.shard_file(damaged, "clip/5/tokens", 2, 3)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="c/2/0/0 is damaged"):
        merge(tmp_path / "new.zarr", [damaged])
    assert sorted(commits.committed(tmp_path / "new.zarr", "clip/5/tokens")) == [0, 1]
    with pytest.raises(StoreError, match="itself"):
        merge(features, [features])
    (tmp_path / "mine/index").mkdir(parents=True)
    for file in ("mine/zarr.json", "mine/index/notes.txt"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(StoreError, match="holds other files"):
        merge(tmp_path / "mine", [features])
    assert (tmp_path / "mine/index/notes.txt").read_text() == "{}"
    with pytest.raises(StoreError, match="no feature store"):
        merge(tmp_path / "newer.zarr", [tmp_path / "nowhere.zarr"])
    assert shards(features) == before and not (tmp_path / "newer.zarr").exists()
