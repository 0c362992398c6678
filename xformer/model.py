"""X-Former: cached CLIP tokens C and MAE tokens M -> enhanced queries Z' (sections 2 and 3, figures 3 and 4).

The paper's other bridges are the same module without the dual cross-attention, so that Z' is Z_q: the Q-Former
(BLIP-2, figure 1a), concatenation (1b: M* = linear(M), the Q-Former reads (C, M*)), and early cross-attention (1c: the
layers that have no cross-attention to C have one to M).
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xformer import losses
from xformer.dual import DualCrossAttention
from xformer.gather import gather, rank_and_world
from xformer.local import local_tokens, local_width, rebuilds
from xformer.qformer import KeysValues, QFormer
from xformer.reconstruction import FrozenDecoder
from xformer.settings import Settings
from xformer.text import generation_labels

MODELS = ("xformer", "qformer", "concat", "early")


@dataclass
class Batch:
    """One batch of image-text pairs. `clip` [B, N, Wc] and `mae` [B, 1 + visible, Wm] (or the local tokens
    in its place) are cached."""

    rows: Tensor  # int64 [B], the same number = the same image
    texts: Tensor  # int64 [B], the same number = the same caption
    clip: Tensor
    mae: Tensor | None
    kept: Tensor | None  # bool [B, patches], true = visible to the MAE
    pixels: Tensor | None  # float32 [B, 3, S, S], normalised as the MAE's input
    ids: Tensor  # int64 [B, T]
    mask: Tensor  # bool [B, T]

    def to(self, device: torch.device) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None})


class XFormer(nn.Module):
    """The trained bridge: the norm over C (trained, so it is not in the cache), the Q-Former, the dual block."""

    def __init__(
        self, qformer: QFormer, image_width: int, dual: DualCrossAttention | None = None,
        concat: nn.Linear | None = None, local_norm: nn.LayerNorm | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.image_norm = nn.LayerNorm(image_width, eps=1e-5)  # LAVIS ln_vision
        self.qformer, self.dual, self.concat = qformer, dual, concat
        self.local_norm = local_norm  # of CLIP tokens, which like C are cached before any norm; M has had the MAE's

    def _normalised(self, local: Tensor | None) -> Tensor | None:
        return local if local is None or self.local_norm is None else self.local_norm(local)

    def image_keys_values(self, clip: Tensor, local: Tensor | None = None) -> list[KeysValues | None]:
        """Every cross-attention's keys and values of C, of (C, M*) for concatenation, also of M for early."""
        image, local = self.image_norm(clip), self._normalised(local)
        if self.concat is not None:
            image = torch.cat([image, self.concat(local)], 1)
        return self.qformer.image_keys_values(image, local)

    def enhance(self, queries: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Z_q [B, Q, W] and M -> Z' and M'; without a dual block both pass through."""
        if self.dual is None:
            return queries, local
        return self.dual(queries, self._normalised(local))

    def forward(self, clip: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """C [B, N, Wc] and M [B, 1 + visible, Wm] -> Z' [B, Q, W] and M'."""
        queries, _ = self.qformer.queries(self.image_keys_values(clip, local))
        return self.enhance(queries, local)


class Stage1(nn.Module):
    """Stage 1: ITC + ITM + ITG on Z' and reconstruction on M' (section 3.2)."""

    def __init__(
        self, xformer: XFormer, decoder: FrozenDecoder | None, width: int, projection: int, begin: int, itg: str,
        smoothing: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.xformer, self.begin, self.itg_prefix, self.smoothing = xformer, begin, itg, smoothing
        self.vision_proj = nn.Linear(width, projection)
        self.text_proj = nn.Linear(width, projection)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.decoder = decoder

    def embed(self, enhanced: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Z' and text -> ITC embeddings [B, Q, P] and [B, P], normalised."""
        text = self.text_proj(self.xformer.qformer.text(ids, mask)[:, 0])
        return F.normalize(self.vision_proj(enhanced), dim=-1), F.normalize(text, dim=-1)

    def forward(
        self, batch: Batch, hard: bool, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step. Returns the losses by name and detached measurements.

        Args:
            hard: negatives from softmax(similarity) as BLIP-2, else drawn evenly.
            generator: draws the negatives.
        """
        dtype = self.itm_head.weight.dtype  # the cache holds fp16
        clip = batch.clip.to(dtype)
        local = None if batch.mae is None else batch.mae.to(dtype)
        image = self.xformer.image_keys_values(clip, local)
        queries, own = self.xformer.qformer.queries(image)
        enhanced, rebuilt = self.xformer.enhance(queries, local)
        temperature = self.temperature.clamp(0.001, 0.5)

        image_embedding, text_embedding = self.embed(enhanced, batch.ids, batch.mask)
        all_images, all_texts = gather(image_embedding), gather(text_embedding)
        rows, texts = gather(batch.rows), gather(batch.texts)
        same = (batch.rows[:, None] == rows) | (batch.texts[:, None] == texts)
        found = {
            "itc": losses.itc(image_embedding, text_embedding, all_images, all_texts, temperature, same, self.smoothing)
        }
        with torch.no_grad():
            to_text = losses.similarity(image_embedding, all_texts) / temperature
            to_image = losses.similarity(all_images, text_embedding).T / temperature
        scale = 1.0 if hard else 0.0
        negative_text, text_ok = losses.hard_negatives(to_text * scale, same, generator)
        negative_image, image_ok = losses.hard_negatives(to_image * scale, same, generator)
        logits, labels = self._match(batch, clip, local, image, negative_image, negative_text, image_ok, text_ok)
        found["itm"] = losses.itm(logits, labels)

        prefix = self.xformer.qformer.enhanced_prefix(enhanced) if self.itg_prefix == "enhanced" else own
        inputs, targets = generation_labels(batch.ids, batch.mask, self.begin)
        found["itg"] = losses.itg(self.xformer.qformer.write(prefix, inputs, batch.mask), targets, self.smoothing)
        if self.decoder is not None and rebuilt is not None and batch.kept is not None and batch.pixels is not None:
            predicted = self.decoder(rebuilt, batch.kept)
            found["reconstruction"] = losses.reconstruction(
                predicted, batch.pixels, batch.kept, self.decoder.patch, self.decoder.norm_pix
            )
        guessed = logits.mean(1).argmax(1)
        measured = {
            "itm_accuracy": (guessed == labels).float().mean(),
            "temperature": temperature.detach(),
            "image_embedding": image_embedding.detach(),
            "text_embedding": text_embedding.detach(),
        }
        return found, measured

    def _match(
        self, batch: Batch, clip: Tensor, local: Tensor | None, image: list[KeysValues | None], negative_image: Tensor,
        negative_text: Tensor, image_ok: Tensor, text_ok: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """ITM over the triples (I, T), (I-, T), (I, T-) in one pass: logits [N, Q, 2] and labels [N]."""
        rank, world = rank_and_world()
        b = len(batch.rows)
        if world == 1:
            other = [None if kv is None else (kv[0][negative_image], kv[1][negative_image]) for kv in image]
            other_local = None if local is None else local[negative_image]
        else:  # features are frozen: they are gathered without a gradient
            other_local = None if local is None else gather(local)[negative_image]
            other = self.xformer.image_keys_values(gather(clip)[negative_image], other_local)
        ids, mask = _gather_texts(batch.ids, batch.mask)
        keep = torch.cat([torch.ones_like(image_ok), image_ok, text_ok])
        triples = [
            None
            if a is None or n is None
            else (torch.cat([a[0], n[0], a[0]])[keep], torch.cat([a[1], n[1], a[1]])[keep])
            for a, n in zip(image, other, strict=True)
        ]
        width = ids.shape[1]
        own_ids, own_mask = (
            F.pad(batch.ids, (0, width - batch.ids.shape[1])),
            F.pad(batch.mask, (0, width - batch.mask.shape[1])),
        )
        all_ids = torch.cat([own_ids, own_ids, ids[negative_text]])[keep]
        all_mask = torch.cat([own_mask, own_mask, mask[negative_text]])[keep]
        matched = self.xformer.qformer.joint(triples, all_ids, all_mask)
        if local is not None and other_local is not None:
            local = torch.cat([local, other_local, local])[keep]
        enhanced, _ = self.xformer.enhance(matched, local)
        labels = torch.cat([torch.ones(b), torch.zeros(2 * b)]).long().to(keep.device)[keep]
        return self.itm_head(enhanced), labels


def _gather_texts(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of every rank, padded to the longest of all."""
    if rank_and_world()[1] == 1:
        return ids, mask
    longest = int(gather(torch.tensor([ids.shape[1]], device=ids.device)).max())
    pad = (0, longest - ids.shape[1])
    return gather(F.pad(ids, pad)), gather(F.pad(mask, pad).long()).bool()


def build_xformer(settings: Settings, model: str, vocabulary: int) -> XFormer:
    """The bridge of one of MODELS; `vocabulary` 0 leaves the text parts out, as stage 2 does."""
    q, d, width = settings.qformer, settings.dual, local_width(settings)
    qformer = QFormer(
        q.width, q.layers, q.heads, q.intermediate, q.queries, q.cross_every, settings.clip.width, vocabulary, q.dropout,
        local_width=width if model == "early" else None,
    )  # fmt: skip
    dual, concat = None, None
    if model == "xformer":
        dual = DualCrossAttention(width, q.width, d.heads, d.depth, d.ffn_ratio, d.ffn_block2)
    if model == "concat":
        concat = nn.Linear(width, settings.clip.width)
    norm = nn.LayerNorm(width, eps=1e-5) if local_tokens(settings, model) == "clip" else None
    return XFormer(qformer, settings.clip.width, dual, concat, norm)


def build_stage1(settings: Settings, model: str, vocabulary: int, begin: int) -> Stage1:
    """A stage-1 model. The decoder is loaded only where a reconstruction loss is asked for."""
    xformer = build_xformer(settings, model, vocabulary)
    decoder = FrozenDecoder(settings.mae.weights) if rebuilds(settings, model, "stage1") else None
    itg = settings.dual.itg if model == "xformer" else "layerwise"
    width, projection = settings.qformer.width, settings.qformer.projection
    return Stage1(xformer, decoder, width, projection, begin, itg, settings.stage1.label_smoothing)
