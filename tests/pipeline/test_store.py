"""The store: exact bytes in, exact bytes out, and an error wherever a row is not there."""

import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.ipc
import pytest
import zarr

from pipeline import audit, commits, contact, reader, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from pipeline.index import Index
from pipeline.merge import merge
from pipeline.redo import repair, retry
from tests.pipeline.test_extract import withdraw
from xformer.errors import StoreError
from xformer.settings import Settings, load_settings


def copy(features: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(features, tmp_path / "store.zarr"))


def shard(path: Path, name: str = "clip/5/tokens", number: int = 1) -> Path:
    return store.shard_file(path, name, number, 3)


def test_any_zarr_reader_opens_it(features: Path) -> None:
    group = zarr.open_group(features, mode="r")
    arrays = {n: a for n, a in group.members(max_depth=None) if isinstance(a, zarr.Array)}
    assert set(arrays) == {
        "clip/5/tokens", "mae/draw-0/tokens", "mae/draw-0/kept", "mae/draw-1/tokens", "mae/draw-1/kept", "pixels/view-0",
        "index",
    }  # fmt: skip
    assert arrays["clip/5/tokens"].shape == (128, 8, 96) and arrays["clip/5/tokens"].dtype == np.float16
    assert arrays["mae/draw-1/tokens"].shape == (128, 17, 96) and arrays["mae/draw-1/kept"].shape == (128, 8)
    assert arrays["clip/5/tokens"].chunks == (1, 8, 96) and arrays["clip/5/tokens"].shards == (32, 8, 96)
    assert arrays["mae/draw-1/tokens"].attrs["usage"]["draw"] == 1


def test_the_direct_reader_agrees_with_zarr(features: Path) -> None:
    opened, group = store.FeatureStore(features), zarr.open_group(features, mode="r")
    rows = np.random.default_rng(0).permutation(128)[:50]
    for name in opened.names():
        array = group[name]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(opened.complete(name).read(rows), np.asarray(array[:])[rows])


