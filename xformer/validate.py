"""What a person needs to see that training works, on the validation split."""

import numpy as np
import torch

from xformer.data import Pairs
from xformer.losses import ITM_CONSTANT, patchify, similarity
from xformer.model import Stage1
from xformer.settings import Recipe, Settings, Stage2


def validation_batches(pairs: Pairs, recipe: Recipe) -> list[np.ndarray]:
    """The same pairs every time: the first caption of each image, in index order."""
    _, first = np.unique(pairs.stores.astype(np.int64) * 2**40 + pairs.rows, return_index=True)
    size = min(recipe.batch, len(first))
    count = min(recipe.validate_batches, len(first) // size) if size >= 2 else 0
    return [first[i * size : (i + 1) * size] for i in range(count)]


@torch.no_grad()
def validate_stage1(stage1: Stage1, pairs: Pairs, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Losses with hard negatives; ITM against the constant predictor; recall@1 among the validated images; and the
    reconstruction beside predicting each image's mean. Empty where the split is too small."""
    stage1.eval()
    found: dict[str, list[float]] = {}
    images, texts = [], []
    for number, chosen in enumerate(validation_batches(pairs, recipe)):
        batch, _ = pairs.batch(chosen, draw=0)
        batch = batch.to(device)
        losses, measured = stage1(batch, True, torch.Generator().manual_seed(number))
        images.append(measured["image_embedding"].float())
        texts.append(measured["text_embedding"].float())
        for name, value in (losses | {"itm_accuracy": measured["itm_accuracy"]}).items():
            found.setdefault(name, []).append(float(value))
        if stage1.decoder is not None and batch.pixels is not None and batch.kept is not None:
            mean = batch.pixels.mean((2, 3), keepdim=True).expand_as(batch.pixels)
            errors = (patchify(mean, stage1.decoder.patch) - patchify(batch.pixels, stage1.decoder.patch)) ** 2
            found.setdefault("reconstruction_of_mean", []).append(float(errors.mean(-1)[~batch.kept].mean()))
    stage1.train()
    if not found:
        return {}
    similarities = similarity(torch.cat(images), torch.cat(texts))
    own = torch.arange(len(similarities), device=similarities.device)
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return means | {
        "itm_constant": ITM_CONSTANT,
        "recall1_image_to_text": float((similarities.argmax(1) == own).float().mean()),
        "recall1_text_to_image": float((similarities.argmax(0) == own).float().mean()),
        "recall1_of": float(len(own)),
    }


@torch.no_grad()
def validate_stage2(stage2, pairs: Pairs, recipe: Stage2, settings: Settings, device: torch.device) -> dict[str, float]:
    """Language-model loss of held-out captions, and with the images' prefixes shifted by one: what the image is worth."""
    from xformer.stage2 import caption_texts

    stage2.eval()
    own, shifted = [], []
    for chosen in validation_batches(pairs, recipe):
        batch, captions = pairs.batch(chosen, draw=0)
        batch = batch.to(device)
        ids, mask = stage2.llm.encode(caption_texts(captions, settings), recipe.max_text, newline=True, left=False)
        ids, mask = ids.to(device), mask.to(device)
        own.append(float(stage2(batch, ids, mask)["lm"]))
        shifted.append(float(stage2(batch, ids.roll(1, 0), mask.roll(1, 0))["lm"]))
    stage2.train()
    return {"lm": sum(own) / len(own), "lm_of_another_image": sum(shifted) / len(shifted)} if own else {}
