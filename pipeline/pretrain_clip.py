"""A CLIP-like ViT: contrastive training on captions that name kinds and colours but neither counts nor positions.

A batch holds groups of pictures that show the same colours. In batches drawn at random colours alone tell nearly every
picture from the others, and training stops there: kinds of shapes are never learned.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pipeline import images, pretrain
from pipeline.shapes import COLOURS
from xformer.console import progress, say
from xformer.settings import Clip

MAX_WORDS = 16
ALIKE = 16  # pictures of the same colours in a batch


class TextTower(nn.Module):
    """Two transformer layers over words; used for training only and not kept."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(MAX_WORDS, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """int64 [B, MAX_WORDS] (0 = padding) -> [B, width], the mean over words."""
        padding = words == 0
        hidden = self.layers(self.words(words) + self.positions, src_key_padding_mask=padding)
        return hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True)


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", text))


def _things(text: str) -> frozenset[tuple[str, str]]:
    """What a caption names, as (colour, kind): captions that name the same things belong to each other's pictures."""
    words = re.findall(r"[a-z]+", text)
    return frozenset(pair for pair in pairwise(words) if pair[0] in COLOURS)


def pretrain_clip(
    corpus: Path, out: Path, clip: Clip, image_size: int, seed: int = 0, steps: int = 1500, batch: int = 128
) -> dict[str, object]:
    """Trains and writes `out`/model.safetensors with its card; returns the card's figures."""
    rng = pretrain.begin(seed)
    folder = pretrain.shapes_split(corpus, "train")
    pictures, rows = pretrain.load_pictures(folder)
    captions = pretrain.texts_by_image(folder / "web_captions.json")
    vocabulary: dict[str, int] = {}
    for texts in captions.values():
        for word in (w for text in texts for w in re.findall(r"[a-z]+", text)):
            vocabulary.setdefault(word, len(vocabulary) + 1)

    def encode(texts: list[str]) -> torch.Tensor:
        ids = torch.zeros(len(texts), MAX_WORDS, dtype=torch.int64)
        for i, text in enumerate(texts):
            words = [vocabulary.get(w, 0) for w in re.findall(r"[a-z]+", text)][:MAX_WORDS]
            ids[i, : len(words)] = torch.tensor(words)
        return ids

    arguments: dict[str, Any] = dict(clip.kwargs)
    vision: Any = timm.create_model(clip.architecture, pretrained=False, num_classes=0, **arguments)
    text, head = TextTower(len(vocabulary) + 1, clip.width), nn.Linear(clip.width, clip.width, bias=False)
    temperature = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    weights = [*vision.parameters(), *text.parameters(), *head.parameters(), temperature]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = pretrain.warm_cosine(optimizer, steps, 100)
    alike: dict[frozenset[str], list[int]] = {}
    for image_id in sorted(rows):
        alike.setdefault(frozenset(COLOURS) & _words(captions[image_id][0]), []).append(image_id)
    groups = [np.array(group) for group in alike.values()]
    shares = np.array([len(group) for group in groups]) / len(rows)

    def pixels(chosen: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(images.normalise(pictures[chosen], clip.mean, clip.std))

    with progress("pretrain clip", steps, "steps") as bar:
        for _ in range(steps):
            drawn = rng.choice(len(groups), batch // ALIKE, p=shares)
            chosen = np.concatenate([rng.choice(groups[g], ALIKE) for g in drawn])
            texts = [captions[i][int(rng.integers(len(captions[i])))] for i in chosen]
            seen = vision.forward_features(pixels(np.array([rows[i] for i in chosen])))
            image = F.normalize(head(seen[:, : vision.num_prefix_tokens].mean(1)), dim=-1)
            logits = image @ F.normalize(text(encode(texts)), dim=-1).T * temperature.exp().clamp(max=100)
            said = [_things(text) for text in texts]
            same = torch.tensor([[a == b for b in said] for a in said], dtype=torch.float32)
            loss = (
                F.cross_entropy(logits, same / same.sum(1, keepdim=True))
                + F.cross_entropy(logits.T, same / same.sum(1, keepdim=True))
            ) / 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(note=f"loss {loss.item():.3f}")
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.half().contiguous() for name, value in vision.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"architecture": clip.architecture})
    figures: dict[str, object] = {"training loss, last step": round(loss.item(), 4), "steps": steps, "batch": batch}
    pretrain.write_card(
        out,
        "Tiny CLIP-like ViT",
        [
            f"timm {clip.architecture} with {clip.kwargs}; {sum(p.numel() for p in vision.parameters()):,} parameters.",
            f"Trained contrastively on {len(rows):,} pictures of the shapes corpus (training split, corpus seed as in its "
            f"shapes.json) with web captions, which name kinds and colours but neither counts nor positions; seed {seed}.",
            f"Batches hold groups of {ALIKE} pictures of the same colours: in random batches colours alone suffice, and "
            "kinds are not learned.",
            "The class token and the registers, all trained alike, are what is cached: it stands for a global encoder. "
            "That is an illustration of the paper's premise, not evidence for it.",
            f"Made again by: xformer pretrain clip --corpus DIR --out DIR --seed {seed}",
        ],
        figures,
    )
    say(f"wrote {out}")
    return figures
