"""How different the output queries of one image are. X-Former says that its queries differ more than the Q-Former's
but gives no formula; here: the mean pairwise cosine similarity, and the effective rank (Roy & Vetterli 2007).
"""

from typing import Any

import numpy as np

from xformer.evaluation.intervals import interval


def cosines(queries: np.ndarray) -> np.ndarray:
    """[N, Q, W] -> cosine similarities [N, Q, Q]."""
    unit = queries / np.maximum(np.linalg.norm(queries, axis=-1, keepdims=True), 1e-12)
    return unit @ unit.swapaxes(1, 2)


def mean_cosine(similar: np.ndarray) -> np.ndarray:
    """[N, Q, Q] -> [N]: the mean over pairs of different queries. A single query has no pair: 1."""
    q = similar.shape[-1]
    return (similar.sum((1, 2)) - q) / (q * (q - 1)) if q > 1 else np.ones(len(similar))


def effective_rank(queries: np.ndarray) -> np.ndarray:
    """[N, Q, W] -> [N]: exp of the entropy of the singular values, normalised to sum 1; from 1 to min(Q, W).
    NaN where a query is not finite."""
    finite = np.isfinite(queries).all((1, 2))
    values = np.linalg.svd(np.where(finite[:, None, None], queries, 0), compute_uv=False)
    share = values / np.maximum(values.sum(-1, keepdims=True), 1e-12)
    return np.where(finite, np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum(-1)), np.nan)


def measure(queries: np.ndarray) -> tuple[dict[str, Any], list[float]]:
    """Summary over images of [N, Q, W], and every image's mean cosine; `overall` is the mean cosine x100 (lower = more
    different queries). `heat` is the mean cosine matrix [Q, Q].
    """
    similar = cosines(queries.astype(np.float64))
    each, ranks = mean_cosine(similar), effective_rank(queries.astype(np.float64))
    counts, edges = np.histogram(each, bins=20, range=(-1, 1))
    return {
        "overall": round(100 * float(each.mean()), 2),
        "interval": interval(each),
        "percentiles": {str(p): round(float(np.percentile(each, p)), 4) for p in (5, 25, 50, 75, 95)},
        "histogram": {"counts": counts.tolist(), "edges": [round(float(e), 1) for e in edges]},
        "effective_rank": round(float(ranks.mean()), 3),
        "queries": queries.shape[1],
        "heat": np.round(similar.mean(0), 4).tolist(),
        "n": len(queries),
    }, each.tolist()
