"""The dual cross-attention (X-Former, section 3.1, figure 3): local MAE tokens and global queries enrich each other."""

from torch import Tensor, nn
from torch.nn import functional as F

from xformer.qformer import split_heads


class CrossAttention(nn.Module):
    """Pre-norm residual cross-attention; the output projection starts at zero, so the block starts as the identity."""

    def __init__(self, width: int, source_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)
        self.output = nn.Linear(width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        """hidden [B, T, W] attends to source [B, N, source width]."""
        query = split_heads(self.query(self.norm(hidden)), self.heads)
        key, value = split_heads(self.key(source), self.heads), split_heads(self.value(source), self.heads)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return hidden + self.output(mixed)


class FeedForward(nn.Module):
    """Pre-norm residual feed-forward that starts as the identity."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, ratio * width)
        self.output = nn.Linear(ratio * width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.output(F.gelu(self.inner(self.norm(hidden))))


class DualCrossAttention(nn.Module):
    """Block 1: M attends to Z_q and becomes M'. Block 2: Z_q attends to M' and becomes Z'.

    With widths 1280 and 768, depth 1 and ratio 4 this has 21,517,056 parameters, the paper's +22M.

    Args:
        local_width: width of the MAE tokens M.
        query_width: width of the queries Z_q.
        ffn_ratio: of the feed-forward after block 1; 0 leaves it out.
        ffn_block2: a feed-forward after block 2 as well.
    """

    def __init__(
        self,
        local_width: int,
        query_width: int,
        heads: int,
        depth: int = 1,
        ffn_ratio: int = 4,
        ffn_block2: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            layer = nn.ModuleDict({"local": CrossAttention(local_width, query_width, heads)})
            if ffn_ratio:
                layer["local_ffn"] = FeedForward(local_width, ffn_ratio)
            layer["queries"] = CrossAttention(query_width, local_width, heads)
            if ffn_block2:
                layer["queries_ffn"] = FeedForward(query_width, ffn_ratio or 4)
            self.layers.append(layer)

    def forward(self, queries: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Z_q [B, Q, query width], M [B, N, local width] -> Z' and M' of the same shapes."""
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            local = layer["local"](local, queries)
            local = layer["local_ffn"](local) if "local_ffn" in layer else local
            queries = layer["queries"](queries, local)
            queries = layer["queries_ffn"](queries) if "queries_ffn" in layer else queries
        return queries, local
