"""The frozen MAE decoder: M' -> pixels. Gradients pass through it to M'; its own weights never change."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining

from xformer.errors import WeightsError
from xformer.weights import resolve


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
        folder = resolve(weights, ("config.json", "model.safetensors|pytorch_model.bin"))
        loaded: Any = ViTMAEForPreTraining.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
        if any(key.startswith("decoder") for key in report["missing_keys"]):
            raise WeightsError(f"weights {weights}: no MAE decoder in it; reconstruction needs one.")
        self.decoder = model.decoder.eval().requires_grad_(False)
        self.patch: int = model.config.patch_size
        self.norm_pix: bool = bool(model.config.norm_pix_loss)

    def forward(self, local: Tensor, kept: Tensor) -> Tensor:
        """M' [B, 1 + visible, W] and kept bool [B, patches] -> [B, patches, patch * patch * 3]."""
        return self.decoder(local, restore_order(kept)).logits
