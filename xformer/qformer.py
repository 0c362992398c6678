"""The Q-Former (BLIP-2, section 3.1): a BERT whose learned queries cross-attend to image tokens in every second layer.

Two transformers share their self-attention: one over the queries, with cross-attention and a feed-forward of its own,
and one over text. Reference: LAVIS lavis/models/blip2_models/Qformer.py. Sublayers are post-norm, as in BERT.

Mask convention: boolean, true = may be attended to.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xformer.errors import WeightsError

KeysValues = tuple[Tensor, Tensor]  # each [B, heads, N, width / heads]
EPS = 1e-12  # BERT's


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, W] -> [B, heads, N, W / heads]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with its output projection and post-norm residual."""

    def __init__(self, width: int, heads: int, dropout: float, source_width: int | None = None) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width or width, width)
        self.value = nn.Linear(source_width or width, width)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def keys_values(self, source: Tensor) -> KeysValues:
        """[B, N, source width] -> keys and values."""
        return split_heads(self.key(source), self.heads), split_heads(self.value(source), self.heads)

    def forward(self, hidden: Tensor, keys_values: KeysValues, allowed: Tensor | None = None) -> Tensor:
        """hidden [B, T, W]; allowed broadcasts to [B, heads, T, N]. Returns [B, T, W]."""
        dropout = self.dropout if self.training else 0.0
        query = split_heads(self.query(hidden), self.heads)
        mixed = F.scaled_dot_product_attention(query, *keys_values, attn_mask=allowed, dropout_p=dropout)
        mixed = self.output(mixed.transpose(1, 2).flatten(2))
        return self.norm(hidden + F.dropout(mixed, self.dropout, self.training))


