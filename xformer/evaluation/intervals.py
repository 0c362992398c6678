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


def over_seeds(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """Two systems trained with the same seeds and asked the same questions: is the difference more than chance?

    The 95% interval counts both kinds of chance: which seeds were drawn (the variance of the seeds' differences) and
    which questions were asked (the variance of the questions' differences). Its width is Student's t, so few seeds that
    disagree give a wide interval; one seed gives the questions' share only. `p` is the paired randomisation test over
    questions.

    Args:
        ours, theirs: [seeds, N], the same seed in the same row, the same question in the same column.
    """
    differences = ours - theirs
    mean, half = seeded_mean(differences)
    return paired(ours.mean(0), theirs.mean(0)) | {
        "difference": round(100 * mean, 2),
        "interval": [round(100 * (mean - half), 2), round(100 * (mean + half), 2)],
        "by_seed": [round(100 * float(v), 2) for v in differences.mean(1)],
    }


def seeded_mean(values: np.ndarray) -> tuple[float, float]:
    """The mean of [seeds, N] and half its 95% interval: two crossed random effects without replication (Searle, Casella &
    McCulloch 1992, section 4.7), with Satterthwaite's degrees of freedom, at least seeds - 1."""
    seeds, n = values.shape
    mean, by_seed, by_question = float(values.mean()), values.mean(1), values.mean(0)
    of_questions = float(by_question.var(ddof=1)) / n if n > 1 else 0.0
    if seeds == 1:
        return mean, student(0) * of_questions**0.5
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    left = values - by_seed[:, None] - by_question + mean
    twice = float((left**2).sum()) / max(1, (seeds - 1) * (n - 1)) / (seeds * n)  # stands in both of the two above
    variance = max(of_seeds, of_questions, of_seeds + of_questions - twice)
    parts = of_seeds**2 / (seeds - 1) + of_questions**2 / max(1, n - 1)
    degrees = variance**2 / parts if parts else 0.0
    return mean, student(max(seeds - 1, int(degrees))) * variance**0.5


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% quantiles for 1 to 9 degrees


def student(degrees: int) -> float:
    """The 97.5% quantile of Student's t; 0 degrees (one seed) take the normal one. Above 9 the expansion of Abramowitz &
    Stegun 26.7.5, which is right to 0.001."""
    z = 1.959964
    if 0 < degrees <= len(STUDENT):
        return STUDENT[degrees - 1]
    if not degrees:
        return z
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
