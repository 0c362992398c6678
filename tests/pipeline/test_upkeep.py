"""Keeping a store: repair redoes only what is damaged, retry tries dead letters, gc drops what is named, int8 is judged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from cli import main
from pipeline import commits, int8, store, upkeep
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from tests.pipeline.test_extract import broken_corpus, shards
from xformer.data import Cache
from xformer.errors import StoreError
from xformer.settings import load_settings


def test_repair_makes_exactly_the_damaged_shard_again(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    before = shards(path)
    file = store.shard_file(path, "clip/5/tokens", 1, 3)
    times = {p: p.stat().st_mtime_ns for p in path.rglob("c/**/*") if p.is_file()}
    file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    main(["store", "verify", str(path), "--repair", "--json", str(tmp_path / "verify.json")])
    told = json.loads((tmp_path / "verify.json").read_text())
    assert told["damaged"] == [] and [line.split(":")[0] for line in told["repaired"]] == [str(file)]
    assert shards(path) == before and upkeep.verify(path) == []
    assert [p for p, t in times.items() if p.stat().st_mtime_ns != t] == [file]


def test_records_of_a_finished_array_are_sealed_and_can_be_withdrawn(features: Path, tmp_path: Path) -> None:
    path, name = Path(shutil.copytree(features, tmp_path / "s.zarr")), "clip/5/tokens"
    assert sorted(p.name for p in (path / name / "commits").iterdir()) == ["sealed.parquet"]
    before = commits.committed(path, name)
    assert sorted(before) == [0, 1, 2, 3]
    commits.withdraw(path, name, {2})
    assert sorted(commits.committed(path, name)) == [0, 1, 3]
    assert not commits.seal(path, name, 4) or sorted(commits.committed(path, name)) == [0, 1, 3]
    commits.commit_file(path, name, 2).write_text(json.dumps(before[2]))
    assert commits.seal(path, name, 4) and commits.committed(path, name) == before


def test_retry_tries_images_again_whose_cause_is_gone(tmp_path: Path) -> None:
    folder, path = broken_corpus(tmp_path), tmp_path / "s.zarr"
    good = (folder / "001.png").read_bytes()
    settings = load_settings(overrides=["store.shard_rows=16", "corpus.max_dead_fraction=0.3", "mae.draws=1"])
    extract(open_corpus(folder), tmp_path / "want.zarr", ["clip", "mae"], settings, in_process=True)
    source = open_corpus(folder)
    plan_index(path, source, settings, None)
    (folder / "001.png").write_bytes(good[:40])
    report = extract(source, path, ["clip", "mae"], settings, in_process=True)
    assert [d["reason"] for d in report["dead"] if d["id"] == "001.png"] == [
        "the file has changed since the store was planned"
    ]
    (folder / "001.png").write_bytes(good)
    main(["store", "retry", str(path)])
    assert sorted(d["id"] for d in upkeep.describe(path)["dead"]) == ["cut.png", "empty.jpg", "text.png"]
    assert shards(path) == shards(tmp_path / "want.zarr")


def test_gc_drops_what_is_named_and_what_was_left_behind(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    left = path / "clip/5/tokens/c/9"
    left.write_bytes(b"half a shard")
    others = {k: v for k, v in shards(path).items() if "draw-1" not in k and not k.endswith("c/9")}
    main(["store", "gc", str(path), "--drop", "mae/draw-1", "--json", str(tmp_path / "gc.json")])
    told = json.loads((tmp_path / "gc.json").read_text())
    assert "mae/draw-1/tokens" in told["removed"] and "clip/5/tokens/c/9" in told["removed"] and told["bytes"] > 12
    assert shards(path) == others and not (path / "mae/draw-1/tokens").exists() and upkeep.verify(path) == []
    with pytest.raises(StoreError, match="nothing called mae/draw-7"):
        upkeep.drop(path, ["mae/draw-7"])


def test_show_draws_a_picture(features: Path, tmp_path: Path) -> None:
    told = tmp_path / "rows.json"
    main(["store", "show", str(features), "--rows", "3", "--out", str(tmp_path / "rows.png"), "--json", str(told)])
    assert len(json.loads(told.read_text())["ids"]) == 3
    pixels = np.asarray(Image.open(tmp_path / "rows.png").convert("RGB"))
    assert pixels.shape[0] > 300 and pixels.std() > 20
    with pytest.raises(SystemExit):
        main(["store", "show", str(features), "--id", "nobody", "--out", str(tmp_path / "no.png")])
    assert not (tmp_path / "no.png").exists()


def test_int8_with_outlier_channels_loses_little() -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal((16, 20, 64), np.float32)
    values[..., 3] *= 200
    channels = int8.channel_scales(values)
    tokens, scale = int8.quantise(values, channels)
    assert tokens.dtype == np.int8 and tokens.min() >= -127
    measured = int8.fidelity(values, int8.dequantise(tokens, scale, channels))
    assert measured["relative_rmse"] < 0.02 and measured["worst_token_cosine"] > 0.98
    flat = int8.quantise(values, np.ones(64, np.float32))
    assert (
        int8.fidelity(values[..., 4:], int8.dequantise(*flat, np.ones(64, np.float32))[..., 4:])["relative_rmse"] > 0.2
    )
    zeros = int8.quantise(np.zeros((1, 2, 64), np.float32), channels)
    assert not int8.dequantise(*zeros, channels).any()


@pytest.mark.parametrize("count", [0, 1, 96, 97, 257])
def test_int8_is_decoded_by_the_documented_formula_bit_for_bit(count: int) -> None:
    draw = np.random.default_rng(count)
    tokens = draw.integers(-127, 128, (2, count, 40)).astype(np.int8)
    scale = np.exp(draw.uniform(-16, 3, (2, count))).astype(np.float16)  # subnormal numbers and infinity come up too
    channels = np.exp(draw.uniform(-8, 8, 40)).astype(np.float32)
    out = np.ones((2, count, 40), np.float16)
    int8.dequantise_into(out, tokens, scale, channels)
    with np.errstate(over="ignore"):
        want = int8.dequantise(tokens, scale, channels)
    assert out.tobytes() == want.tobytes()


def test_an_int8_store_is_read_judged_and_trained_from(
    corpus: Path, features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.zarr"
    given = ["--corpus", str(corpus), "--encoder", "clip", "--encoder", "mae", "--draws", "2", "--shard-rows", "32"]
    main(["extract", *given, "--store", str(path), "--dtype", "int8"])
    settings = load_settings(overrides=["mae.draws=2"])
    rows = np.arange(20)
    ours, theirs = (Cache(p, settings, "xformer", pixels=True).read(rows, 1) for p in (path, features))
    assert ours.clip.dtype == np.float16 and ours.mae is not None and theirs.mae is not None
    stored = zarr.open_group(path, mode="r")["clip/5"]
    tokens, scale, channels = stored["tokens"], stored["scale"][:20], stored["tokens"].attrs["channel_scale"]
    assert (ours.clip == int8.dequantise(tokens[:20], scale, np.array(channels, np.float32))).all()
    for have, want in ((ours.clip, theirs.clip), (ours.mae, theirs.mae)):
        assert 0 < int8.fidelity(want, have)["relative_rmse"] < 0.02
    main(["store", "fidelity", str(path), "--json", str(tmp_path / "f.json")])
    assert {"clip/5/tokens", "mae/draw-0/tokens"} <= set(json.loads((tmp_path / "f.json").read_text()))
    few = [word for override in small for word in ("--set", override)]
    main(["train", "--stage", "1", "--features", str(path), "--out", str(tmp_path / "run"), *few])
    assert (tmp_path / "run/summary.json").is_file()
    strict = load_settings(overrides=["store.dtype=int8", "store.int8_max_rmse=0.0001", "store.shard_rows=32"])
    with pytest.raises(StoreError, match="int8 has a relative RMSE"):
        extract(open_corpus(corpus), tmp_path / "t.zarr", ["clip"], strict, limit=40, in_process=True)
    extract(open_corpus(corpus), tmp_path / "t.zarr", ["clip"], strict, limit=40, in_process=True, force=True)
