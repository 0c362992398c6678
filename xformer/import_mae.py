"""MAE's official checkpoints -> a transformers ViTMAE folder, with norm_pix_loss pinned beside the decoder it belongs to."""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xformer import publish
from xformer.accounting import Rules, account, refuse_strange, sizes
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


def _split(source: Path, tensors: dict[str, Tensor], width: int, inner: int) -> dict[str, Tensor]:
    """One qkv matrix becomes three; of encoder blocks as `width`, of decoder blocks as `inner` asks."""
    found = {}
    for key, value in tensors.items():
        if matched := re.fullmatch(r"(decoder_)?blocks\.[0-9]+\.attn\.qkv\.(weight|bias)", key):
            own = inner if matched[1] else width
            wanted = (3 * own, own) if matched[2] == "weight" else (3 * own,)
            if value.shape != wanted:
                raise WeightsError(f"{source}: {key} has shape {tuple(value.shape)}, not {wanted}.")
            refuse_strange(source, key, value)
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

    whole = "mask_token" in tensors
    decoder = ("decoder_embed.weight", "decoder_blocks.0.mlp.fc1.weight") if whole else ()
    for needed in ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", *decoder):
        if needed not in tensors:
            raise WeightsError(f"{source}: {needed} is missing; this is no {'whole ' * whole}MAE.")
    width, _, patch, _ = sizes(source, tensors, "patch_embed.proj.weight", ("width", 3, "patch", "patch"))
    _, places, _ = sizes(source, tensors, "pos_embed", (1, "1 + patches", width))
    side = math.isqrt(places - 1)
    if side == 0 or side * side != places - 1:
        shape = tuple(tensors["pos_embed"].shape)
        raise WeightsError(f"{source}: pos_embed has shape {shape}, not (1, 1 + a square of patches, {width}).")
    inner = sizes(source, tensors, "decoder_embed.weight", ("decoder width", width))[0] if whole else 512
    for name, value in (("width", width), ("decoder width", inner)):
        if value not in HEADS:
            raise WeightsError(f"{source}: the {name} is {value}; MAE's official ones are {sorted(HEADS)}.")

    def depth(start: str) -> int:
        return len({found[1] for key in tensors if (found := re.match(rf"{start}\.([0-9]+)\.", key))})

    def hidden(start: str, across: int) -> int:
        return sizes(source, tensors, f"{start}.0.mlp.fc1.weight", ("hidden width", across))[0]

    decoder_hidden = hidden("decoder_blocks", inner) if whole else 2048
    config = ViTMAEConfig(
        image_size=side * patch, patch_size=patch, hidden_size=width,
        num_hidden_layers=depth("blocks"), num_attention_heads=HEADS[width], intermediate_size=hidden("blocks", width),
        decoder_hidden_size=inner, decoder_num_hidden_layers=depth("decoder_blocks") if whole else 8,
        decoder_num_attention_heads=HEADS[inner], decoder_intermediate_size=decoder_hidden,
        layer_norm_eps=1e-6, norm_pix_loss=normalised_pixels(source, norm_pix) if whole else False,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in ViTMAEForPreTraining(config).state_dict().items()}
    wanted = {k: s for k, s in shapes.items() if whole or k.startswith("vit.")}
    found = account(source, _split(source, tensors, width, inner), ENCODER + (DECODER if whole else []), [], wanted)
    if out.is_dir() and any(out.iterdir()):
        raise WeightsError(f"--out {out} is not empty; give another folder.")
    config.architectures = ["ViTMAEForPreTraining"]
    with publish.directory(out) as folder:
        config.save_pretrained(folder)
        contiguous = {k: v.contiguous() for k, v in found.tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    kind = "MAE encoder and decoder" if whole else "MAE encoder"
    return {"what": kind, "imported": found.imported, "ignored": {}, "new": {}, "norm_pix_loss": config.norm_pix_loss}
