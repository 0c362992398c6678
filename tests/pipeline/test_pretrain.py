"""The embedded models: small, carded, able, and reproducible."""

import json
from pathlib import Path

import pytest

from cli import main
from xformer.weights import EMBEDDED, sha256_of


def test_the_embedded_models_are_small_and_have_cards() -> None:
    files = [f for f in EMBEDDED.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 12_000_000
    for name in ("clip", "mae", "llm", "text"):
        assert "| figure | value |" in (EMBEDDED / name / "README.md").read_text()
    assert {f.suffix for f in files} == {".safetensors", ".json", ".md"}


def test_the_embedded_mae_beats_each_images_mean(corpus: Path) -> None:
    import numpy as np
    import torch

    from pipeline import images, pretrain, pretrain_mae
    from pipeline.encoders import load_mae
    from xformer.settings import load_settings

    mae = load_settings().mae
    pictures, _ = pretrain.load_pictures(corpus / "val")
    pixels = torch.from_numpy(images.normalise(pictures, mae.mean, mae.std))
    noise = torch.from_numpy(np.random.default_rng(0).random((len(pixels), 64), np.float32))
    error, mean = pretrain_mae.masked_errors(load_mae(EMBEDDED / "mae", mae), pixels, noise)
    assert error < 0.75 * mean


def test_packed_texts_are_read_as_if_each_stood_alone() -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    from pipeline.pretrain_llm import END, pack

    torch.manual_seed(0)
    config = OPTConfig(vocab_size=40, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, ffn_dim=64,
                       num_attention_heads=2, max_position_embeddings=64)  # fmt: skip
    model = OPTForCausalLM(config).eval()
    samples = [([5, 6, 7, 8], [([END, 9, 10], 0), ([END, 11, 12, 13, 14], 2)]), ([], [([END, 15, 16, 17], 1)])]
    packed = pack(samples)
    together = model.model(
        input_ids=packed.ids, attention_mask=packed.allowed, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    for row, (front, said) in enumerate(samples):
        start = len(front)
        for text, answered in said:
            alone = model.model(input_ids=torch.tensor([front + text])).last_hidden_state[0, len(front) :]
            here = slice(start, start + len(text))
            assert torch.allclose(together[row, here], alone, atol=1e-5)
            assert packed.labels[row, here].tolist() == [*text[1:], -100]
            assert int(packed.answers[row, here].sum()) == answered
            start += len(text)


@pytest.mark.parametrize("what", ["clip", "mae", "llm"])
def test_training_again_gives_the_same_bytes(what: str, corpus: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        main(["pretrain", what, "--corpus", str(corpus), "--out", str(tmp_path / name), "--steps", "2", "--quiet",
              "--seed", "3"]) if what != "clip" else _clip(corpus, tmp_path / name)  # fmt: skip
    assert sha256_of(tmp_path / "a/model.safetensors") == sha256_of(tmp_path / "b/model.safetensors")
    assert json.loads((tmp_path / "a/figures.json").read_text())["steps"] == 2


def _clip(corpus: Path, out: Path) -> None:
    from pipeline.pretrain_clip import pretrain_clip
    from xformer.settings import load_settings

    pretrain_clip(corpus, out, load_settings().clip, 64, seed=3, steps=2, batch=32)


@pytest.mark.slow
def test_the_shipped_weights_are_made_again(tmp_path: Path) -> None:
    main(["corpus", "shapes", "--out", str(tmp_path / "big"), "--train", "24000", "--val", "1000"])
    for what in ("clip", "mae", "llm"):
        main(["pretrain", what, "--corpus", str(tmp_path / "big"), "--out", str(tmp_path / what)])
        shipped = json.loads((EMBEDDED / what / "figures.json").read_text())
        again = json.loads((tmp_path / what / "figures.json").read_text())
        assert all(again[k] == pytest.approx(v, rel=0.05, abs=0.03) for k, v in shipped.items())
