"""GVTBench object counting (OC) and multi-class identification (MCI), by the official rule and by a strict one."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

NUMBER_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")


def count_official(text: str) -> int:
    """The official script: number words none..eight are replaced case-sensitively, even inside words; the first number,
    else 0."""
    for value, word in enumerate(NUMBER_WORDS):
        text = text.replace(word, str(value))
    found = re.search(r"\d+", text)
    return int(found.group()) if found else 0


def count_strict(text: str) -> int | None:
    """Whole words in any case; None where the answer holds no number."""
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word.isdigit():
            return int(word)
        if word in NUMBER_WORDS:
            return NUMBER_WORDS.index(word)
    return None


def score_oc(predictions: list[str], rows: list[dict[str, Any]], count: Callable[[str], int | None]) -> dict[str, Any]:
    """Exact accuracy (percent), MAE, RMSE, and accuracy by bins of the true count // 3."""
    truths = [int(row["text_out"]) for row in rows]
    guesses = [count(text) for text in predictions]
    errors = [abs((g or 0) - t) for g, t in zip(guesses, truths, strict=True)]
    right = [g == t for g, t in zip(guesses, truths, strict=True)]
    bins: dict[str, list[bool]] = {}
    for truth, ok in zip(truths, right, strict=True):
        low = truth // 3 * 3
        bins.setdefault(f"{low}-{low + 2}", []).append(ok)
    return {
        "overall": percent(right),
        "mae": round(sum(errors) / len(errors), 4),
        "rmse": round(math.sqrt(sum(e * e for e in errors) / len(errors)), 4),
        "per_count": {name: percent(bins[name]) for name in sorted(bins)},
        "n": len(rows),
    }


def yes_or_no(truth: str) -> str:
    """The benchmark's `text_out` is "Yes." or "No."."""
    return "yes" if "yes" in truth.lower() else "no"


def yes_official(text: str, truth: str) -> bool:
    """The official script: the true word stands anywhere in the lower-cased answer, even inside a word."""
    return yes_or_no(truth) in text.lower()


def yes_strict(text: str, truth: str) -> bool:
    """The first whole word yes or no decides."""
    words = [w for w in re.findall(r"[a-z]+", text.lower()) if w in ("yes", "no")]
    return bool(words) and words[0] == yes_or_no(truth)


def score_mci(predictions: list[str], rows: list[dict[str, Any]], right: Callable[[str, str], bool]) -> dict[str, Any]:
    """Accuracy (percent), overall and by how many objects the image holds: below 10, below 20, more."""
    correct = [right(text, row["text_out"]) for text, row in zip(predictions, rows, strict=True)]
    bins: dict[str, list[bool]] = {}
    for row, ok in zip(rows, correct, strict=True):
        n = int(row["n_obj_exist"])
        bins.setdefault("<10" if n < 10 else "<20" if n < 20 else ">=20", []).append(ok)
    return {"overall": percent(correct), "per_objects": {k: percent(bins[k]) for k in sorted(bins)}, "n": len(rows)}


def constant(rows: list[dict[str, Any]]) -> str:
    """The most frequent answer: what a model that never looks can reach."""
    return Counter(str(row["text_out"]) for row in rows).most_common(1)[0][0]


def percent(right: list[bool]) -> float:
    return round(100 * sum(right) / len(right), 2) if right else 0.0
