"""OK-VQA (Marino et al. 2019): questions that need outside knowledge, scored by the VQA evaluator."""

from pathlib import Path
from typing import Any

from xformer.evaluation import vqa


def load(questions: Path, annotations: Path) -> list[dict[str, Any]]:
    """OpenEnded_mscoco_val2014_questions.json and mscoco_val2014_annotations.json; the scored text is `answer`, not
    `raw_answer`. Categories are shown by the names that the annotation file gives its question types.

    Raises: EvaluationError.
    """

    def name(content: dict, row: dict) -> str:
        names = content.get("question_types")
        kind = str(row["question_type"])
        return str(names.get(kind, kind)) if isinstance(names, dict) else kind

    return vqa.load(questions, annotations, name)
