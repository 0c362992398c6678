"""A masked autoencoder (He et al. 2022) on the shapes corpus: transformers ViTMAE, with its decoder."""

from pathlib import Path

import numpy as np
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from pipeline import images, pretrain
from xformer.console import progress, say
from xformer.settings import Mae

DEPTH, DECODER_WIDTH, DECODER_DEPTH = 4, 64, 2


def sine_positions(side: int, width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions [1, 1 + side * side, width], zeros for [CLS] (facebookresearch/mae pos_embed.py)."""
    rates = 1 / 10000 ** (torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates
    one = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    across, down = one.repeat(side, 1), one.repeat_interleave(side, 0)
    return torch.cat([torch.zeros(1, width), torch.cat([across, down], 1)])[None]


def masked_errors(model: ViTMAEForPreTraining, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[float, float]:
    """Mean squared error on masked patches: of the model, and of predicting each image's mean per channel."""
    with torch.no_grad():
        output = model(pixels, noise=noise)
    mask = output.mask[..., None]
    target = model.patchify(pixels)
    mean = model.patchify(pixels.mean((2, 3), keepdim=True).expand_as(pixels).contiguous())
    return (
        float(((output.logits - target) ** 2 * mask).sum() / (mask.sum() * target.shape[-1])),
        float(((mean - target) ** 2 * mask).sum() / (mask.sum() * target.shape[-1])),
    )


def pretrain_mae(
    corpus: Path, out: Path, mae: Mae, image_size: int, seed: int = 0, steps: int = 5000, batch: int = 128
) -> dict[str, object]:
    """Trains and writes `out`/{model.safetensors,config.json} with its card; returns the card's figures."""
    rng = pretrain.begin(seed)
    pictures, _ = pretrain.load_pictures(pretrain.shapes_split(corpus, "train"))
    config = ViTMAEConfig(
        image_size=image_size,
        patch_size=mae.patch,
        hidden_size=mae.width,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        intermediate_size=4 * mae.width,
        decoder_hidden_size=DECODER_WIDTH,
        decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=4 * DECODER_WIDTH,
        mask_ratio=mae.mask_ratio,
        norm_pix_loss=False,
        layer_norm_eps=1e-6,
    )
    model = ViTMAEForPreTraining(config)
    side = image_size // mae.patch
    with torch.no_grad():  # transformers 5 leaves these at zero in a model that is built, not loaded
        model.vit.embeddings.position_embeddings.copy_(sine_positions(side, mae.width))
        model.decoder.decoder_pos_embed.copy_(sine_positions(side, DECODER_WIDTH))
        for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
            token.normal_(std=0.02)
        for name, weight in model.named_parameters():  # as models_mae.py: at this width normal(0, 0.02) hardly learns
            if weight.ndim >= 2 and name.endswith("weight"):
                torch.nn.init.xavier_uniform_(weight.view(len(weight), -1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = pretrain.warm_cosine(optimizer, steps, 200)
    patches = side**2

    def pixels(rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.normalise(pictures[rows], mae.mean, mae.std))

    with progress("pretrain mae", steps, "steps") as bar:
        for _ in range(steps):
            rows = rng.integers(len(pictures), size=batch)
            noise = torch.from_numpy(rng.random((batch, patches), np.float32))
            loss = model(pixels(rows), noise=noise).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    model.eval()
    val, _ = pretrain.load_pictures(pretrain.shapes_split(corpus, "val"))
    held_out = torch.from_numpy(images.normalise(val[:1000], mae.mean, mae.std))
    error, baseline = masked_errors(model, held_out, torch.from_numpy(rng.random((len(held_out), patches), np.float32)))
    out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(out)
    figures: dict[str, object] = {
        "masked MSE, validation": round(error, 4),
        "masked MSE of each image's mean": round(baseline, 4),
        "steps": steps,
        "batch": batch,
    }
    pretrain.write_card(
        out,
        "Tiny MAE",
        [
            f"transformers ViTMAE with its decoder; {sum(p.numel() for p in model.parameters()):,} parameters, patches of "
            f"{mae.patch} of {image_size} pixels.",
            f"Trained on {len(pictures):,} pictures of the shapes corpus (training split, no text); mask ratio "
            f"{mae.mask_ratio}, raw pixels as target; seed {seed}.",
            f"Made again by: xformer pretrain mae --corpus DIR --out DIR --seed {seed}",
        ],
        figures,
    )
    say(f"wrote {out}")
    return figures
