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
from xformer.gather import exchange_rows, gather, gather_texts, mean_over_ranks, rank_and_world
from xformer.local import local_tokens, local_width, rebuilds
from xformer.qformer import KeysValues, QFormer
from xformer.reconstruction import FrozenDecoder
from xformer.settings import Settings
from xformer.text import generation_labels


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

    def embed(self, enhanced: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Z' and the text's words -> ITC embeddings [B, Q, P] and [B, P], normalised."""
        text = self.text_proj(self.xformer.qformer.text(words, mask)[:, 0])
        return F.normalize(self.vision_proj(enhanced), dim=-1), F.normalize(text, dim=-1)

    def forward(
        self, batch: Batch, hard: bool, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One step. Returns the losses by name and detached measurements.

        Args:
            hard: negatives from softmax(similarity) as BLIP-2, else drawn evenly.
            generator: draws the negatives; in the same state on every rank.
        """
        dtype = self.itm_head.weight.dtype  # the cache holds fp16
        clip = batch.clip.to(dtype)
        local = None if batch.mae is None else batch.mae.to(dtype)
        image = self.xformer.image_keys_values(clip, local)
        queries, own = self.xformer.qformer.queries(image)
        enhanced, rebuilt = self.xformer.enhance(queries, local)
        with (
            torch.no_grad()
        ):  # in place, as BLIP does: a clamp inside the graph would give no gradient back to the range
            temperature = self.temperature.clamp_(0.001, 0.5)

        all_ids, all_mask = gather_texts(batch.ids, batch.mask)
        looked_up = self.xformer.qformer.words(torch.cat([all_ids.flatten(), all_ids.new_tensor([self.begin])]))
        all_words, begin = looked_up[:-1].unflatten(0, all_ids.shape), looked_up[-1]
        words = all_words[rank_and_world()[0] * len(batch.rows) :][: len(batch.rows), : batch.ids.shape[1]]
        image_embedding, text_embedding = self.embed(enhanced, words, batch.mask)
        all_images, all_texts = gather(image_embedding), gather(text_embedding)
        rows, texts = gather(batch.rows), gather(batch.texts)
        same = (batch.rows[:, None] == rows) | (batch.texts[:, None] == texts)
        found = {
            "itc": losses.itc(image_embedding, text_embedding, all_images, all_texts, temperature, same, self.smoothing)
        }
        with torch.no_grad():
            scale = (1.0 if hard else 0.0) / temperature
            to_text = losses.similarity(image_embedding, all_texts) * scale
            to_image = losses.similarity(all_images, text_embedding).T * scale
        uniform = torch.rand(2, len(rows), generator=generator, dtype=torch.float64)  # of the whole batch, any rank's
        uniform = uniform.unflatten(1, (-1, len(batch.rows)))[:, rank_and_world()[0]].to(same.device)
        negative_text, eligible = losses.hard_negatives(to_text, same, uniform[0])
        negative_image, _ = losses.hard_negatives(to_image, same, uniform[1])
        matched, labels = self._match(
            batch, clip, local, image, (all_words, all_mask), negative_image, negative_text, eligible
        )
        _, targets = generation_labels(batch.ids, batch.mask, self.begin)
        masked = labels.new_zeros(()) if batch.kept is None else (~batch.kept).sum()
        counts = mean_over_ranks(torch.stack([labels.new_tensor(len(labels)), (targets != -100).sum(), masked]))
        found["itm"] = losses.itm(matched, labels, counts[0])
        prefix = self.xformer.qformer.enhanced_prefix(enhanced) if self.itg_prefix == "enhanced" else own
        inputs = torch.cat([begin.expand(len(words), 1, -1), words[:, 1:]], 1)
        written = self.xformer.qformer.write(prefix, inputs, batch.mask)
        found["itg"] = losses.itg(written, targets, self.smoothing, counts[1])
        if self.decoder is not None and rebuilt is not None and batch.kept is not None and batch.pixels is not None:
            predicted = self.decoder(rebuilt, batch.kept)
            found["reconstruction"] = losses.reconstruction(
                predicted, batch.pixels, batch.kept, self.decoder.patch, self.decoder.norm_pix, counts[2]
            )
        guessed = matched.mean(1).argmax(1)
        measured = {
            "itm_accuracy": (guessed == labels).float().mean(),
            "temperature": temperature.detach().clone(),  # of this step; the update changes it in place
            "image_embedding": image_embedding.detach(),
            "text_embedding": text_embedding.detach(),
        }
        return found, measured

    def _match(
        self, batch: Batch, clip: Tensor, local: Tensor | None, image: list[KeysValues | None],
        all_texts: tuple[Tensor, Tensor], negative_image: Tensor, negative_text: Tensor, eligible: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """ITM over the triples (I, T), (I-, T), (I, T-) in one pass: logits [N, Q, 2] and labels [N].

        Negatives of other ranks: their texts are gathered (`all_texts`: words and masks), of their images only the chosen
        rows come over, as cached.
        """
        rank, b = rank_and_world()[0], len(batch.rows)
        own = torch.arange(b, device=eligible.device)
        chosen = torch.where(eligible, negative_image, own + rank * b)  # what is dropped need not be fetched
        foreign, place = exchange_rows([x for x in (batch.clip, batch.mae) if x is not None], chosen)
        if len(foreign[0]):
            foreign = [x.to(clip.dtype) for x in foreign]
            local = None if local is None else torch.cat([local, foreign[1]])
            more = self.xformer.image_keys_values(foreign[0], None if local is None else foreign[1])
            image = [
                None if a is None or n is None else (torch.cat([a[0], n[0]]), torch.cat([a[1], n[1]]))
                for a, n in zip(image, more, strict=True)
            ]
        keep = torch.cat([torch.ones_like(eligible), eligible, eligible])
        images = torch.cat([own, place, own])[keep]  # the images of the triples, among own and foreign ones
        triples = [
            None if kv is None else (kv[0].index_select(0, images), kv[1].index_select(0, images)) for kv in image
        ]
        words, mask = all_texts
        texts = torch.cat([own + rank * b, own + rank * b, negative_text])[keep]
        matched = self.xformer.qformer.joint(triples, words.index_select(0, texts), mask[texts])
        enhanced, _ = self.xformer.enhance(matched, None if local is None else local[images])
        labels = torch.cat([torch.ones(b), torch.zeros(2 * b)]).long().to(keep.device)[keep]
        return self.itm_head(enhanced), labels


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
