"""GVTBench multi-class identification (MCI; Wang et al. 2023, github.com/TencentARC/GVT), on COCO and on VCR: "Does ...
exist in the image?", by the official rule and by a strict one.
"""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.oc import load_rows
from xformer.evaluation.vqa import percent


def load(questions: Path) -> list[dict[str, Any]]:
    """A list [{image_id, text_in, text_out, n_obj_exist}]; a question's id is its place. Raises EvaluationError."""
    rows = load_rows(questions, "multi-class identification")
    for row in rows:
        if row["text_out"].lower().strip(" .") not in ("yes", "no"):
            raise EvaluationError(
                f"--questions {questions}: entry {row['key']} has the text_out {row['text_out']!r}, neither yes nor no."
            )
        row |= {"truth": row["text_out"], "category": _bin(row["n_obj_exist"])}
    return rows


def yes_or_no(truth: str) -> str:
    """The benchmark's `text_out` is "Yes." or "No."."""
    return "yes" if "yes" in truth.lower() else "no"


def right_official(text: str, truth: str) -> bool:
    """The official script: the true word stands anywhere in the lower-cased answer, even inside a word."""
    return yes_or_no(truth) in text.lower()


def right_strict(text: str, truth: str) -> bool:
    """The first whole word yes or no decides."""
    words = [w for w in re.findall(r"[a-z]+", text.lower()) if w in ("yes", "no")]
    return bool(words) and words[0] == yes_or_no(truth)


SCORERS: dict[str, Callable[[str, str], bool]] = {"official": right_official, "strict": right_strict}


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """Accuracy (percent), overall and by how many objects the image holds: below 10, below 20, more.

    Returns: the report, and 0 or 1 for every row.
    """
    right = [float(SCORERS[scorer](text, row["text_out"])) for text, row in zip(answers, rows, strict=True)]
    bins: dict[str, list[float]] = {}
    for row, ok in zip(rows, right, strict=True):
        bins.setdefault(_bin(row["n_obj_exist"]), []).append(ok)
    report = {"overall": percent(right), "per_objects": {k: percent(bins[k]) for k in sorted(bins)}, "n": len(rows)}
    return report, right


def _bin(objects: int) -> str:
    return "<10" if objects < 10 else "<20" if objects < 20 else ">=20"


def constant_answers(rows: list[dict[str, Any]]) -> list[str]:
    """The most frequent answer: what a model that never looks can reach."""
    return [Counter(row["text_out"] for row in rows).most_common(1)[0][0]] * len(rows)
