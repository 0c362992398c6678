"""VQAv2 (Goyal et al. 2017): balanced questions about COCO images, ten human answers each."""

from pathlib import Path
from typing import Any

from xformer.evaluation import vqa


def load(questions: Path, annotations: Path) -> list[dict[str, Any]]:
    """v2_OpenEnded_mscoco_*_questions.json and v2_mscoco_*_annotations.json. Raises EvaluationError."""
    return vqa.load(questions, annotations, lambda _, row: str(row["question_type"]))