class FeedForward(nn.Module):
    """BERT's intermediate and output with the post-norm residual."""

    def __init__(self, width: int, intermediate: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.intermediate = nn.Linear(width, intermediate)
        self.output = nn.Linear(intermediate, width)
        self.norm = nn.LayerNorm(width, eps=EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        mixed = self.output(F.gelu(self.intermediate(hidden)))
        return self.norm(hidden + F.dropout(mixed, self.dropout, self.training))


class Layer(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries, a feed-forward each for queries and text."""

    def __init__(
        self, width: int, heads: int, intermediate: int, dropout: float, image_width: int | None, text: bool
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.crossattention = Attention(width, heads, dropout, image_width) if image_width else None
        self.query_ffn = FeedForward(width, intermediate, dropout)
        self.text_ffn = FeedForward(width, intermediate, dropout) if text else None

    def forward(
        self,
        hidden: Tensor,
        n_queries: int,
        image: KeysValues | None,
        allowed: Tensor | None,
        prefix: KeysValues | None,
    ) -> tuple[Tensor, KeysValues]:
        """hidden [B, n_queries + T, W]; returns it and this layer's own self-attention keys and values."""
        own = self.attention.keys_values(hidden)
        keys, values = own
        if prefix is not None:
            keys, values = torch.cat([prefix[0], keys], 2), torch.cat([prefix[1], values], 2)
        hidden = self.attention(hidden, (keys, values), allowed)
        queries, text = hidden.split([n_queries, hidden.shape[1] - n_queries], 1)
        parts = []
        if n_queries:
            if self.crossattention is not None and image is not None:
                queries = self.crossattention(queries, image)
            parts.append(self.query_ffn(queries))
        if text.shape[1]:
            assert self.text_ffn is not None
            parts.append(self.text_ffn(text))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0], own


class QFormer(nn.Module):
    """Queries over cached image tokens, alone or together with text.

    Args:
        image_width: width of the image tokens (1408 for ViT-g).
        local_width: given, the layers without cross-attention to the image have one to local tokens of this width
            (early cross-attention, X-Former figure 1c).
        vocabulary: text vocabulary with [DEC]; 0 leaves all text parts out, as stage 2 does.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        intermediate: int,
        queries: int,
        cross_every: int,
        image_width: int,
        vocabulary: int,
        dropout: float = 0.0,
        positions: int = 512,
        local_width: int | None = None,
    ) -> None:
        super().__init__()
        self.cross_every = cross_every
        self.dropout = dropout
        self.query_tokens = nn.Parameter(torch.empty(1, queries, width))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.layers = nn.ModuleList(
            Layer(
                width, heads, intermediate, dropout, local_width if i % cross_every else image_width, bool(vocabulary)
            )
            for i in range(layers)
        )
        if vocabulary:
            self.words = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(positions, width)
            self.head_dense = nn.Linear(width, width)
            self.head_norm = nn.LayerNorm(width, eps=EPS)
            self.head_bias = nn.Parameter(torch.zeros(vocabulary))
        self.apply(_initialise)
        nn.init.normal_(self.query_tokens, std=0.02)

    def image_keys_values(self, image: Tensor, local: Tensor | None = None) -> list[KeysValues | None]:
        """Cross-attention keys and values of [B, N, image width], and in the layers between those of [B, L, local
        width] where they have any; computed once and used by every pass over the image."""
        found: list[KeysValues | None] = []
        for i, layer in enumerate(self._layers()):
            source = local if i % self.cross_every else image
            if layer.crossattention is None:
                found.append(None)
                continue
            assert source is not None, "early cross-attention reads local tokens"
            found.append(layer.crossattention.keys_values(source))
        return found

    def _layers(self) -> list[Layer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _embed(self, batch: int, words: Tensor | None, with_queries: bool) -> Tensor:
        parts = [self.query_tokens.expand(batch, -1, -1)] if with_queries else []
        if words is not None:
            parts.append(words + self.positions.weight[: words.shape[1]])
        return F.dropout(self.norm(torch.cat(parts, 1)), self.dropout, self.training)

    def queries(self, image: list[KeysValues | None]) -> tuple[Tensor, list[KeysValues]]:
        """Queries alone. Returns Z_q [B, Q, W] and every layer's self-attention keys and values."""
        first = next(kv for kv in image if kv is not None)
        hidden, kept = self._embed(first[0].shape[0], None, True), []
        for layer, keys_values in zip(self._layers(), image, strict=True):
            hidden, own = layer(hidden, hidden.shape[1], keys_values, None, None)
            kept.append(own)
        return hidden, kept

    def text(self, words: Tensor, mask: Tensor) -> Tensor:
        """Text alone, both directions: words [B, T, W], mask bool [B, T] -> [B, T, W].

        Here and below `words` is what `self.words` holds of the ids. One lookup serves every pass over a text, for the
        gradient of each has the size of the whole vocabulary.
        """
        hidden = self._embed(len(words), words, False)
        for layer in self._layers():
            hidden, _ = layer(hidden, 0, None, mask[:, None, None, :], None)
        return hidden

    def joint(self, image: list[KeysValues | None], words: Tensor, mask: Tensor) -> Tensor:
        """Queries and text attend to each other (ITM). Returns the queries' output [B, Q, W]."""
        hidden = self._embed(len(words), words, True)
        n = self.query_tokens.shape[1]
        seen = torch.cat([mask.new_ones(len(mask), n), mask], 1)[:, None, None, :]
        for layer, keys_values in zip(self._layers(), image, strict=True):
            hidden, _ = layer(hidden, n, keys_values, seen, None)
        return hidden[:, :n]

    def enhanced_prefix(self, enhanced: Tensor) -> list[KeysValues]:
        """Each layer's own key/value projection of Z' [B, Q, W]: the prefix that the text attends to in ITG."""
        return [layer.attention.keys_values(enhanced) for layer in self._layers()]

    def write(self, prefix: list[KeysValues], words: Tensor, mask: Tensor) -> Tensor:
        """Causal text after the prefix (ITG). Returns logits [B, T, vocabulary] for the next token."""
        hidden, length = self._embed(len(words), words, False), words.shape[1]
        n = prefix[0][0].shape[2]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        own = causal[None] & (mask[:, None, :] | torch.eye(length, dtype=torch.bool, device=mask.device))
        allowed = torch.cat([own.new_ones(len(words), length, n), own], 2)[:, None]
        for layer, before in zip(self._layers(), prefix, strict=True):
            hidden, _ = layer(hidden, 0, None, allowed, before)
        hidden = self.head_norm(F.gelu(self.head_dense(hidden)))
        return F.linear(hidden, self.words.weight, self.head_bias)


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation: normal(0, 0.02), zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def load_bert(qformer: QFormer, state: dict[str, Tensor]) -> None:
    """Fills a new Q-Former from BERT (BLIP-2, section 3.1): self-attention, text FFN, embeddings and head are copied,
    query FFNs start as copies of the text FFNs; cross-attention and queries keep their random start.

    Args:
        state: of transformers' BertForMaskedLM or BertForPreTraining.

    Raises: WeightsError where a tensor is missing or of another size.
    """
    state = {key.removeprefix("bert."): value.float() for key, value in state.items()}
    pairs: list[tuple[Tensor, str]] = [
        (qformer.norm.weight, "embeddings.LayerNorm.weight"),
        (qformer.norm.bias, "embeddings.LayerNorm.bias"),
        (qformer.positions.weight, "embeddings.position_embeddings.weight"),
        (qformer.words.weight, "embeddings.word_embeddings.weight"),
        (qformer.head_dense.weight, "cls.predictions.transform.dense.weight"),
        (qformer.head_dense.bias, "cls.predictions.transform.dense.bias"),
        (qformer.head_norm.weight, "cls.predictions.transform.LayerNorm.weight"),
        (qformer.head_norm.bias, "cls.predictions.transform.LayerNorm.bias"),
        (qformer.head_bias, "cls.predictions.bias"),
    ]
    names = {
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "attention.norm": "attention.output.LayerNorm",
    }
    for ffn in ("text_ffn", "query_ffn"):
        names |= {
            f"{ffn}.intermediate": "intermediate.dense",
            f"{ffn}.output": "output.dense",
            f"{ffn}.norm": "output.LayerNorm",
        }
    own = dict(qformer.named_parameters())
    for i in range(len(qformer.layers)):
        for ours, theirs in names.items():
            for kind in ("weight", "bias"):
                pairs.append((own[f"layers.{i}.{ours}.{kind}"], f"encoder.layer.{i}.{theirs}.{kind}"))
    with torch.no_grad():
        for parameter, key in pairs:
            if key not in state:
                raise WeightsError(f"qformer.text: {key} is missing; its weights must be of a BERT with its LM head.")
            value = state[key]
            grows = parameter is qformer.words.weight or parameter is qformer.head_bias  # by tokens such as [DEC]
            more = len(parameter) - len(value)
            if value.shape[1:] != parameter.shape[1:] or more < 0 or more and not grows:
                have, want = tuple(value.shape), tuple(parameter.shape)
                raise WeightsError(f"qformer.text: {key} has shape {have}, the settings ask for {want}.")
            # the rows of added tokens keep their start; token types are dropped, as in LAVIS
            parameter[: len(value)].copy_(value)