def test_every_flipped_bit_is_found(features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    content, draw = shard(path).read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        bit = draw.randrange(len(content) * 8)
        damaged[bit // 8] ^= 1 << bit % 8
        shard(path).write_bytes(damaged)
        assert len(audit.verify(path)) == 1
        array = store.FeatureStore(path).complete("clip/5/tokens")
        with pytest.raises(StoreError, match="damaged"):
            array.read(np.arange(32, 64))
    shard(path).write_bytes(content)
    assert audit.verify(path) == []


@pytest.mark.parametrize("part", [0, 0.01, 0.25, 0.5, 0.99])
def test_a_cut_shard_gives_an_error_and_never_zeros(features: Path, tmp_path: Path, part: float) -> None:
    path = copy(features, tmp_path)
    content = shard(path).read_bytes()
    shard(path).write_bytes(content[: int(len(content) * part)])
    with pytest.raises(StoreError, match="damaged"):
        store.FeatureStore(path).complete("clip/5/tokens").read([40])


def test_a_shard_that_is_cut_while_it_is_open_gives_an_error(features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    array = store.FeatureStore(path).complete("clip/5/tokens")
    array.read([40])
    os.truncate(shard(path), shard(path).stat().st_size // 2)
    with pytest.raises(StoreError, match="row 63 fails its crc32c"):
        array.read([63])
    assert array.read([32]).any()


def test_open_files_are_bounded_and_closed(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened() -> int:
        return sum(file.path.startswith(str(features)) for file in psutil.Process().open_files())

    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    monkeypatch.setattr(reader, "_open", OrderedDict())  # other tests' arrays stay out of the count
    before, array = opened(), store.FeatureStore(features).complete("clip/5/tokens")
    with ThreadPoolExecutor(4) as pool:
        wanted = np.random.default_rng(0).permutation(128)
        np.testing.assert_array_equal(array.read(wanted, None, pool), array.read(np.arange(128))[wanted])
    assert opened() == before + 2
    del array
    assert opened() == before


def test_a_missing_shard_or_inner_chunk_gives_an_error(features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    file = shard(path)
    content = bytearray(file.read_bytes())
    table = len(content) - 4 - 32 * 16
    struct.pack_into("<QQ", content, table, store.MISSING, store.MISSING)
    import google_crc32c

    struct.pack_into("<I", content, len(content) - 4, google_crc32c.value(bytes(content[table:-4])))
    file.write_bytes(content)
    with pytest.raises(StoreError, match="row 32 is missing"):
        store.FeatureStore(path).complete("clip/5/tokens").read([32])
    file.unlink()
    with pytest.raises(StoreError, match="cannot be opened"):
        store.FeatureStore(path).complete("clip/5/tokens").read([33])


def test_what_is_not_committed_is_not_read(features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    withdraw(path, "clip/5/tokens", {2})
    opened = store.FeatureStore(path)
    with pytest.raises(StoreError, match="3 of 4 shards"):
        opened.complete("clip/5/tokens")
    with pytest.raises(StoreError, match="not committed"):
        opened.array("clip/5/tokens").read([70])


def test_a_committed_shard_is_never_replaced_by_other_bytes(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, name = copy(features, tmp_path), "clip/5/tokens"
    index, ids, block = Index(path / "index"), [str(i + 1) for i in range(32)], np.ones((32, 8, 96), np.float16)
    before, record = shard(path, name, 0).read_bytes(), commits.committed(path, name)[0]
    store.write_shard(path, name, index, 0, block, ids, [], 0.0)  # sealed
    withdraw(path, name, {1})
    store.write_shard(path, name, index, 0, block, ids, [], 0.0)  # loose
    assert shard(path, name, 0).read_bytes() == before and commits.committed(path, name)[0] == record
    monkeypatch.setattr(commits, "exists", lambda *_: False)  # another writer commits between question and write
    store.write_shard(path, name, index, 0, block, ids, [], 0.0)
    assert audit.verify(path) == []


def test_wrong_blocks_are_refused_before_they_are_written(features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    index, name = Index(path / "index"), "clip/5/tokens"
    withdraw(path, name, {0})
    before = shard(path, name, 0).read_bytes()
    ids = [str(i) for i in range(32)]
    good = np.zeros((32, 8, 96), np.float16)
    for block in (good[:1], good[:, :1], good.astype(np.float32)):
        with pytest.raises(StoreError, match="does not fit"):
            store.write_shard(path, name, index, 0, block, ids, [], 0.0)
    bad = good.copy()
    bad[3, 0, 0] = np.nan
    with pytest.raises(StoreError, match="row 3"):
        store.write_shard(path, name, index, 0, bad, ids, [], 0.0)
    assert shard(path, name, 0).read_bytes() == before and not store.commit_file(path, name, 0).exists()


def test_rows_out_of_range(features: Path) -> None:
    array = store.FeatureStore(features).complete("clip/5/tokens")
    for row in (-1, 128):
        with pytest.raises(StoreError, match="rows 0 to 127"):
            array.read([row])


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    with store.owner(tmp_path / "s.zarr"), pytest.raises(StoreError, match="another extraction"):
        with store.owner(tmp_path / "s.zarr"):
            pass
    (tmp_path / "link.zarr").symlink_to(tmp_path / "s.zarr")
    for first, second in (("s.zarr", "link.zarr"), ("link.zarr", "s.zarr")):  # one store, whatever it is called
        with store.owner(tmp_path / first), pytest.raises(StoreError, match="another extraction"):
            with store.owner(tmp_path / second):
                pass


@pytest.mark.parametrize(("schema", "way_out"), [(99, "upgrade xformer"), (1, "extract into a new store")])
def test_another_schema_is_refused(schema: int, way_out: str, features: Path, tmp_path: Path) -> None:
    path = copy(features, tmp_path)
    zarr.open_group(path, mode="r+").attrs["xformer_schema"] = schema
    for opens in (store.FeatureStore, store.refuse_foreign):
        with pytest.raises(StoreError, match=f"schema {schema};.*{way_out}"):
            opens(path)


def test_index_and_captions(features: Path, corpus: Path) -> None:
    index = Index(features / "index")
    rows, captions = index.captions()
    assert index.count == 128 and len(captions) == len(rows) == 3 * 128
    assert index.description["train"] == 96 and index.description["val"] == 32
    import json

    first = json.loads((corpus / "train" / "captions.json").read_text())["annotations"][0]
    assert captions[0] == first["caption"] and index.shard(0)[0]["id"] == str(first["image_id"])
    with pa.memory_map(str(features / "index/captions.arrow")) as source:
        assert [captions[i] for i in range(len(captions))] == pa.ipc.open_file(source).read_all()["text"].to_pylist()
    keys = index.image_keys(np.array([70, 0, 127])).astype("<i8").tobytes()
    hashes = index.column("sha256")["sha256"].to_pylist()
    assert keys == b"".join(hashes[row][:8] for row in (70, 0, 127))
    assert index.usable("val").tolist() == [split == "val" for split in index.column("split")["split"].to_pylist()]
    assert not index.usable("another").any()


def test_reading_pairs_imports_neither_torch_nor_what_builds_on_it(features: Path) -> None:
    code = f"""
import sys
from pathlib import Path
import numpy as np
from xformer.data import Cache, Pairs
from xformer.settings import load_settings
settings = load_settings(overrides=["mae.draws=2"])
pairs = Pairs([Cache(Path({str(features)!r}), settings, "xformer", pixels=True)], "train", None, settings)
keys, read, captions = pairs.read(np.arange(4), 0)
assert read.clip.shape == (4, 8, 96) and len(captions) == len(keys) == 4 and all(captions)
print(*{{"torch", "transformers", "timm", "torchvision", "accelerate", "zarr"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_cut_image_hashes_are_an_error_and_not_one_picture(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    keys = Index(path / "index").image_keys(np.arange(5))
    assert len(set(keys.tolist())) == 5
    (path / "index/c/0/0").write_bytes(b"")
    with pytest.raises(StoreError, match="cut off"):
        Index(path / "index").image_keys(np.arange(5))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_a_reader_that_is_open_while_a_row_is_revived_reads_it(corpus: Path, tmp_path: Path, dtype: str) -> None:
    settings = load_settings(overrides=["store.shard_rows=32", f"store.dtype={dtype}"])
    path, source, name = tmp_path / "s.zarr", open_corpus(corpus), "clip/5/tokens"
    picture = corpus / plan_index(path, source, settings, 64).shard(1)[3]["location"]
    os.rename(picture, tmp_path / "away.png")
    try:
        extract(source, path, ["clip"], settings, limit=64, in_process=True)
    finally:
        os.rename(tmp_path / "away.png", picture)
    array = store.FeatureStore(path).complete(name)
    before = array.read([34, 36])  # its shard is open
    with pytest.raises(StoreError, match="row 35 is a dead letter: .*No such file"):
        array.read([34, 35])
    unasked = store.FeatureStore(path).complete(name)
    unasked.read([34])
    assert retry(path, in_process=True)["dead"] == 0
    want = store.FeatureStore(path).complete(name).read([34, 35, 36])
    for opened in (array, unasked):
        np.testing.assert_array_equal(opened.read([34, 35, 36]), want)
    assert np.isfinite(want).all() and np.array_equal(before, want[[0, 2]]) and array.dead == {}


def test_an_array_that_is_collected_while_the_lock_is_held_does_not_wait_for_it(features: Path) -> None:
    box = [store.FeatureStore(features).complete("clip/5/tokens")]
    box[0].read([40])
    number = box[0]._number
    with reader._lock:  # as where the garbage collector runs inside of it
        thread = threading.Thread(target=box.clear, daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
        assert number in {key[0] for key in reader._open}
    store.FeatureStore(features).complete("clip/5/tokens").read([40])
    assert number not in {key[0] for key in reader._open}


def test_ids_are_found_and_a_record_of_no_shard_is_named(
    features: Path, corpus: Path, tmp_path: Path, settings: Settings
) -> None:
    path = copy(features, tmp_path)
    ids = Index(path / "index").column("id")["id"].to_pylist()
    assert contact.rows_of(path, [ids[90], ids[0], ids[90]]).tolist() == [90, 0, 90]
    with pytest.raises(StoreError, match='no image has the id "none"'):
        contact.rows_of(path, [ids[3], "none"])
    commits.publish(path, "clip/5/tokens", commits.committed(path, "clip/5/tokens")[3] | {"shard": 9})
    assert [line for line in audit.verify(path) if "clip/5/tokens has a commit record of shard 9" in line]
    assert any("shard 9" in line for line in repair(path, in_process=True)[1])  # told, not removed
    with pytest.raises(StoreError, match="has shards 0 to 3, not 9: a commit record of shard 9"):
        extract(open_corpus(corpus), path, ["mae"], settings, in_process=True)


@pytest.mark.parametrize("lost", [["zarr.json"], ["zarr.json", "made.json"]])
def test_features_that_do_not_say_how_they_are_read_are_never_declared_anew(
    lost: list[str], features: Path, corpus: Path, tmp_path: Path, settings: Settings
) -> None:
    path = copy(features, tmp_path)
    for name in lost:
        (path / "clip/5/tokens" / name).unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(StoreError, match="zarr.json is lost|neither zarr.json nor made.json"):
        extract(open_corpus(corpus), path, ["clip"], settings, in_process=True)
    if len(lost) == 1:
        with pytest.raises(StoreError, match="zarr.json is lost"):
            merge(Path(shutil.copytree(features, tmp_path / "other.zarr")), [path])
    assert before == {f: f.read_bytes() for f in path.rglob("*") if f.is_file() and not f.name.endswith(".lock")}


def test_a_scale_whose_record_is_lost_is_made_again_beside_its_tokens(corpus: Path, tmp_path: Path) -> None:
    path, settings = tmp_path / "s.zarr", load_settings(overrides=["store.shard_rows=8", "store.dtype=int8"])
    extract(open_corpus(corpus), path, ["clip"], settings, limit=24, in_process=True)
    records = commits.committed(path, "clip/5/scale")
    for file in (path / "clip/5/scale/commits").iterdir():
        file.unlink()
    for shard in (0, 2):
        commits.publish(path, "clip/5/scale", records[shard])
    want = store.shard_file(path, "clip/5/scale", 1, 2).read_bytes()
    store.shard_file(path, "clip/5/scale", 1, 2).unlink()
    extract(open_corpus(corpus), path, ["clip"], settings, limit=24, in_process=True)
    assert store.shard_file(path, "clip/5/scale", 1, 2).read_bytes() == want and audit.verify(path) == []
    assert np.isfinite(store.FeatureStore(path).array("clip/5/tokens").read(np.arange(24))).all()
