"""Keeping a store: repair redoes only what is damaged, retry tries dead letters, gc drops what is named, int8 is judged."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from cli import main
from pipeline import audit, cluster, commits, encode, fidelity, int8, provenance, store, upkeep
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from pipeline.redo import repair, retry
from tests.pipeline.test_extract import broken_corpus, shards, withdraw
from xformer.data import Cache
from xformer.errors import StoreError
from xformer.settings import Settings, load_settings


def test_repair_makes_exactly_the_damaged_shard_again(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    before = shards(path)
    file = store.shard_file(path, "clip/5/tokens", 1, 3)
    times = {p: p.stat().st_mtime_ns for p in path.rglob("c/**/*") if p.is_file()}
    file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    main(["store", "verify", str(path), "--repair", "--json", str(tmp_path / "verify.json")])
    told = json.loads((tmp_path / "verify.json").read_text())
    assert told["damaged"] == [] and [line.split(":")[0] for line in told["repaired"]] == [str(file)]
    assert shards(path) == before and audit.verify(path) == []
    assert [p for p, t in times.items() if p.stat().st_mtime_ns != t] == [file]


def test_every_array_is_made_again_as_it_was_made_itself(corpus: Path, tmp_path: Path) -> None:
    """The newest extraction of an encoder made other arrays; what it dropped or never made is left alone."""
    path, source = tmp_path / "s.zarr", open_corpus(corpus)

    def settings(layers: str) -> Settings:
        return load_settings(overrides=["store.shard_rows=16", "mae.draws=2", f"clip.layers={layers}"])

    extract(source, path, ["clip", "mae"], settings("[5,3]"), limit=48, in_process=True)
    extract(source, path, ["clip"], settings("[5]"), limit=48, in_process=True)
    extract(source, path, ["mae"], settings("[5]"), limit=48, whole=True, in_process=True)
    upkeep.drop(path, ["mae/draw-1", "clip/5"])
    withdraw(path, "mae/full/tokens", {1, 2})
    for shard in (1, 2):
        store.shard_file(path, "mae/full/tokens", shard, 3).unlink()
    before = shards(path)
    damaged = [
        ("mae/draw-0/tokens", 1, 3),
        ("clip/3/tokens", 2, 3),
        ("mae/full/tokens", 0, 3),
        ("mae/draw-0/kept", 0, 2),
    ]
    for name, shard, ndim in damaged:
        file = store.shard_file(path, name, shard, ndim)
        file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
    repaired, left = repair(path, in_process=True)
    assert len(repaired) == 4 and left == [] and shards(path) == before and audit.verify(path) == []
    assert store.array_names(path) == [
        "clip/3/tokens", "mae/draw-0/kept", "mae/draw-0/tokens", "mae/full/tokens", "pixels/view-0",
    ]  # fmt: skip
    assert upkeep.info(path)["made"]["clip/3/tokens"]["source"] == str(corpus.resolve())


def world(tmp_path: Path, *overrides: str) -> tuple[Path, Path]:
    """Twelve pictures of a CSV file, and their store of three shards."""
    folder, path = tmp_path / "pictures", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (i * 16, 0, 0)).save(folder / f"{i:02d}.png")
    lines = ["image,caption", *(f"{i:02d}.png,a cat" for i in range(12))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    settings = load_settings(overrides=["store.shard_rows=4", "mae.draws=1", *overrides])
    source = open_corpus(tmp_path / "list.csv", folder)
    extract(source, path, ["clip"], settings, in_process=True, force=True)
    return folder, path


def test_repair_needs_the_pictures_and_nothing_else_of_the_corpus(tmp_path: Path) -> None:
    folder, path = world(tmp_path)
    before, file = shards(path), store.shard_file(path, "clip/5/tokens", 1, 3)
    (tmp_path / "list.csv").unlink()
    folder = folder.rename(tmp_path / "moved")
    (folder / "more.png").write_bytes(b"one more")
    file.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="pictures of .*s.zarr are not in .*pictures; say where .* --images DIR"):
        repair(path, in_process=True)
    records = commits.committed(path, "clip/5/tokens")
    assert sorted(records) == [0, 1, 2] and file.read_bytes() == b"damaged"
    repaired, left = repair(path, folder, in_process=True)
    assert len(repaired) == 1 and left == [] and shards(path) == before
    assert commits.committed(path, "clip/5/tokens") == records


def test_what_cannot_be_made_again_is_left_as_it_is_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, path = world(tmp_path)
    before, name = shards(path), "clip/5/tokens"
    for shard in (0, 2):
        store.shard_file(path, name, shard, 3).write_bytes(b"damaged")
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "05.png")  # of an intact shard
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "09.png")
    with pytest.raises(SystemExit):
        main(["store", "verify", str(path), "--repair", "--json", str(tmp_path / "v.json")])
    told = json.loads((tmp_path / "v.json").read_text())
    assert len(told["repaired"]) == 2 and len(told["damaged"]) == 2
    assert f"{name} shard 2: 09.png: the file has changed since" in capsys.readouterr().err
    now = shards(path)
    assert [file for file in before if now[file] != before[file]] == [f"{name}/c/2/0/0"]
    assert sorted(commits.committed(path, name)) == [0, 1, 2] and store.describe(path)["dead"] == []
    made = path / name / "made.json"
    about = json.loads(made.read_text().replace('"autocast": "fp32"', '"autocast": "bf16"'))
    about["check"] = provenance.check_of(about)
    made.write_text(json.dumps(about))
    with pytest.raises(
        StoreError, match="clip/5/tokens was made by another encoder than is here now: autocast is 'fp32'"
    ):
        repair(path, in_process=True)


def test_a_picture_that_changed_before_its_shard_was_made_is_a_dead_letter(tmp_path: Path) -> None:
    folder, path = world(tmp_path)
    withdraw(path, "clip/5/tokens", {2})
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "09.png")
    settings = load_settings(overrides=["store.shard_rows=4"])
    report = extract(open_corpus(tmp_path / "list.csv", folder), path, ["clip"], settings, in_process=True)
    assert [letter["id"] for letter in report["dead"]] == ["09.png"]


def test_a_shard_that_is_gone_after_repair_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = world(tmp_path)
    store.shard_file(path, "clip/5/tokens", 1, 3).unlink()
    monkeypatch.setattr(cluster, "run_here", lambda *_: iter(()))  # makes nothing
    _, left = repair(path, in_process=True)
    assert len(left) == 1 and "c/1/0/0: cannot be read" in left[0]


def test_the_newer_of_two_commit_records_counts(tmp_path: Path) -> None:
    """A shard that is made again has a loose record beside the sealed one, until they are folded again."""
    _, path = world(tmp_path)
    name, letter = "clip/5/tokens", {"row": 5, "id": "05.png", "source": "table", "reason": "broken"}
    folder, before = path / name / "commits", commits.committed(path, name)
    assert sorted(p.name for p in folder.iterdir()) == ["sealed.copy.parquet", "sealed.parquet"]
    commits.publish(path, name, before[1] | {"dead": [letter]})
    assert store.FeatureStore(path).array(name).dead == {5: "broken"}
    assert commits.seal(path, name, 3) and len(list(folder.iterdir())) == 2
    commits.publish(path, name, before[1])
    assert store.FeatureStore(path).array(name).dead_rows.tolist() == [] and commits.reasons(path, name) == {}
    assert commits.committed(path, name) == before
    assert commits.seal(path, name, 3) and commits.committed(path, name) == before and audit.verify(path) == []


def test_damaged_commit_records_are_named_and_restored(tmp_path: Path) -> None:
    _, path = world(tmp_path)
    name, draw, before = "clip/5/tokens", random.Random(0), shards(path)
    sealed, copy = (path / name / "commits" / part for part in (commits.SEALED, commits.COPY))
    content, records = sealed.read_bytes(), commits.committed(path, name)
    for file in (sealed, copy):
        for _ in range(100):
            bit, flipped = draw.randrange(len(content) * 8), bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert commits.mend(path, name, write=False)[0].startswith(f"{file}: damaged")
            if file == sealed:
                with pytest.raises(StoreError, match="damaged commit records; run: xformer store verify"):
                    store.FeatureStore(path).array(name)
        assert len(audit.verify(path)) == 1
        repaired, left = repair(path, in_process=True)
        assert len(repaired) == 1 and left == [] and file.read_bytes() == content
        file.unlink()
        assert store.describe(path)["arrays"][name]["shards"] == "3/3" and len(audit.verify(path)) == 1
        assert len(repair(path, in_process=True)[0]) == 1 and audit.verify(path) == []
    for file in (sealed, copy):
        file.write_bytes(content[:-1])
    with pytest.raises(SystemExit):
        main(["store", "verify", str(path), "--repair"])
    assert "store gc" in repair(path, in_process=True)[1][0]
    for file in (sealed, copy):
        file.write_bytes(content)
    withdraw(path, name, set())
    for damage in ("{}", "[]", '{"shard": 1', json.dumps(records[1]), json.dumps(records[1] | {"check": "0" * 16})):
        commits.commit_file(path, name, 1).write_text(damage)
        with pytest.raises(StoreError, match="1.json: damaged commit record; run: xformer store verify"):
            store.FeatureStore(path).array(name)
        repaired, left = repair(path, in_process=True)
        assert len(repaired) == 1 and left == [] and shards(path) == before
        again = commits.committed(path, name)
        assert {s: r | {"seconds": 0} for s, r in again.items()} == {s: r | {"seconds": 0} for s, r in records.items()}
        withdraw(path, name, set())


def test_damaged_metadata_of_an_array_is_named_and_restored(tmp_path: Path) -> None:
    _, path = world(tmp_path, "store.dtype=int8", "clip.layers=[5,4]")
    name, before = "clip/5/tokens", shards(path)
    file = path / name / "zarr.json"
    text = file.read_text()
    scale = text.index('"channel_scale": [') + 40
    digit = next(i for i in range(scale, scale + 40) if text[i] in "12345678")
    weights = text.index('"weights_sha256"') + 22
    for place, change in ((digit, "9"), (weights, "0" if text[weights] != "0" else "1"), (len(text) // 2, "")):
        file.write_text(text[:place] + change + text[place + 1 :] if change else text[:place])
        with pytest.raises(StoreError, match=r"clip/5/tokens/zarr.json is damaged \(.*\); run: xformer store verify"):
            store.FeatureStore(path).array(name)
        assert len(audit.verify(path)) == 1
        repaired, left = repair(path, in_process=True)
        assert len(repaired) == 1 and left == [] and file.read_text() == text and shards(path) == before
    store.shard_file(path, "clip/5/scale", 1, 2).write_bytes(b"damaged")
    assert repair(path, in_process=True)[1] == [] and shards(path) == before
    (path / name / "made.json").write_text("{")
    store.shard_file(path, name, 1, 3).write_bytes(b"damaged")
    store.shard_file(path, "clip/4/tokens", 1, 3).write_bytes(b"damaged")
    repaired, left = repair(path, in_process=True)
    assert any("clip/4/tokens/c/1" in line for line in repaired) and len(left) == 3
    assert "made.json is damaged" in left[-1] and "nobody knows how clip/5/tokens was made" in left[-1]
    assert "is damaged" in upkeep.info(path)["made"][name]["damaged"]


def test_every_flipped_bit_of_an_arrays_metadata_is_told_and_restored(tmp_path: Path) -> None:
    folder, path = world(tmp_path)
    name, draw = "clip/5/tokens", random.Random(0)
    file, made = path / name / "zarr.json", path / name / "made.json"
    for damaged in (file, made):
        content = damaged.read_bytes()
        for _ in range(150):
            bit, flipped = draw.randrange(len(content) * 8), bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged.write_bytes(flipped)
            try:
                same = json.loads(flipped) == json.loads(content)
            except ValueError:
                same = False
            told = audit._mend(path, name, write=damaged == file)
            assert [line.split(" ")[0].rstrip(":") for line in told] == ([] if same else [str(damaged)]), flipped
            assert damaged == made or same or file.read_bytes() == content
            damaged.write_bytes(content)
    file.write_text(file.read_text().replace('"crc32c"', '"crc32b"', 1))
    settings, source = load_settings(overrides=["store.shard_rows=4"]), open_corpus(tmp_path / "list.csv", folder)
    with pytest.raises(
        StoreError, match="zarr.json is damaged: it is not what it was when it was declared; run: .*--repair"
    ):
        extract(source, path, ["clip"], settings, in_process=True)
    assert len(repair(path, in_process=True)[0]) == 1 and audit.verify(path) == []


@pytest.mark.parametrize("content", ["{", None])
def test_group_files_are_told_and_written_again(tmp_path: Path, content: str | None) -> None:
    folder, path = world(tmp_path)
    files = [path / "zarr.json", path / "clip/zarr.json", path / "clip/5/zarr.json"]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink() if content is None else file.write_text(content)
    assert [line.partition(":")[0] for line in audit.verify(path)] == [str(file) for file in files]
    source, settings = open_corpus(tmp_path / "list.csv", folder), load_settings(overrides=["store.shard_rows=4"])
    assert extract(source, path, ["clip"], settings, in_process=True)["encoders"]["clip"]["images"] == 0
    repaired, left = repair(path, in_process=True)
    assert left == [] and repaired and [file.read_bytes() for file in files] == before and audit.verify(path) == []
    shutil.rmtree(path / "clip")
    (path / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match="zarr.json is damaged"):  # without an array nothing says what it is
        store.FeatureStore(path)


def test_a_drop_that_was_killed_is_finished_by_the_next_gc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = world(tmp_path, "store.dtype=int8")
    extra, removed = path / "mae/draw-1/tokens", store.places.remove_folder
    (extra / "c/0/0").mkdir(parents=True)
    (extra / "c/0/0/0").write_bytes(b"of a draw whose metadata went first")
    assert upkeep.drop(path, []) == (["mae/draw-1/tokens"], 35) and not extra.exists()

    def killed(folder: Path) -> None:
        if folder.name == "c":
            next(file for file in folder.rglob("*") if file.is_file()).unlink()
            raise KeyboardInterrupt
        removed(folder)

    monkeypatch.setattr(store.places, "remove_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        upkeep.drop(path, ["clip/5/scale"])
    monkeypatch.undo()
    assert upkeep.drop(path, ["clip/5"])[0] == ["clip/5/scale", "clip/5/tokens"]
    assert not list((path / "clip").rglob("c")) and store.array_names(path) == []
    (extra / "commits").mkdir(parents=True)
    (extra / "commits/0.json").write_text("{}")  # nobody dropped this one: it lost its metadata
    assert upkeep.drop(path, []) == ([], 0) and "zarr.json and made.json; restore" in audit.verify(path)[0]


def test_half_of_what_belongs_together_is_not_dropped(tmp_path: Path) -> None:
    _, path = world(tmp_path, "store.dtype=int8")
    assert upkeep.drop(path, ["clip/5/scale"])[0] == ["clip/5/scale", "clip/5/tokens"] and audit.verify(path) == []


def test_records_that_the_disk_does_not_give_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = world(tmp_path)
    sealed, read = path / "clip/5/tokens/commits" / commits.SEALED, commits.places.read

    def fails(file: Path) -> bytes:
        if file == sealed:
            raise OSError(5, "Input/output error")
        return read(file)

    monkeypatch.setattr(commits.places, "read", fails)
    assert [line.partition(":")[0] for line in audit.verify(path)] == [str(sealed)]
    with pytest.raises(StoreError, match="sealed.parquet: damaged commit records; run: xformer store verify"):
        store.FeatureStore(path).array("clip/5/tokens")


def test_retry_tries_images_again_whose_cause_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = broken_corpus(tmp_path), tmp_path / "s.zarr"
    files = [folder / name for name in ("001.png", "020.png", "025.png")]
    good = [file.read_bytes() for file in files]
    settings = load_settings(overrides=["store.shard_rows=8", "corpus.max_dead_fraction=0.3", "mae.draws=1"])
    extract(open_corpus(folder), tmp_path / "want.zarr", ["clip", "mae"], settings, in_process=True)
    source = open_corpus(folder)
    plan_index(path, source, settings, None)
    for file in files:
        file.write_bytes(file.read_bytes()[:40])
    report = extract(source, path, ["clip", "mae"], settings, in_process=True)
    assert [d["reason"] for d in report["dead"] if d["id"] in ("001.png", "020.png")] == [
        "the file has changed since the store was planned"
    ] * 2
    before, made = shards(path), []
    assert retry(path, in_process=True) == {"looked at": 5, "tried": 0, "dead": 6} and shards(path) == before
    for file, content in zip(files[:1], good, strict=False):
        file.write_bytes(content)
    original = cluster.run_here
    monkeypatch.setattr(
        cluster, "run_here", lambda job, todo, *more: (made.append(set(todo)), original(job, todo, *more))[1]
    )
    assert retry(path, in_process=True) == {"looked at": 5, "tried": 1, "dead": 5} and made == [{0}]
    for file, content in zip(files, good, strict=True):
        file.write_bytes(content)
    main(["store", "retry", str(path), "--workers", "1", "--json", str(tmp_path / "told.json")])
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["looked at"], told["tried"], told["dead"]) == (4, 2, 3)
    assert sorted(d["id"] for d in store.describe(path)["dead"]) == ["cut.png", "empty.jpg", "text.png"]
    assert shards(path) == shards(tmp_path / "want.zarr") and audit.verify(path) == []


def test_retry_without_the_pictures_loses_nothing_and_forgets_a_crash(tmp_path: Path) -> None:
    folder, path = world(tmp_path, "corpus.max_dead_fraction=0.5")
    want = shards(path)
    shutil.rmtree(path)
    settings = load_settings(overrides=["store.shard_rows=4", "mae.draws=1", "corpus.max_dead_fraction=0.5"])
    source = open_corpus(tmp_path / "list.csv", folder)
    plan_index(path, source, settings, None)
    encode.remember_crashers(path, [5])
    extract(source, path, ["clip"], settings, in_process=True)
    before = shards(path)
    folder = folder.rename(tmp_path / "moved")
    with pytest.raises(StoreError, match="--images DIR"):
        retry(path, in_process=True)
    assert shards(path) == before and store.FeatureStore(path).complete("clip/5/tokens").dead == {5: encode.CRASHES}
    assert retry(path, folder, in_process=True) == {"looked at": 1, "tried": 1, "dead": 0}
    assert shards(path) == want and encode.crashed(path) == {}


def test_gc_drops_what_is_named_and_what_was_left_behind(features: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(features, tmp_path / "s.zarr"))
    left = path / "clip/5/tokens/c/9"
    left.write_bytes(b"half a shard")
    others = {k: v for k, v in shards(path).items() if "draw-1" not in k and not k.endswith("c/9")}
    main(["store", "gc", str(path), "--drop", "mae/draw-1", "--json", str(tmp_path / "gc.json")])
    told = json.loads((tmp_path / "gc.json").read_text())
    assert "mae/draw-1/tokens" in told["removed"] and "clip/5/tokens/c/9" in told["removed"] and told["bytes"] > 12
    assert shards(path) == others and not (path / "mae/draw-1/tokens").exists() and audit.verify(path) == []
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
    main(["store", "gc", str(path), "--drop", "mae/draw-1"])
    main(["store", "fidelity", str(path), "--json", str(tmp_path / "f.json")])
    assert set(json.loads((tmp_path / "f.json").read_text())) == {"clip/5/tokens", "mae/draw-0/tokens"}
    strict = load_settings(overrides=["store.dtype=int8", "store.int8_max_rmse=0.0001", "store.shard_rows=32"])
    with pytest.raises(StoreError, match="int8 has a relative RMSE"):
        extract(open_corpus(corpus), tmp_path / "t.zarr", ["clip"], strict, limit=40, in_process=True)
    extract(open_corpus(corpus), tmp_path / "t.zarr", ["clip"], strict, limit=40, in_process=True, force=True)
    with pytest.raises(
        StoreError, match="clip/5/tokens has a relative RMSE of 0.0.*above store.int8_max_rmse = 0.0001"
    ):
        fidelity.report(tmp_path / "t.zarr", tmp_path / "g.json")
    assert (tmp_path / "g.json").is_file()
