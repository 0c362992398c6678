"""MAE's official checkpoints -> a transformers ViTMAE folder, with norm_pix_loss pinned beside the decoder it belongs to."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xformer import publish
from xformer.accounting import Rules, account
from xformer.errors import WeightsError

HEADS = {512: 16, 768: 12, 1024: 16, 1280: 16}  # models_mae.py, by width


def _block(theirs: str, ours: str) -> Rules:
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    names |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"} | {f"attn.{x}": f"attention.{x}_proj" for x in "qkv"}
    return [
        (rf"{theirs}\.(\d+)\.{k}\.(weight|bias)".replace("attn.", r"attn\."), rf"{ours}.\1.{v}.\2")
        for k, v in names.items()
    ]


ENCODER: Rules = [
    ("cls_token", "vit.embeddings.cls_token"),
    ("pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(weight|bias)", r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"norm\.(weight|bias)", r"vit.layernorm.\1"),
    *_block("blocks", "vit.layers"),
]
DECODER: Rules = [
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.decoder_pos_embed"),
    (r"(decoder_embed|decoder_norm|decoder_pred)\.(weight|bias)", r"decoder.\1.\2"),
    *_block("decoder_blocks", "decoder.decoder_layers"),
]


def _split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One qkv matrix becomes three."""
    found = {}
    for key, value in tensors.items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[key.replace(".qkv.", f".{name}.")] = part
        else:
            found[key] = value
    return found


def normalised_pixels(source: Path, told: bool | None) -> bool:
    """Whether the decoder was trained on normalised pixels: as told, else by the official file names."""
    by_name = False if "visualize" in source.name else True if "full" in source.name else None
    if told is None and by_name is None:
        raise WeightsError(
            f"{source}: holds a decoder, but its name does not say which pixels it predicts; say --norm-pix "
            "(mae_pretrain_*_full) or --raw-pix (mae_visualize_*)."
        )
    if told is not None and by_name is not None and told != by_name:
        raise WeightsError(f"{source}: norm_pix is {by_name} by the file's name and {told} by the option.")
    return bool(by_name if told is None else told)


def import_mae(source: Path, tensors: dict[str, Tensor], out: Path, norm_pix: bool | None) -> dict[str, Any]:
    """Writes OUT/{config.json,model.safetensors}. An encoder-only file gives a folder without a decoder."""
    from safetensors.torch import save_file
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    for needed in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if needed not in tensors:
            raise WeightsError(f"{source}: {needed} is missing; this is no MAE.")
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    whole = "mask_token" in tensors
    inner = tensors["decoder_embed.weight"].shape[0] if "decoder_embed.weight" in tensors else 512
    for name, value in (("width", width), ("decoder width", inner)):
        if value not in HEADS:
            raise WeightsError(f"{source}: the {name} is {value}; MAE's official ones are {sorted(HEADS)}.")

    def depth(start: str) -> int:
        return len({key.split(".")[1] for key in tensors if key.startswith(f"{start}.")})

    def hidden(start: str, default: int) -> int:
        return tensors[f"{start}.0.mlp.fc1.weight"].shape[0] if f"{start}.0.mlp.fc1.weight" in tensors else default

    config = ViTMAEConfig(
        image_size=math.isqrt(tensors["pos_embed"].shape[1] - 1) * patch, patch_size=patch, hidden_size=width,
        num_hidden_layers=depth("blocks"), num_attention_heads=HEADS[width], intermediate_size=hidden("blocks", 4 * width),
        decoder_hidden_size=inner, decoder_num_hidden_layers=depth("decoder_blocks") if whole else 8,
        decoder_num_attention_heads=HEADS[inner], decoder_intermediate_size=hidden("decoder_blocks", 2048),
        layer_norm_eps=1e-6, norm_pix_loss=normalised_pixels(source, norm_pix) if whole else False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ViTMAEForPreTraining(config).state_dict().items()}
    wanted = {k: s for k, s in shapes.items() if whole or k.startswith("vit.")}
    found = account(source, _split(tensors), ENCODER + (DECODER if whole else []), [], wanted)
    if out.exists() and any(out.iterdir()):
        raise WeightsError(f"--out {out} is not empty; give another folder.")
    config.architectures = ["ViTMAEForPreTraining"]
    with publish.directory(out) as folder:
        config.save_pretrained(folder)
        contiguous = {k: v.contiguous() for k, v in found.tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "MAE encoder and decoder" if whole else "MAE encoder"
    return {"what": kind, "imported": found.imported, "ignored": {}, "new": {}, "norm_pix_loss": config.norm_pix_loss}
