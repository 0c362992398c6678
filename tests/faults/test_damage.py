"""Damaged stores: every flipped bit is named and repaired, and a cut shard never gives zeros."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import audit, cache, reader, store, upkeep
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from pipeline.index import Index
from pipeline.merge import merge
from pipeline.redo import repair
from tests.faults.report import line
from tests.pipeline.test_extract import shards
from xformer.console import quietly
from xformer.data import Cache
from xformer.errors import StoreError
from xformer.settings import Settings


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
        with quietly():
            problems, left = repair(path, in_process=True)
        named += sum(any(problem.startswith(f"{file}:") for problem in problems) for file in chosen)
        assert len(problems) == 4 and left == []
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
            audit.verify(path)
        named += str(caught.value).startswith(f"{file}: its bytes")
        file.write_bytes(content)
    assert audit.verify(path) == []
    line("a flipped bit of the index: named by verify", len(files), named)


@pytest.mark.parametrize("flips", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_flipped_bit_of_index_json_is_refused_before_anything_is_written(
    features: Path, tmp_path: Path, flips: int
) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    file, draw, read, told = path / "index/index.json", random.Random(2), 0, 0
    whole, want = file.read_bytes(), Index(path / "index").description
    for _ in range(flips):
        content, bit = bytearray(whole), draw.randrange(len(whole) * 8)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            read += Index(path / "index").description.items() >= want.items()  # white space, or the name of the hash
        except StoreError as error:
            told += str(file) in str(error) and "restore it from a copy" in str(error)
    line("a flipped bit of index.json: one sentence, or read as it was", flips, read + told)
    assert read + told == flips and told > flips // 2
    file.write_bytes(whole.replace(b'"shard_rows": 32', b'"shard_rows": 33'))
    (path / CLIP / "zarr.json").write_bytes(b"")  # would be mended
    before = shards(path)
    for run in (audit.verify, lambda path: repair(path, in_process=True), store.FeatureStore):
        with pytest.raises(StoreError, match=r"index.json is damaged \(its content does not match its hash"):
            run(path)
    assert shards(path) == before and (path / CLIP / "zarr.json").read_bytes() == b""


def test_an_index_of_other_rows_than_the_arrays_is_refused_and_nothing_is_made_again(
    features: Path, tmp_path: Path, corpus: Path, settings: Settings
) -> None:
    """As it is without a hash of its own: an older one, or one of another extraction put in its place."""
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    file, before = path / "index/index.json", shards(path)
    for key, value, words in (
        ("shard_rows", 33, "has 32 rows a shard instead of the index's 33"),
        ("images", 127, "has 128 images instead of the index's 127"),
        ("rows_sha256", "0" * 64, "has other ids or pictures than the index"),
    ):
        content = Index(features / "index").description | {key: value}
        file.write_text(json.dumps(content))
        for run in (
            lambda: Cache(path, settings, "xformer", pixels=False),
            lambda: extract(open_corpus(corpus), path, ["clip"], settings, in_process=True),
            lambda: merge(tmp_path / "new.zarr", [path]),
            *([] if key == "images" else [lambda: audit.verify(path), lambda: repair(path, in_process=True)]),
        ):
            with pytest.raises(StoreError, match=words):
                run()
    assert shards(path) == before


def everything(path: Path, settings: Settings) -> dict[str, Callable[[], object]]:
    """Whatever opens a store, and what a training run reads from its index."""

    def train() -> None:
        index = Cache(path, settings, "xformer", pixels=True).store.index
        _, captions = index.captions()
        _ = captions[0], index.usable("train"), index.image_keys(np.array([1])), index.id_of(1), index.shard(1)

    def verify() -> None:
        if problems := audit.verify(path):
            raise StoreError(*problems)

    return {
        "info": lambda: upkeep.info(path), "verify": verify, "train": train,
        "names": lambda: [store.attributes(path, name) for name in store.array_names(path)],
    }  # fmt: skip


def cut(part: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:part]


CLIP = "clip/5/tokens"
DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], set[str]]] = {
    "the store's zarr.json cut": ("zarr.json", cut(9), {"verify"}),
    "an array's zarr.json empty": (f"{CLIP}/zarr.json", cut(0), {"info", "verify", "train", "names"}),
    "an array without attributes": (
        f"{CLIP}/zarr.json", lambda c: c.replace(b'"attributes"', b'"attribute_"'), {"info", "verify", "train", "names"}
    ),
    "an array of another type": (
        f"{CLIP}/zarr.json", lambda c: c.replace(b'"float16"', b'"floau16"'), {"info", "verify", "train", "names"}
    ),
    "index.json cut": ("index/index.json", cut(5), {"info", "verify", "train"}),
    "index.json of another program": ("index/index.json", lambda _: b"{}", {"info", "verify", "train"}),
    "rows.parquet removed": ("index/rows.parquet", lambda _: None, {"verify", "train"}),
    "rows.parquet cut": ("index/rows.parquet", cut(300), {"verify", "train"}),
    "captions.arrow removed": ("index/captions.arrow", lambda _: None, {"verify", "train"}),
    "captions.arrow cut": ("index/captions.arrow", cut(300), {"verify", "train"}),
    "the image hashes removed": ("index/c/0/0", lambda _: None, {"verify", "train"}),
    "the image hashes cut": ("index/c/0/0", cut(0), {"verify", "train"}),
    "how it was made, cut": (f"{CLIP}/made.json", cut(1), {"verify"}),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_file_of_a_store_is_one_sentence_that_names_it(
    features: Path, settings: Settings, tmp_path: Path, what: str
) -> None:
    name, damage, who = DAMAGE[what]
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    content = damage((path / name).read_bytes())
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    told = set()
    for command, run in everything(path, settings).items():
        try:
            run()
        except StoreError as error:
            assert name in str(error) and "\n" not in str(error), error
            told.add(command)
    assert told == who
    line(f"{what}: one sentence that names the file", len(who), len(told))


def test_another_zarr_group_is_no_feature_store(tmp_path: Path) -> None:
    for text in ('{"zarr_format": 3, "node_type": "group"}', '{"node_type": "group", "attributes": {"theirs": 1}}'):
        (tmp_path / "zarr.json").write_text(text)
        with pytest.raises(StoreError, match="is no feature store; make one with"):
            store.FeatureStore(tmp_path)


def test_verify_goes_on_after_a_shard_that_the_disk_does_not_give(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    files = [store.shard_file(path, CLIP, shard, 3) for shard in (1, 3)]
    files[0].unlink()
    files[0].mkdir()  # reading it fails, and not because it is missing
    files[1].write_bytes(b"")
    assert [problem.partition(":")[0] for problem in audit.verify(path)] == [str(file) for file in files]


def test_rows_are_never_delivered_into_memory_that_does_not_fit(features: Path) -> None:
    array = store.FeatureStore(features).array(CLIP)
    wide = np.zeros((2, array.shape[0] * 2, array.shape[1]), np.float16)
    unfit = wide[:, ::2], np.zeros((2, *array.shape), np.float32), np.zeros((3, *array.shape), np.float16)
    for out in unfit:
        with pytest.raises(ValueError, match=rf"{CLIP}: out is .*; it must be float16 \(2, "):
            array.read([1, 2], out)
    assert array.read([1, 2], np.zeros((2, *array.shape), np.float16)).any()


def test_a_problem_of_this_machine_is_not_told_as_damage_of_the_store(
    features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    here = cache.LocalCache(tmp_path / "file")  # a folder that cannot be made
    monkeypatch.setattr(cache.objects, "read", lambda _: b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(StoreError, match=f"the local cache {tmp_path / 'file'} cannot be used: Not a directory"):
        here.shard(Path("s3:/bucket/s.zarr/c/0"), 0, empty, 0)
    with pytest.raises(StoreError, match="the local cache .* cannot be used"):
        here.file(Path("s3:/bucket/s.zarr/index/rows.parquet"), empty)
    array = store.FeatureStore(features).array(CLIP)

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(reader.os, "open", refuse)
    with pytest.raises(StoreError, match="Too many open files; the store itself is not damaged"):
        array.read([1])


@pytest.mark.parametrize("flips", [60, pytest.param(600, marks=pytest.mark.slow)])
def test_captions_and_rows_with_flipped_bits_are_read_or_one_sentence(
    features: Path, tmp_path: Path, flips: int
) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    draw, told, read = random.Random(1), 0, 0
    for flip in range(flips):
        file = path / "index" / ("captions.arrow", "rows.parquet")[flip % 2]
        whole = file.read_bytes()
        content, bit = bytearray(whole), draw.randrange(len(whole) * 8)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        try:
            index = store.FeatureStore(path).index
            _, captions = index.captions()
            read += bool([captions[i] for i in range(len(captions))] and len(index.usable("train")) and index.shard(1))
        except StoreError as error:
            told += file.name in str(error)
        file.write_bytes(whole)
    line("a flipped bit of captions or rows: read all the same, or one sentence", flips, told + read)
    assert told
