"""NoCaps (Agrawal et al. 2019): captions of images with objects that COCO's captions do not have, by domain."""

from pathlib import Path
from typing import Any

from xformer.evaluation import coco_caption
from xformer.evaluation.captions import score_captions

DOMAINS = ("in-domain", "near-domain", "out-domain")


def load(annotations: Path) -> list[dict[str, Any]]:
    """nocaps_val_4500_captions.json: COCO's format, and a `domain` for every image. Raises EvaluationError."""
    return coco_caption.load(annotations)


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """As for COCO over the entire set, and CIDEr and SPICE of each domain, each with its own references as the official
    server does; `per_domain` is CIDEr.

    Returns: the report, and every image's CIDEr as a fraction.
    """
    report, each = coco_caption.score(rows, answers, scorer)
    domains: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        inside = [i for i, row in enumerate(rows) if row["category"] == domain]
        if inside:
            found = score_captions(
                {i: rows[i]["references"] for i in inside}, {i: [answers[i]] for i in inside}, ("CIDEr", "SPICE")
            )
            domains[domain] = {k: v if isinstance(v, str) else round(100 * v, 2) for k, v in found["metrics"].items()}
    report["per_domain"] = {name: values["CIDEr"] for name, values in domains.items()} | {"entire": report["overall"]}
    report["domains"] = domains or "not available: the images carry no domain"
    return report, each
