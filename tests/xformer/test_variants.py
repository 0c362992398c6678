"""Every system of the paper trains through both stages on one store, has its size, and reads what it says it reads."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from xformer import checkpoint
from xformer.data import Cache, Pairs
from xformer.errors import SettingsError, StoreError
from xformer.local import mask_ratio, rebuilds
from xformer.model import build_stage1, build_xformer
from xformer.settings import load_settings
from xformer.text import TextTokenizer
from xformer.train import train_stage1, train_stage2


@pytest.fixture(scope="module")
def rich(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with everything that any system reads: two CLIP blocks, mask draws, whole-image MAE features."""
    from pipeline.corpora import open_corpus
    from pipeline.extract import extract

    settings = load_settings(overrides=["store.shard_rows=64", "mae.draws=1", "clip.layers=[5,3]"])
    store = tmp_path_factory.mktemp("rich") / "store.zarr"
    extract(open_corpus(corpus), store, ["clip", "mae"], settings, in_process=True)
    extract(open_corpus(corpus), store, ["mae"], settings, whole=True, in_process=True)
    return store


SYSTEMS = {
    "concat": ("concat", []),
    "early": ("early", []),
    "concat, masked": ("concat", ["local.mask_ratio=0.75"]),
    "early, CLIP block 3": ("early", ["local.tokens=clip"]),
    "X-Former, CLIP block 3": ("xformer", ["local.tokens=clip"]),
    "no reconstruction, whole image": ("xformer", ["stage1.weights.reconstruction=0", "local.mask_ratio=0"]),
    "reconstruction in stage 2": ("xformer", ["stage2.weights.reconstruction=1"]),
    "whole image in stage 2": ("xformer", ["stage2.mask_ratio=0"]),
    "depth 2, two FFNs, layerwise ITG": ("xformer", ["dual.depth=2", "dual.ffn_block2=true", "dual.itg=layerwise"]),
}
REBUILDS = {
    "depth 2, two FFNs, layerwise ITG": (True, False),
    "reconstruction in stage 2": (True, True),
    "whole image in stage 2": (True, False),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_through_both_stages(name: str, rich: Path, small: list[str], tmp_path: Path) -> None:
    model, more = SYSTEMS[name]
    settings = load_settings(overrides=[*small, "train.max_steps=2", *more])
    first = train_stage1([rich], tmp_path / "1", settings, model, resume=False)
    second = train_stage2([rich], tmp_path / "1", tmp_path / "2", settings, None, resume=False)
    want = REBUILDS.get(name, (False, False))
    assert ("reconstruction" in first["validation"]) == want[0]
    logged = (tmp_path / "2/log.jsonl").read_text()
    assert ("reconstruction" in logged) == want[1] and second["model"] == model
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "2"))["model"] == model


def test_the_mask_of_each_phase() -> None:
    plain = load_settings()
    assert [mask_ratio(plain, "xformer", p) for p in ("stage1", "stage2", "eval")] == [0.75] * 3
    assert [mask_ratio(plain, "early", p) for p in ("stage1", "stage2", "eval")] == [0.0] * 3
    told = load_settings(overrides=["local.mask_ratio=0.5", "stage2.mask_ratio=0"])
    assert [mask_ratio(told, "concat", p) for p in ("stage1", "stage2", "eval")] == [0.5, 0.0, 0.0]
    whole = load_settings(overrides=["eval.mask_ratio=0"])
    assert [mask_ratio(whole, "xformer", p) for p in ("stage1", "stage2", "eval")] == [0.75, 0.75, 0.0]
    assert not rebuilds(load_settings(overrides=["local.tokens=clip"]), "xformer", "stage1")


def test_the_papers_sizes_of_concatenation_and_early_cross_attention() -> None:
    settings = load_settings("paper")
    with torch.device("meta"):
        early, qformer = build_xformer(settings, "early", 0), build_xformer(settings, "qformer", 0)
        text = build_xformer(settings, "qformer", 30523).qformer.layers
        concat = build_xformer(settings, "concat", 0)
    counts = [sum(p.numel() for p in m.parameters()) for m in (early, qformer, concat)]
    text_ffns = sum(p.numel() for layer in text for p in layer.text_ffn.parameters())
    linear = {width: 768 * width + width for width in (2560, 4096)}
    assert [round((counts[0] + n) / 1e6, 1) for n in linear.values()] == [126.0, 127.2]
    assert [round((counts[0] + text_ffns + n) / 1e6, 1) for n in linear.values()] == [182.7, 183.9]
    assert counts[0] - counts[1] == 6 * (2 * (768 * 768 + 768) + 2 * (1280 * 768 + 768) + 2 * 768)
    assert counts[2] - counts[1] == 1280 * 1408 + 1408


@pytest.mark.parametrize("model", ["concat", "early"])
def test_local_tokens_reach_every_loss(model: str, rich: Path) -> None:
    settings = load_settings()
    tokenizer = TextTokenizer(settings.qformer.text, 40, 50)
    pairs = Pairs([Cache(rich, settings, model, pixels=False)], "train", tokenizer, settings)
    torch.manual_seed(0)
    stage1 = build_stage1(settings, model, tokenizer.vocabulary, tokenizer.begin)
    batch, _ = pairs.batch(np.arange(0, 40, 5), 0)
    assert batch.mae is not None and batch.mae.shape[1] == 65 and batch.kept is None
    batch.mae = batch.mae.float().requires_grad_()
    losses, _ = stage1(batch, True, torch.Generator().manual_seed(0))
    assert set(losses) == {"itc", "itm", "itg"}
    for name, value in losses.items():
        (gradient,) = torch.autograd.grad(value, batch.mae, retain_graph=True)
        assert gradient.abs().sum() > 0, name


def test_evaluation_reads_whole_images_when_told_and_local_settings_must_agree(
    rich: Path, features: Path, stage1: Path, stage2: Path, corpus: Path, small: list[str], tmp_path: Path
) -> None:
    from pipeline.temporary import temporary_store
    from xformer.evaluation.run import Request, evaluate
    from xformer.evaluation.suite import Files

    val = corpus / "val"
    files = Files(val / "vqa_questions.json", val / "vqa_annotations.json")
    quick = ["eval.beams=1", "eval.max_new_tokens=2", "eval.mask_ratio=0"]
    asked = Request(
        "vqav2", tmp_path / "e", files, checkpoint=stage2, limit=4, blind=False, shuffled=False, overrides=quick
    )
    report = evaluate(asked, lambda *_: rich)
    assert report["mask_ratio"] == 0
    with pytest.raises(StoreError, match="mask-ratio 0"):
        evaluate(replace(asked, out=tmp_path / "f"), lambda *_: features)
    assert (
        "mae/full/tokens"
        in Cache(
            temporary_store(val / "images", stage2, None, quick),
            load_settings(overrides=quick),
            "xformer",
            False,
            "eval",
        ).store.names()
    )
    with pytest.raises(SettingsError, match="local.mask_ratio is 0.0 here and None"):
        changed = load_settings(overrides=[*small, "local.mask_ratio=0"])
        train_stage2([rich], stage1, tmp_path / "out", changed, None, resume=False)


def test_text_is_padded_to_a_multiple_of_eight() -> None:
    settings = load_settings()
    tokenizer = TextTokenizer(settings.qformer.text, 40, 50)
    ids, mask = tokenizer(["a red circle", "two blue squares and one green triangle on the left"])
    assert ids.shape[1] % 8 == 0 and mask.sum(1).max() > ids.shape[1] - 8
