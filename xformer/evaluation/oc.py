"""GVTBench object counting (OC; Wang et al. 2023, github.com/TencentARC/GVT), on COCO and on VCR: "How many ... are
there in the image?", by the official rule and by a strict one.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.files import need, read_json
from xformer.evaluation.vqa import percent

NUMBER_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")
OFFICIAL_WORDS = (*NUMBER_WORDS, "nive")  # the script's own spelling of nine (gvt/modules/evaluations/count.py)
STRICT_WORDS = {word: i for i, word in enumerate((*NUMBER_WORDS, "nine", "ten"))} | {"zero": 0}


def load(questions: Path) -> list[dict[str, Any]]:
    """A list [{image_id, text_in, text_out, n_obj_exist}]; a question's id is its place. Raises EvaluationError."""
    rows = load_rows(questions, "object counting")
    for row in rows:
        if not row["text_out"].isdigit():
            raise EvaluationError(
                f"--questions {questions}: entry {row['key']} has the text_out {row['text_out']!r}, not a count."
            )
        row |= {"truth": row["text_out"], "category": _bin(int(row["text_out"]))}
    return rows


def load_rows(questions: Path, name: str) -> list[dict[str, Any]]:
    """GVTBench's common format. Raises EvaluationError."""
    where = f"--questions {questions}"
    content = read_json(questions, "questions")
    if not isinstance(content, list) or not content:
        raise EvaluationError(f"{where}: not in GVTBench's {name} format, a list of objects.")
    rows = []
    for i, row in enumerate(content):
        need(row, ("image_id", "text_in", "text_out", "n_obj_exist"), where)
        if isinstance(row["n_obj_exist"], bool) or not isinstance(row["n_obj_exist"], int):
            raise EvaluationError(f"{where}: entry {i} has the n_obj_exist {row['n_obj_exist']!r}, not a count.")
        rows.append(
            {
                "key": i,
                "image_id": row["image_id"],
                "question": str(row["text_in"]),
                "text_out": str(row["text_out"]),
                "n_obj_exist": row["n_obj_exist"],
            }
        )
    return rows


def count_official(text: str) -> int:
    """The official script: its number words are replaced case-sensitively, even inside words; the first number, else 0."""
    for value, word in enumerate(OFFICIAL_WORDS):
        text = text.replace(word, str(value))
    found = re.search(r"\d+", text)
    return int(found.group()[:18]) if found else 0


def count_strict(text: str) -> int | None:
    """Whole words in any case; None where the answer holds no number."""
    for word in re.findall(r"[a-z]+|\d+", text.lower()):
        if word.isdigit():
            return int(word[:18])
        if word in STRICT_WORDS:
            return STRICT_WORDS[word]
    return None


SCORERS: dict[str, Callable[[str], int | None]] = {"official": count_official, "strict": count_strict}


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """Exact accuracy (percent), MAE, RMSE, and accuracy by bins of the true count // 3.

    Returns: the report, and 0 or 1 for every row.
    """
    truths = [int(row["text_out"]) for row in rows]
    guesses = [SCORERS[scorer](text) for text in answers]
    errors = [abs((g or 0) - t) for g, t in zip(guesses, truths, strict=True)]
    right = [float(g == t) for g, t in zip(guesses, truths, strict=True)]
    bins: dict[str, list[float]] = {}
    for truth, ok in zip(truths, right, strict=True):
        bins.setdefault(_bin(truth), []).append(ok)
    report = {
        "overall": percent(right),
        "mae": round(sum(errors) / len(errors), 4),
        "rmse": round(math.sqrt(sum(e * e for e in errors) / len(errors)), 4),
        "per_count": {name: percent(bins[name]) for name in sorted(bins, key=lambda n: int(n.partition("-")[0]))},
        "n": len(rows),
    }
    return report, right


def _bin(count: int) -> str:
    return f"{count // 3 * 3}-{count // 3 * 3 + 2}"


def constant_answers(rows: list[dict[str, Any]]) -> list[str]:
    """The most frequent answer: what a model that never looks can reach."""
    return [Counter(row["text_out"] for row in rows).most_common(1)[0][0]] * len(rows)
