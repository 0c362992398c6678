"""COCO captions (Karpathy test split in the paper's Table 4): results [{image_id, caption}]."""

from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.captions import score_captions
from xformer.evaluation.files import need, read_json, unique
from xformer.evaluation.intervals import interval

SCORERS = ("pycocoevalcap",)


def load(annotations: Path) -> list[dict[str, Any]]:
    """A COCO caption file: one row per image that has references. Raises EvaluationError."""
    where = f"--annotations {annotations}"
    content = need(read_json(annotations, "annotations"), ("images", "annotations"), where)
    if not isinstance(content["images"], list) or not isinstance(content["annotations"], list):
        raise EvaluationError(f"{where}: not a COCO caption file: images and annotations must be lists.")
    images = {need(row, ("id",), where)["id"]: row for row in content["images"]}
    unique([row["id"] for row in content["images"]], "image ids", where)
    references: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        need(row, ("image_id", "caption"), where)
        if row["image_id"] not in images:
            raise EvaluationError(
                f"{where}: a caption belongs to image {row['image_id']!r}, which is not among its images."
            )
        if not isinstance(row["caption"], str):
            raise EvaluationError(f"{where}: a caption of image {row['image_id']!r} is not text.")
        references.setdefault(row["image_id"], []).append(row["caption"])
    if not references:
        raise EvaluationError(f"{where}: holds no captions.")
    return [
        {
            "key": key,
            "image_id": key,
            "question": "",
            "truth": texts[0],
            "references": texts,
            "category": str(images[key].get("domain", "all")),
        }
        for key, texts in references.items()
    ]


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """All caption metrics x100, two decimals; `overall` is CIDEr.

    Returns: the report, and every image's CIDEr as a fraction.
    """
    found = score_captions(
        {i: row["references"] for i, row in enumerate(rows)}, {i: [text] for i, text in enumerate(answers)}
    )
    metrics = {k: v if isinstance(v, str) else round(100 * v, 2) for k, v in found["metrics"].items()}
    intervals = {k: interval(found["each"][k]) for k in ("ROUGE-L", "CIDEr", "SPICE") if found["each"][k]}
    report = {
        "overall": metrics["CIDEr"],
        "metrics": metrics,
        "intervals": intervals,
        "tokeniser": found["tokeniser"],
        "n": len(rows),
    }
    if found["tokeniser_reason"]:
        report["tokeniser_reason"] = found["tokeniser_reason"]
    return report, found["each"]["CIDEr"]


def constant_answers(rows: list[dict[str, Any]]) -> list[str]:
    """One caption for every image: the reference whose words occur in the most images, on average over its words."""
    seen: dict[str, int] = {}
    split = [[set(text.lower().split()) for text in row["references"]] for row in rows]
    for texts in split:
        for word in set().union(*texts):
            seen[word] = seen.get(word, 0) + 1
    best, most = "", -1.0
    for row, texts in zip(rows, split, strict=True):
        for text, words in zip(row["references"], texts, strict=True):
            value = sum(seen[w] for w in words) / max(len(words), 6)  # a caption of one article is no caption
            if value > most:
                best, most = text, value
    return [best] * len(rows)
