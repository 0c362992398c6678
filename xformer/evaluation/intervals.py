"""How sure a score is: bootstrap intervals, and a paired test of two models on the same questions.

Scores take few distinct values, so resampling n questions is a multinomial draw of how often each value occurs: the same
distribution as drawing questions one by one, and as quick for 200,000 questions as for 200.
"""

from typing import Any

import numpy as np

RESAMPLES = 2000


def interval(each: list[float] | np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> list[float]:
    """The 95% percentile bootstrap interval of the mean (Efron & Tibshirani 1993, chapter 13), x100, two decimals.

    Args:
        each: [N], one value per question.
    """
    means = _resampled_means(np.asarray(each, float), np.random.default_rng(seed), resamples)
    return [round(100 * float(v), 2) for v in np.percentile(means, [2.5, 97.5])]


def _resampled_means(each: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    values, counts = np.unique(each, return_counts=True)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):  # [100, distinct values] at a time
        size = min(100, resamples - start)
        means[start : start + size] = rng.multinomial(len(each), counts / len(each), size) @ values / len(each)
    return means


def paired(ours: list[float] | np.ndarray, theirs: list[float] | np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Two models on the same questions: the difference of their means with a 95% bootstrap interval over questions, and
    the two-sided p-value of the paired randomisation test (Noreen 1989): the signs of the differences are flipped.

    Args:
        ours, theirs: [N] in the same order.
    """
    differences = np.round(np.asarray(ours, float) - np.asarray(theirs, float), 12)
    rng = np.random.default_rng(seed)
    low, high = np.percentile(_resampled_means(differences, rng, RESAMPLES), [2.5, 97.5])
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    trials = 10_000
    flipped = sum(
        (size * (2 * rng.binomial(count, 0.5, trials) - count) for size, count in zip(sizes, counts, strict=True)),
        np.zeros(trials),
    )
    observed = abs(differences.sum())
    p = (1 + int((np.abs(flipped) >= observed - 1e-9).sum())) / (trials + 1)
    return {
        "difference": round(100 * float(differences.mean()), 2),
        "interval": [round(100 * float(low), 2), round(100 * float(high), 2)],
        "p": round(p, 4),
        "better": int((differences > 0).sum()),
        "worse": int((differences < 0).sum()),
        "n": len(differences),
    }
