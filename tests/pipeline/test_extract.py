"""Extraction: the encoders' own tokens, row by row; what fails is a dead letter; a rerun does only what is missing."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import main
from pipeline import audit, cluster, commits, images, masks, provenance, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from pipeline.index import Index
from pipeline.merge import merge
from xformer.errors import CorpusError, SettingsError, StoreError, WeightsError
from xformer.settings import Settings, load_settings


def shards(path: Path) -> dict[str, str]:
    """The sha256 of every shard file; what a killed write left under a name with a dot is none, `store gc` removes it."""
    found = {*path.rglob("c/*"), *path.rglob("c/*/**/*")}
    files = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def withdraw(path: Path, name: str, numbers: set[int]) -> None:
    """A store as an extraction leaves it that was stopped before it had committed these shards."""
    records = commits.committed(path, name)
    for file in (path / name / "commits").iterdir():
        file.unlink()
    for number in records.keys() - numbers:
        commits.publish(path, name, records[number])


def test_cached_clip_tokens_are_the_models_own(features: Path, corpus: Path, settings: Settings) -> None:
    import timm
    from safetensors.torch import load_file

    model = timm.create_model(settings.clip.architecture, num_classes=0, **settings.clip.kwargs)  # type: ignore[arg-type]
    weights = load_file("xformer/tiny/clip/model.safetensors")
    model.load_state_dict({k: v.float() for k, v in weights.items()})
    image = Image.open(corpus / "train/images/000000000005.png")
    pixels = images.normalise(images.evaluation_view(image, 64)[None], settings.clip.mean, settings.clip.std)
    x = model.eval()._pos_embed(model.patch_embed(torch.from_numpy(pixels)))
    for block in model.blocks[:5]:
        x = block(x)
    cached = store.FeatureStore(features).complete("clip/5/tokens").read([4])
    own = x[0, : model.num_prefix_tokens]  # `tokens: global`: the class token and the registers
    assert settings.clip.tokens == "global" and len(own) == 8
    np.testing.assert_allclose(cached[0], own.detach().numpy(), rtol=2e-3, atol=2e-3)


def test_cached_mae_tokens_are_the_models_own_in_raster_order(features: Path, corpus: Path, settings: Settings) -> None:
    from transformers import ViTMAEForPreTraining

    model = ViTMAEForPreTraining.from_pretrained("xformer/tiny/mae", dtype=torch.float32).eval()
    assert model.vit.embeddings.position_embeddings.std() > 0.1 and model.decoder.decoder_pos_embed.std() > 0.1
    image = Image.open(corpus / "train/images/000000000005.png")
    pixels = images.normalise(images.evaluation_view(image, 64)[None], settings.mae.mean, settings.mae.std)
    noise = masks.noise(0, 1, "5", 64)
    with torch.no_grad():
        tokens = model.vit(torch.from_numpy(pixels), noise=torch.from_numpy(noise[None]).float()).last_hidden_state[0]
    order = np.argsort(noise)[:16]
    raster = [0, *(1 + np.argsort(order))]
    opened = store.FeatureStore(features)
    cached = opened.complete("mae/draw-1/tokens").read([4])[0]
    np.testing.assert_allclose(cached, tokens[raster].numpy(), rtol=2e-3, atol=2e-3)
    kept = masks.unpack(opened.complete("mae/draw-1/kept").read([4]), 64)[0]
    assert np.flatnonzero(kept).tolist() == sorted(order.tolist())
    np.testing.assert_array_equal(opened.complete("pixels/view-0").read([4])[0], np.asarray(image).transpose(2, 0, 1))


def test_a_rerun_does_nothing_and_more_draws_rewrite_nothing(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    source, path = open_corpus(corpus), tmp_path / "s.zarr"
    extract(source, path, ["mae"], settings, limit=40, in_process=True)
    before = shards(path)
    again = extract(source, path, ["mae"], settings, limit=40, in_process=True)
    assert again["encoders"]["mae"]["images"] == 0 and shards(path) == before
    three = load_settings(overrides=["store.shard_rows=32", "mae.draws=3"])
    extract(source, path, ["mae", "clip"], three, limit=40, in_process=True)
    after = shards(path)
    assert before.items() <= after.items() and any("draw-2" in name for name in after)


def test_another_encoder_mask_or_corpus_is_refused_by_name(
    features: Path, corpus: Path, settings: Settings, tmp_path: Path
) -> None:
    source = open_corpus(corpus)
    for override, field in (
        ("clip.mean=[0,0,0]", "norm"),
        ("clip.autocast=bf16", "autocast"),
        ("mae.mask_ratio=0.5", "mask_ratio"),
        ("mae.mask_seed=7", "mask_seed"),
    ):
        changed = load_settings(overrides=["store.shard_rows=32", "mae.draws=2", override])
        kind = override.partition(".")[0]
        with pytest.raises(StoreError, match=field):
            extract(source, features, [kind], changed, in_process=True)
    with pytest.raises(StoreError, match="another corpus"):
        extract(source, features, ["clip"], settings, limit=3, in_process=True)


def broken_corpus(tmp_path: Path, good: int = 30) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(good):
        Image.new("RGB", (20, 30), (i, 0, 0)).save(folder / f"{i:03d}.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / "cut.png").write_bytes((folder / "001.png").read_bytes()[:60])
    return folder


def test_broken_files_become_dead_letters_and_keep_their_rows(tmp_path: Path) -> None:
    settings = load_settings(overrides=["store.shard_rows=16", "corpus.max_dead_fraction=0.2", "mae.draws=1"])
    path = tmp_path / "s.zarr"
    report = extract(open_corpus(broken_corpus(tmp_path)), path, ["clip", "mae"], settings, in_process=True)
    assert report["images"] == 33 and sorted(d["id"] for d in report["dead"]) == ["cut.png", "empty.jpg", "text.png"]
    assert all(d["reason"] for d in report["dead"])
    array = store.FeatureStore(path).complete("clip/5/tokens")
    dead = next(d["row"] for d in report["dead"] if d["id"] == "cut.png")
    with pytest.raises(StoreError, match="dead letter"):
        array.read([dead])
    assert np.isfinite(array.read([dead - 1])).all()


def test_a_refused_extraction_leaves_no_store_and_its_mended_rerun_works(tmp_path: Path) -> None:
    folder, path = broken_corpus(tmp_path), tmp_path / "s.zarr"
    for name in ("text.png", "cut.png"):
        (folder / name).write_bytes(b"")
    with pytest.raises(CorpusError, match="max_dead_fraction.*first: cut.png: the file is empty"):
        extract(open_corpus(folder), path, ["clip"], load_settings(), in_process=True)
    assert not path.exists()
    for override, error in (
        ("clip.layers=[99]", WeightsError), ("clip.width=97", WeightsError), ("clip.architecture=nosuch", WeightsError),
        ("clip.kwargs={nosuch: 1}", WeightsError), ("store.views=3", SettingsError),
    ):  # fmt: skip
        with pytest.raises(error):
            extract(open_corpus(folder), path, ["clip", "mae"], load_settings(overrides=[override]), in_process=True)
        assert not path.exists()
    for name in ("empty.jpg", "text.png", "cut.png"):
        (folder / name).unlink()
    assert extract(open_corpus(folder), path, ["clip"], load_settings(), in_process=True)["dead"] == []


def test_nothing_usable_a_folder_of_other_things_and_no_gpu_are_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/1.png").write_text("no picture")
    source, settings = open_corpus(tmp_path / "one"), load_settings()
    for dtype in ("fp16", "int8"):
        asked = load_settings(overrides=[f"store.dtype={dtype}"])
        with pytest.raises(CorpusError, match="no image of 1 is usable; the first: 1.png: not a picture"):
            extract(source, tmp_path / f"{dtype}.zarr", ["clip"], asked, in_process=True)
    assert not (tmp_path / "int8.zarr").exists()
    (tmp_path / "mine/folder").mkdir(parents=True)
    with pytest.raises(StoreError, match="holds other files"):
        extract(source, tmp_path / "mine", ["clip"], settings, in_process=True)
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device"):
            extract(source, tmp_path / "s.zarr", ["clip"], settings, gpus=True)
    with pytest.raises(CorpusError, match="leave it out"):
        open_corpus(tmp_path / "one", tmp_path)


def test_what_is_committed_survives_a_refusal(tmp_path: Path) -> None:
    folder, path = broken_corpus(tmp_path), tmp_path / "s.zarr"
    with pytest.raises(CorpusError, match="max_dead_fraction"):
        extract(open_corpus(folder), path, ["clip"], load_settings(), in_process=True)
    before = shards(path)
    for kinds in (["clip"], ["mae"], ["clip"]):  # running again does not bypass it
        with pytest.raises(CorpusError, match="max_dead_fraction"):
            extract(open_corpus(folder), path, kinds, load_settings(), in_process=True)
    assert shards(path) == before
    more = load_settings(overrides=["corpus.max_dead_fraction=0.5"])
    report = extract(open_corpus(folder), path, ["clip"], more, in_process=True)
    assert report["encoders"]["clip"]["shards done before"] == 1 and len(report["dead"]) == 3


def test_a_rerun_over_other_pictures_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(300):
        Image.new("RGB", (8, 8), (i % 256, i // 256, 0)).save(folder / f"{i:03d}.png")
    settings = load_settings(overrides=["store.shard_rows=30", "mae.draws=1"])
    extract(open_corpus(folder), path, ["clip"], settings, in_process=True)
    before = shards(path)
    main(["store", "verify", str(path), "--source"])
    for i in range(0, 300, 30):  # the first of every shard
        Image.new("RGB", (8, 8), (0, 0, 99)).save(folder / f"{i:03d}.png")
    source = open_corpus(folder)  # its identity is that of the file names
    (folder / "007.png").unlink()
    for kind in ("clip", "mae"):
        with pytest.raises(
            StoreError, match=r"planned over other pictures.*000.png: the file has changed.*another --store"
        ):
            extract(source, path, [kind], settings, in_process=True)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["store", "verify", str(path), "--source", "--json", str(tmp_path / "source.json")])
    told = json.loads((tmp_path / "source.json").read_text())["changed"]
    assert len(told) == 11 and any(line.startswith("007.png: cannot be read") for line in told)
    assert "other pictures: 11 differ; give another" in capsys.readouterr().err and shards(path) == before


def test_vanished_pictures_become_dead_letters_of_what_is_added_and_too_many_are_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    moved, path = Path(shutil.copytree(corpus, tmp_path / "corpus")), tmp_path / "s.zarr"
    source, settings = open_corpus(moved), load_settings(overrides=["store.shard_rows=16", "mae.draws=1"])
    extract(source, path, ["clip"], settings, limit=40, in_process=True)
    files = [moved / record["location"] for shard in range(3) for record in Index(path / "index").shard(shard)]
    for row in (3, 20):
        files[row].unlink()
    report = extract(source, path, ["mae"], settings, limit=40, in_process=True)
    assert [(d["row"], "No such file" in d["reason"]) for d in report["dead"]] == [(3, True), (20, True)]
    assert "of 40 pictures looked at, 2 cannot be read any more" in capsys.readouterr().out
    opened, before = store.FeatureStore(path), shards(path)
    assert np.isfinite(opened.complete("clip/5/tokens").read([3, 20])).all()
    assert opened.complete("mae/draw-0/tokens").dead_rows.tolist() == [3, 20] and audit.verify(path) == []
    for row in (5, 21, 30, 39):
        files[row].unlink()
    more = load_settings(overrides=["store.shard_rows=16", "mae.draws=2"])
    with pytest.raises(
        StoreError, match="of 38 pictures looked at, 4 cannot be read any more; the first: .*restore them"
    ):
        extract(source, path, ["mae"], more, limit=40, in_process=True)
    files[6].write_bytes(files[7].read_bytes())
    with pytest.raises(StoreError, match="planned over other pictures"):
        extract(source, path, ["mae"], more, limit=40, in_process=True)
    assert shards(path) == before


def test_how_an_array_was_made_stays_as_it_was_said(corpus: Path, settings: Settings, tmp_path: Path) -> None:
    path, source, name = tmp_path / "s.zarr", open_corpus(corpus), "clip/5/tokens"
    extract(source, path, ["clip"], settings, limit=64, in_process=True)
    file = path / name / "made.json"
    made = json.loads(file.read_text())
    now = made["versions"]["torch"]
    made["versions"]["torch"] = "1.0"
    made["check"] = provenance.check_of(made)
    file.write_text(json.dumps(made))
    before = file.read_bytes()
    extract(source, path, ["clip"], settings, limit=64, in_process=True)
    assert file.read_bytes() == before  # nothing was made
    withdraw(path, name, {1})
    for _ in range(2):
        extract(source, path, ["clip"], settings, limit=64, in_process=True)
        assert json.loads(file.read_text())["versions"]["torch"] == f"1.0, {now}"
    file.unlink()
    extract(source, path, ["clip"], settings, limit=64, in_process=True)
    assert json.loads(file.read_text())["versions"]["torch"] == now


def test_a_store_without_a_commit_is_planned_anew_and_one_with_a_commit_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (i, 0, 0)).save(folder / f"{i}.png")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cluster, "run_here", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(open_corpus(folder), path, ["mae"], load_settings(), in_process=True)
    (folder / "0.png").unlink()
    other = load_settings(overrides=["mae.mask_ratio=0.5", "mae.draws=1"])
    assert extract(open_corpus(folder), path, ["mae"], other, in_process=True)["images"] == 2
    assert store.FeatureStore(path).complete("mae/draw-0/tokens").read([0, 1]).shape == (2, 33, 96)
    (folder / "1.png").unlink()
    with pytest.raises(StoreError, match="another corpus"):
        extract(open_corpus(folder), path, ["mae"], other, in_process=True)


def test_features_whose_index_is_lost_are_never_planned_over(
    corpus: Path, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    extract(open_corpus(folder), path, ["clip"], settings, in_process=True)
    index = Path(shutil.copytree(path / "index", tmp_path / "index"))
    for i in range(6):
        Image.new("RGB", (8, 8), (0, i, 9)).save(folder / f"{i}.png")
    other = tmp_path / "other.zarr"
    extract(open_corpus(folder), other, ["mae"], settings, in_process=True)
    (path / "index/index.json").unlink()
    for part in ("index", "clip/5/tokens/zarr.json", "clip/5/tokens/made.json"):  # the more is lost
        before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        for run in (
            lambda: extract(open_corpus(folder), path, ["clip"], settings, in_process=True),
            lambda: extract(open_corpus(corpus), path, ["mae"], settings, in_process=True),
            lambda: merge(path, [other]),
        ):
            with pytest.raises(
                StoreError, match="s.zarr has features but its index is lost: restore .*s.zarr/index from"
            ):
                run()
        assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
        shutil.rmtree(path / part) if part == "index" else (path / part).unlink()
    extract(open_corpus(folder), tmp_path / "two.zarr", ["clip"], settings, in_process=True)
    shutil.copytree(tmp_path / "two.zarr/clip", path / "clip", dirs_exist_ok=True)
    shutil.copytree(index, path / "index")  # of the first pictures; the features are of the others
    with pytest.raises(StoreError, match="clip/5/tokens has other ids or pictures than the index"):
        merge(path, [other])
    with pytest.raises(StoreError, match="clip/5/tokens has other ids or pictures than the index"):
        store.FeatureStore(path).complete("clip/5/tokens")


def test_features_that_are_not_finite_become_dead_letters(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import encoders

    original = encoders.ClipEncoder.encode

    def poisoned(self, pixels, layers):
        found = original(self, pixels, layers)
        found[5][2, 0, 0], found[5][3, 0, 0] = np.nan, 1e5
        return found

    monkeypatch.setattr(encoders.ClipEncoder, "encode", poisoned)
    settings = load_settings(overrides=["corpus.max_dead_fraction=0.5", "clip.batch=128", "store.shard_rows=64"])
    report = extract(open_corpus(corpus), tmp_path / "s.zarr", ["clip"], settings, limit=64, in_process=True)
    assert [d["row"] for d in report["dead"]] == [2, 3]


def test_doubled_ids_are_refused_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("COCO_train2014_000000000001.png", "COCO_val2014_000000000001.png"):
        Image.new("RGB", (8, 8)).save(folder / name)
    with pytest.raises(CorpusError, match="stand twice.*: 1;"):
        extract(open_corpus(folder), tmp_path / "s.zarr", ["clip"], load_settings(), in_process=True)


def test_wrong_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.json").write_text("{}")
    for source, root, words in (
        (tmp_path / "nowhere", None, "no such file"),
        (tmp_path / "empty", None, "no pictures"),
        (tmp_path / "list.json", None, "--images"),
        (tmp_path / "list.json", tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(CorpusError, match=words):
            open_corpus(source, root)
    with pytest.raises(CorpusError, match="'images' is missing"):
        list(open_corpus(tmp_path / "list.json", tmp_path).rows())


def test_file_names_cannot_leave_the_picture_folder(tmp_path: Path) -> None:
    for name in ("../secret.png", "/etc/passwd", "a/../../b.png"):
        content = {"images": [{"id": 1, "file_name": name}], "annotations": []}
        (tmp_path / "c.json").write_text(json.dumps(content))
        with pytest.raises(CorpusError, match="leads out"):
            list(open_corpus(tmp_path / "c.json", tmp_path).rows())


def test_a_caption_file_with_a_null_a_doubled_or_an_unknown_image_is_refused(tmp_path: Path) -> None:
    image = {"id": 7, "file_name": "a.png"}
    for listed, annotations, words in (
        ([image], [{"image_id": 7, "caption": None}], "caption of image 7 is null"),
        ([{"id": 7, "file_name": 3}], [], "file_name of image 7 is 3"),
        ([image, image], [], "image id 7 stands twice"),
        ([image], [{"image_id": 8, "caption": "a cat"}], "image 8, which is not among"),
    ):
        (tmp_path / "c.json").write_text(json.dumps({"images": listed, "annotations": annotations}))
        with pytest.raises(CorpusError, match=words):
            list(open_corpus(tmp_path / "c.json", tmp_path).rows())


def test_killed_and_run_again_the_bytes_are_those_of_an_uninterrupted_run(
    corpus: Path, settings: Settings, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.zarr"
    extract(open_corpus(corpus), whole, ["clip"], settings, in_process=True)
    path = tmp_path / "killed.zarr"
    code = (
        "import sys; from pathlib import Path; from pipeline.corpora import open_corpus\n"
        "from pipeline.extract import extract; from xformer.settings import load_settings\n"
        "s = load_settings(overrides=['store.shard_rows=32', 'mae.draws=2'])\n"
        "extract(open_corpus(Path(sys.argv[1])), Path(sys.argv[2]), ['clip'], s, in_process=True)\n"
    )
    commits = path / "clip/5/tokens/commits"
    for wanted in (1, 3):
        child = subprocess.Popen([sys.executable, "-c", code, str(corpus), str(path)], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if commits.is_dir() and len(list(commits.glob("[0-9]*.json"))) >= wanted:
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        child.wait()
    extract(open_corpus(corpus), path, ["clip"], settings, in_process=True)
    assert audit.verify(path) == [] and shards(path) == shards(whole)


def test_one_pass_gives_the_bytes_of_one_pass_for_each(corpus: Path, tmp_path: Path) -> None:
    wanted = ["store.shard_rows=32", "mae.draws=2", "store.views=2", "clip.layers=[5,4]"]
    settings, source = load_settings(overrides=wanted), open_corpus(corpus)
    extract(source, tmp_path / "one.zarr", ["clip", "mae"], settings, limit=40, in_process=True)
    for kind in ("mae", "clip"):
        extract(source, tmp_path / "two.zarr", [kind], settings, limit=40, in_process=True)
    assert shards(tmp_path / "one.zarr") == shards(tmp_path / "two.zarr")
    assert {n for n in store.array_names(tmp_path / "one.zarr") if n.startswith(("clip", "pixels"))} == {
        "clip/4/tokens", "clip/4/view-1/tokens", "clip/5/tokens", "clip/5/view-1/tokens", "pixels/view-0", "pixels/view-1",
    }  # fmt: skip


def test_only_c_is_cached_without_its_patches(corpus: Path, tmp_path: Path) -> None:
    from xformer.data import Cache
    from xformer.errors import StoreError

    path, source, patches = tmp_path / "s.zarr", open_corpus(corpus), (64 // 16) ** 2
    together = load_settings(overrides=["store.shard_rows=16", "clip.layers=[5,3]"])
    extract(source, path, ["clip"], together, limit=16, in_process=True)
    assert [store.FeatureStore(path).array(f"clip/{layer}/tokens").shape[0] for layer in (5, 3)] == [8, 8 + patches]
    local = load_settings(overrides=["local.tokens=clip", "local.layer=3"])
    assert Cache(path, local, "xformer", pixels=False).read(np.arange(2), 0).mae.shape[1] == 8 + patches
    for wrong in (["clip.layers=[3]"], ["clip.tokens=all"]):
        with pytest.raises(StoreError, match="tokens, the settings ask for .*--layers"):
            Cache(path, load_settings(overrides=wrong), "qformer", pixels=False)
    for layer in (5, 3):  # one after the other, each is the C of its extraction
        alone = load_settings(overrides=["store.shard_rows=16", f"clip.layers=[{layer}]"])
        extract(source, tmp_path / "alone.zarr", ["clip"], alone, limit=16, in_process=True)
    with pytest.raises(StoreError, match="clip/3/tokens holds global tokens, the settings ask for all .*--layers 5,3"):
        Cache(tmp_path / "alone.zarr", local, "xformer", pixels=False)


def test_each_image_is_decoded_once(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = images.decode, []
    monkeypatch.setattr(images, "decode", lambda *given: (calls.append(1), original(*given))[1])
    settings = load_settings(overrides=["store.shard_rows=16", "mae.draws=4", "store.views=2", "clip.layers=[4,5]"])
    extract(open_corpus(corpus), tmp_path / "s.zarr", ["clip", "mae"], settings, limit=40, in_process=True)
    assert len(calls) == 40


def test_draws_clip_and_pixels_of_one_epoch_share_a_view(corpus: Path, tmp_path: Path) -> None:
    from xformer.data import Cache

    settings = load_settings(overrides=["store.shard_rows=16", "mae.draws=4", "store.views=2"])
    extract(open_corpus(corpus), tmp_path / "s.zarr", ["clip", "mae"], settings, limit=20, in_process=True)
    cache = Cache(tmp_path / "s.zarr", settings, "xformer", pixels=True)
    assert cache.views == [0, 1, 0, 1]
    rows, opened = np.arange(5), store.FeatureStore(tmp_path / "s.zarr")
    for draw, view in enumerate(cache.views):
        found = cache.read(rows, draw)
        name = "clip/5/view-1/tokens" if view else "clip/5/tokens"
        np.testing.assert_array_equal(found.clip, opened.complete(name).read(rows))
        assert found.pixels is not None
        np.testing.assert_array_equal(found.pixels, opened.complete(f"pixels/view-{view}").read(rows))
    image = Image.open(corpus / "train/images/000000000001.png").convert("RGB")
    np.testing.assert_array_equal(opened.complete("pixels/view-1").read([0])[0], images.view(image, 64, 1, 0, "1"))
    assert not np.array_equal(images.view(image, 64, 1, 0, "1"), images.view(image, 64, 2, 0, "1"))
    odd = load_settings(overrides=["mae.draws=3", "store.views=2"])
    with pytest.raises(SettingsError, match="must divide mae.draws"):
        extract(open_corpus(corpus), tmp_path / "t.zarr", ["mae"], odd, limit=20, in_process=True)
