"""The frozen MAE decoder: M' -> pixels. Gradients pass through it to M'; its own weights never change."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining

from xformer.errors import WeightsError
from xformer.losses import patchify
from xformer.settings import Mae
from xformer.weights import readable, resolve


def restore_order(kept: Tensor) -> Tensor:
    """Where each patch lies once mask tokens are appended to the raster-ordered visible ones.

    bool [B, patches] (true = visible) -> int64 [B, patches], the `ids_restore` of models_mae.py.
    """
    order = torch.argsort((~kept).to(torch.int8), dim=1, stable=True)
    return torch.argsort(order, dim=1)


class FrozenDecoder(nn.Module):
    """The decoder of a transformers ViTMAE. Raises WeightsError where the weights hold none."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        folder = resolve(weights, ("config.json", "model.safetensors|pytorch_model.bin"), "mae.weights")
        with readable(weights):
            loaded: Any = ViTMAEForPreTraining.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        model, report = loaded
        if any(key.startswith("decoder") for key in report["missing_keys"]):
            raise WeightsError(f"weights {weights}: no MAE decoder in it; reconstruction needs one.")
        self.decoder = model.decoder.eval().requires_grad_(False)
        self.patch: int = model.config.patch_size
        self.norm_pix: bool = bool(model.config.norm_pix_loss)

    def train(self, mode: bool = True) -> "FrozenDecoder":
        """Stays in evaluation mode: a frozen decoder drops nothing."""
        return super().train(False)

    def forward(self, local: Tensor, kept: Tensor) -> Tensor:
        """M' [B, 1 + visible, W] and kept bool [B, patches] -> [B, patches, patch * patch * 3]."""
        return self.decoder(local, restore_order(kept)).logits


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """[B, patches, patch * patch * 3] -> [B, 3, S, S]."""
    b, n, _ = patches.shape
    side = int(n**0.5)
    grid = patches.reshape(b, side, side, patch, patch, 3)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, side * patch, side * patch)


def rebuilt_pixels(decoder: FrozenDecoder, tokens: Tensor, kept: Tensor, pixels: Tensor) -> Tensor:
    """The decoder's masked patches beside the true visible ones, [B, 3, S, S]. A decoder of normalised pixels gets each
    patch's true mean and deviation back, as MAE's own pictures do."""
    true, predicted = patchify(pixels, decoder.patch), decoder(tokens, kept)
    if decoder.norm_pix:
        predicted = predicted * (true.var(-1, keepdim=True) + 1e-6).sqrt() + true.mean(-1, keepdim=True)
    return unpatchify(torch.where(kept[..., None], true, predicted), decoder.patch)


def mean_predicted(pixels: Tensor, patch: int, norm_pix: bool) -> Tensor:
    """What a predictor that learns nothing says, [B, patches, patch * patch * 3]: each image's mean colour, and 0 where
    patches are normalised, which is then their mean."""
    mean = patchify(pixels.mean((2, 3), keepdim=True).expand_as(pixels), patch)
    return torch.zeros_like(mean) if norm_pix else mean


def visible(pixels: Tensor, mae: Mae) -> np.ndarray:
    """Pixels as the MAE reads them, [B, 3, S, S] -> float32 [B, S, S, 3] in 0..1."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (mae.mean, mae.std))
    return (pixels * std + mean).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def panels(
    decoder: FrozenDecoder, mae: Mae, pixels: Tensor, kept: Tensor, local: Tensor, rebuilt: Tensor
) -> dict[str, np.ndarray]:
    """Pictures [B, S, S, 3] in 0..1 by title: the original, what the MAE saw, what M and what M' rebuild."""
    masked = unpatchify(patchify(pixels, decoder.patch) * kept[..., None], decoder.patch)
    drawn = {
        "original": pixels,
        "masked": masked,
        "MAE alone (M)": rebuilt_pixels(decoder, local, kept, pixels),
        "X-Former (M')": rebuilt_pixels(decoder, rebuilt, kept, pixels),
    }
    return {title: visible(value, mae) for title, value in drawn.items()}


def grid(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Pictures [B, S, S, 3] in 0..1 by title -> one picture uint8 [H, W, 3]: a titled column each, a row per image."""
    side, gap, head = next(iter(columns.values())).shape[1], 4, 16
    scale = max(1, -(-96 // side))  # small pictures are enlarged
    cell = side * scale + gap
    rows = len(next(iter(columns.values())))
    sheet = Image.new("RGB", (cell * len(columns) + gap, head + cell * rows + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for j, (title, images) in enumerate(columns.items()):
        draw.text((gap + j * cell, 2), title, fill="black")
        for i, image in enumerate(images):
            small = Image.fromarray(np.round(image * 255).astype(np.uint8))
            sheet.paste(
                small.resize((cell - gap,) * 2, Image.Resampling.NEAREST), (gap + j * cell, head + gap + i * cell)
            )
    return np.asarray(sheet)
