"""What a person needs to see that training works, on the validation split."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from xformer.data import Pairs
from xformer.evaluation.diversity import effective_rank
from xformer.losses import ITM_CONSTANT, reconstruction, similarity
from xformer.model import Batch, Stage1, XFormer
from xformer.reconstruction import FrozenDecoder, grid, mean_predicted, panels
from xformer.settings import Mae, Recipe
from xformer.stage2 import Stage2, Text

AT_ONCE = 128  # images of one pass at most: a training batch of many processes does not fit into one


def validation_batches(pairs: Pairs, recipe: Recipe) -> list[np.ndarray]:
    """The same pairs every time, on any number of processes: the first caption of images spread evenly over all stores."""
    first = pairs.one_per_image()
    size = min(recipe.batch, len(first), AT_ONCE)
    count = min(recipe.validate_batches * recipe.batch, len(first)) // size if size >= 2 else 0
    spread = first[np.arange(count * size) * len(first) // max(1, count * size)]
    return [spread[i * size : (i + 1) * size] for i in range(count)]


@torch.no_grad()
def validate_stage1(
    stage1: Stage1, pairs: Pairs, recipe: Recipe, device: torch.device
) -> tuple[dict[str, float], np.ndarray | None]:
    """Losses with hard negatives; ITM against the constant predictor; recall@1 among the validated images; how
    different the queries are; and the reconstruction beside predicting the mean.

    Returns: the figures, empty where the split is too small, and a picture of reconstructions, uint8 [H, W, 3].
    """
    stage1.eval()
    found: dict[str, list[float]] = {}
    images, texts, picture = [], [], None
    for number, chosen in enumerate(validation_batches(pairs, recipe)):
        batch, _ = pairs.batch(chosen, draw=0)
        batch = batch.to(device)
        losses, measured = stage1(batch, True, torch.Generator().manual_seed(number))
        images.append(measured["image_embedding"].float())
        texts.append(measured["text_embedding"].float())
        for name, value in (losses | {"itm_accuracy": measured["itm_accuracy"]}).items():
            found.setdefault(name, []).append(float(value))
        if (decoder := stage1.decoder) is not None and batch.pixels is not None and batch.kept is not None:
            nothing = mean_predicted(batch.pixels, decoder.patch, decoder.norm_pix)
            error = reconstruction(nothing, batch.pixels, batch.kept, decoder.patch, decoder.norm_pix)
            found.setdefault("reconstruction_of_mean", []).append(float(error))
        if number == 0:
            rank, rebuilt = _queries(stage1.xformer, batch)
            found["effective_rank"] = [rank]
            if recipe.pictures and stage1.decoder is not None and rebuilt is not None:
                picture = _picture(stage1.decoder, batch, rebuilt, pairs.settings.mae, recipe.pictures)
    stage1.train()
    if not found:
        return {}, None
    similarities = similarity(torch.cat(images), torch.cat(texts))
    own = torch.arange(len(similarities), device=similarities.device)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {
        "itm_constant": ITM_CONSTANT,
        "recall1_image_to_text": float((similarities.argmax(1) == own).float().mean()),
        "recall1_text_to_image": float((similarities.argmax(0) == own).float().mean()),
        "recall1_of": float(len(own)),
    }, picture


@torch.no_grad()
def validate_stage2(
    stage2: Stage2, pairs: Pairs, recipe: Recipe, encode: Callable[[list[str]], Text], device: torch.device
) -> tuple[dict[str, float], None]:
    """Language-model loss of held-out texts, and with the images' prefixes shifted by one: what the image is worth.

    Args:
        encode: the texts of a batch -> token ids, mask, and which of them carry the loss.
    """
    stage2.eval()
    found: dict[str, list[float]] = {}
    for number, chosen in enumerate(validation_batches(pairs, recipe)):
        batch, texts = pairs.batch(chosen, draw=0)
        batch = batch.to(device)
        given = [part.to(device) for part in encode(texts)]
        if number == 0:
            found["effective_rank"] = [_queries(stage2.xformer, batch)[0]]
        found.setdefault("lm", []).append(float(stage2(batch, *given)["lm"]))
        others = [part.roll(1, 0) for part in given]
        found.setdefault("lm_of_another_image", []).append(float(stage2(batch, *others)["lm"]))
    stage2.train()
    return {name: sum(values) / len(values) for name, values in found.items()}, None


def _queries(bridge: XFormer, batch: Batch) -> tuple[float, Tensor | None]:
    """The mean effective rank of the output queries Z' of at most 32 images, and M'."""
    clip, local = batch.clip[:32].float(), None if batch.mae is None else batch.mae[:32].float()
    enhanced, rebuilt = bridge(clip, local)
    return float(effective_rank(enhanced.float().cpu().numpy()).mean()), rebuilt


def _picture(decoder: FrozenDecoder, batch: Batch, rebuilt: Tensor, mae: Mae, count: int) -> np.ndarray | None:
    if batch.pixels is None or batch.kept is None or batch.mae is None:
        return None
    shown = (x[: min(count, 32)] for x in (batch.pixels, batch.kept, batch.mae.float(), rebuilt))
    return grid(panels(decoder, mae, *shown))
