"""The paper's encoders in their public layout: a two-block version here, the full size under `slow`."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from pipeline.encoders import ClipEncoder, MaeEncoder, pick_device
from xformer.errors import WeightsError
from xformer.reconstruction import FrozenDecoder
from xformer.settings import load_settings

PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 224, 224)).astype(np.uint8)


def save_eva(folder: Path, depth: int) -> None:
    torch.manual_seed(0)
    model = timm.create_model("eva_giant_patch14_clip_224", pretrained=False, depth=depth)
    folder.mkdir()
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")


def test_eva_vit_g_of_two_blocks_gives_257_tokens_of_1408_before_the_norm(tmp_path: Path) -> None:
    save_eva(tmp_path / "eva", 2)
    settings = load_settings(
        "paper",
        overrides=[f"clip.weights={tmp_path}/eva", "clip.kwargs={depth: 2}", "clip.layers=[1,2]", "clip.autocast=fp32"],
    )
    encoder = ClipEncoder(settings.clip, settings.image_size)
    found = encoder.encode(PIXELS, [1, 2])
    assert found[1].shape == found[2].shape == (1, 257, 1408) and encoder.tokens(1) == encoder.tokens(2) == 257
    assert not np.allclose(found[1], found[2])
    with pytest.raises(WeightsError, match="only 2 blocks"):
        ClipEncoder(settings.clip.model_copy(update={"layers": [39]}), 224)
    with pytest.raises(WeightsError, match="does not fit"):
        ClipEncoder(settings.clip.model_copy(update={"kwargs": {"depth": 3}}), 224)


def test_vit_h_of_two_blocks_gives_65_tokens_of_1280_and_decodes_588_pixels(tmp_path: Path) -> None:
    config = ViTMAEConfig(
        hidden_size=1280, num_hidden_layers=2, num_attention_heads=16, intermediate_size=5120, patch_size=14,
        image_size=224, decoder_num_hidden_layers=1, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings, std=0.1)
    model.save_pretrained(tmp_path / "mae")
    settings = load_settings("paper", overrides=[f"mae.weights={tmp_path}/mae", "mae.autocast=fp32"])
    encoder = MaeEncoder(settings.mae, settings.image_size)
    kept = np.sort(np.random.default_rng(0).permutation(256)[:64])[None]
    tokens = encoder.encode(PIXELS, kept)
    assert tokens.shape == (1, 65, 1280)
    assert encoder.encode(PIXELS, np.arange(256)[None]).shape == (1, 257, 1280)
    decoder = FrozenDecoder(f"{tmp_path}/mae")
    mask = torch.zeros(1, 256, dtype=torch.bool)
    mask[0, kept[0]] = True
    assert decoder(torch.from_numpy(tokens), mask).shape == (1, 256, 588) and decoder.norm_pix
    wrong = load_settings(overrides=[f"mae.weights={tmp_path}/mae"])
    with pytest.raises(WeightsError, match="224"):
        MaeEncoder(wrong.mae, 64)


def test_a_process_takes_the_device_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    import distributed

    def named(name: object) -> None:
        monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(name=name))

    assert pick_device(False) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_device(True) == torch.device("cuda", 0)  # no worker
    for name, device in ((0, 0), (3, 3), (5, 1), ("tcp://10.0.0.2:4000", 0)):
        named(name)
        assert pick_device(True) == torch.device("cuda", device)


def test_any_number_of_patches_may_stay(tmp_path: Path) -> None:
    """Of 49 patches, shares that are no binary fractions: transformers truncates the count from a ratio."""
    config = ViTMAEConfig(image_size=28, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                          intermediate_size=8, decoder_hidden_size=8, decoder_num_hidden_layers=1,
                          decoder_num_attention_heads=2, decoder_intermediate_size=8)  # fmt: skip
    ViTMAEForPreTraining(config).save_pretrained(tmp_path / "mae")
    mae = load_settings().mae.model_copy(update={"weights": f"{tmp_path}/mae", "patch": 4, "width": 8})
    encoder, pixels = MaeEncoder(mae, 28), np.zeros((1, 3, 28, 28), np.uint8)
    for count in range(1, 50):
        assert encoder.encode(pixels, np.arange(count)[None]).shape == (1, 1 + count, 8)


@pytest.mark.slow
def test_the_full_sizes(tmp_path: Path) -> None:
    save_eva(tmp_path / "eva", 40)
    settings = load_settings("paper", overrides=[f"clip.weights={tmp_path}/eva", "clip.autocast=fp32"])
    found = ClipEncoder(settings.clip, 224).encode(PIXELS, [39])
    assert found[39].shape == (1, 257, 1408)
    config = ViTMAEConfig(
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        intermediate_size=5120,
        patch_size=14,
        image_size=224,
    )
    ViTMAEForPreTraining(config).save_pretrained(tmp_path / "mae")
    settings = load_settings("paper", overrides=[f"mae.weights={tmp_path}/mae", "mae.autocast=fp32"])
    assert MaeEncoder(settings.mae, 224).encode(PIXELS, np.arange(64)[None]).shape == (1, 65, 1280)
