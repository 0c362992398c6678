"""The two frozen encoders. Each loads through its own library and knows the identity of the features it makes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from transformers import ViTMAEForPreTraining

from pipeline import images, masks
from xformer.errors import WeightsError
from xformer.settings import Clip, Mae
from xformer.weights import readable, resolve, sha256_of

SCHEMA = 1
AUTOCAST = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(gpus: bool) -> torch.device:
    """The CPU, or with `gpus` this process's CUDA device: a local Dask cluster numbers its workers, and worker n takes
    device n; a worker of another cluster takes the first device that it was given to see."""
    if not gpus or not (count := torch.cuda.device_count()):
        return torch.device("cpu")
    from distributed import get_worker

    try:
        name = get_worker().name
    except ValueError:  # no Dask worker: one process does it all
        name = 0
    return torch.device("cuda", name % count if isinstance(name, int) else 0)


class ClipEncoder:
    """A timm ViT whose block outputs are cached before the final norm, class token first (BLIP-2: ViT-g, block 39)."""

    def __init__(self, clip: Clip, image_size: int, device: torch.device | None = None) -> None:
        folder = resolve(clip.weights, ("model.safetensors",))
        file = folder / "model.safetensors"
        self.settings, self.device = clip, device or torch.device("cpu")
        arguments: dict[str, Any] = dict(clip.kwargs)
        what = f"clip.architecture {clip.architecture} with clip.kwargs {clip.kwargs}"
        try:
            self.model: Any = timm.create_model(clip.architecture, pretrained=False, num_classes=0, **arguments)
            blocks, width, side = len(self.model.blocks), self.model.embed_dim, self.model.patch_embed.img_size
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError) as error:
            raise WeightsError(f"{what}: timm makes no ViT of it: {str(error).splitlines()[0]}.") from None
        if (width, side) != (clip.width, (image_size, image_size)):
            raise WeightsError(
                f"{what}: width {width}, image {side[0]}; the settings say clip.width {clip.width}, image_size {image_size}."
            )
        if max(clip.layers) > blocks:
            raise WeightsError(f"clip.layers {clip.layers}: {clip.architecture} has only {blocks} blocks.")
        with readable(clip.weights):
            state = {k: v.float() for k, v in load_file(file).items() if not k.startswith(("head.", "fc_norm."))}
        wanted = {k for k in self.model.state_dict() if not k.startswith("fc_norm.")}
        if missing := sorted(wanted - set(state)) or sorted(set(state) - wanted):
            raise WeightsError(f"weights {clip.weights}: {missing[0]} does not fit {clip.architecture} {clip.kwargs}.")
        try:
            self.model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise WeightsError(f"weights {clip.weights}: {str(error).splitlines()[-1].strip()}") from None
        self.model.eval().requires_grad_(False).to(self.device)
        self.identity = {
            "schema": SCHEMA,
            "encoder": "clip",
            "weights_sha256": sha256_of(file),
            "model": clip.architecture,
            "model_args": json.dumps(clip.kwargs, sort_keys=True),
            "norm": json.dumps([clip.mean, clip.std]),
            "final_norm": False,
            "image_size": image_size,
            "autocast": clip.autocast,
            "quantiser": "fp16",
        }

    def layer_identity(self, layer: int) -> dict:
        return self.identity | ({"tokens": "global"} if self.settings.only_global(layer) else {}) | {"layer": layer}

    def tokens(self, layer: int) -> int:
        """Tokens of one image that are cached of a block: class token, registers and, but for a global C, patches."""
        patches = 0 if self.settings.only_global(layer) else self.model.patch_embed.num_patches
        return self.model.num_prefix_tokens + patches

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, layers: list[int]) -> dict[int, np.ndarray]:
        """uint8 [B, 3, S, S] -> per 1-based layer float32 [B, tokens, width]."""
        batch = torch.from_numpy(images.normalise(pixels, self.settings.mean, self.settings.std)).to(self.device)
        dtype = AUTOCAST[self.settings.autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            found = self.model.forward_intermediates(
                batch,
                indices=[layer - 1 for layer in sorted(set(layers))],
                return_prefix_tokens=True,
                norm=False,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return {
            layer: (prefix if self.settings.only_global(layer) else torch.cat([prefix, patches], 1))
            .float()
            .cpu()
            .numpy()
            for layer, (patches, prefix) in zip(sorted(set(layers)), found, strict=True)
        }


class MaeEncoder:
    """transformers' ViTMAE; tokens after the encoder's final norm, [CLS] first, visible patches in raster order."""

    def __init__(self, mae: Mae, image_size: int, device: torch.device | None = None) -> None:
        folder = resolve(mae.weights, ("config.json", "model.safetensors|pytorch_model.bin"))
        file = next(f for n in ("model.safetensors", "pytorch_model.bin") if (f := folder / n).is_file())
        self.settings, self.device = mae, device or torch.device("cpu")
        self.model: Any = load_mae(folder, mae)
        self.model.to(self.device)
        config = self.model.config
        if (config.image_size, config.patch_size, config.hidden_size) != (image_size, mae.patch, mae.width):
            raise WeightsError(
                f"weights {mae.weights}: image {config.image_size}, patch {config.patch_size}, width "
                f"{config.hidden_size}; the settings say {image_size}, {mae.patch}, {mae.width}."
            )
        self.patches = (image_size // mae.patch) ** 2
        self.identity = {
            "schema": SCHEMA,
            "encoder": "mae",
            "weights_sha256": sha256_of(file),
            "model": "ViTMAE",
            "model_args": json.dumps({"norm_pix_loss": config.norm_pix_loss, "eps": config.layer_norm_eps}),
            "norm": json.dumps([mae.mean, mae.std]),
            "final_norm": True,
            "image_size": image_size,
            "autocast": mae.autocast,
            "quantiser": "fp16",
            "mask_algorithm": masks.ALGORITHM,
        }

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """uint8 [B, 3, S, S] and int64 [B, K] raster-ordered visible patches -> float32 [B, 1 + K, width]."""
        batch = torch.from_numpy(images.normalise(pixels, self.settings.mean, self.settings.std)).to(self.device)
        noise = torch.arange(self.patches, dtype=torch.float32).repeat(len(batch), 1) + self.patches
        noise.scatter_(1, torch.from_numpy(kept), torch.from_numpy(kept).float())  # kept ones come first, in order
        config = self.model.config
        config.mask_ratio = (
            1 - (kept.shape[1] + 0.5) / self.patches
        )  # it truncates: half a patch more survives rounding
        dtype = AUTOCAST[self.settings.autocast]
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            output = self.model.vit(batch, noise=noise.to(self.device))
        return output.last_hidden_state.float().cpu().numpy()


def load_mae(folder: Path, mae: Mae) -> ViTMAEForPreTraining:
    """A frozen float32 ViTMAE. Raises WeightsError where the folder holds another model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "vit_mae":
        raise WeightsError(f"weights {mae.weights}: a {config.get('model_type')} model; --encoder mae needs vit_mae.")
    with readable(mae.weights):
        model = ViTMAEForPreTraining.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval().requires_grad_(False)
