"""The benchmarks whose answers are texts: where their files lie, how they are read, scored, and answered blindly."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation import coco_caption, gqa, mci, nocaps, oc, okvqa, vqa, vqav2

Row = dict[str, Any]  # key, image_id, question, truth, category, and what the benchmark's own scorer reads


@dataclass(frozen=True)
class Files:
    """What was given on the command line; None takes the shapes corpus's."""

    questions: Path | None = None
    annotations: Path | None = None
    choices: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """What is the same for all of them. `keys` are the two keys of a results row; `part` the scores by category."""

    title: str
    keys: tuple[str, str]
    load: Callable[[Files], list[Row]]
    score: Callable[[list[Row], list[str], str], tuple[dict[str, Any], list[float]]]
    scorers: tuple[str, ...]
    constant: Callable[[list[Row]], list[str]]
    part: str
    columns: tuple[str, ...] = ()


SHAPES = Path("shapes/val")
READS = {  # the files of each benchmark; another one would be passed over in silence
    "vqav2": ("questions", "annotations"),
    "okvqa": ("questions", "annotations"),
    "gqa": ("questions", "choices"),
    "oc": ("questions",),
    "mci": ("questions",),
    "coco-caption": ("annotations",),
    "nocaps": ("annotations",),
    "retrieval": ("annotations",),
    "diversity": (),
}
VQA, GVT = ("question_id", "answer"), ("question_id", "answer")


def _questions(files: Files, default: str) -> Path:
    return files.questions or SHAPES / default


def _pair(files: Files) -> tuple[Path, Path]:
    if files.questions and not files.annotations:
        raise EvaluationError(f"--questions {files.questions}: give its --annotations too; the answers stand there.")
    return _questions(files, "vqa_questions.json"), files.annotations or SHAPES / "vqa_annotations.json"


def _captions(files: Files) -> Path:
    return files.annotations or SHAPES / "captions.json"


SUITE: dict[str, Benchmark] = {
    "vqav2": Benchmark(
        "VQAv2", VQA, lambda f: vqav2.load(*_pair(f)), vqa.score, vqa.SCORERS, vqa.constant_answers, "per_answer_type"
    ),
    "okvqa": Benchmark(
        "OK-VQA",
        VQA,
        lambda f: okvqa.load(*_pair(f)),
        vqa.score,
        vqa.SCORERS,
        vqa.constant_answers,
        "per_question_type",
    ),
    "gqa": Benchmark(
        "GQA",
        ("questionId", "prediction"),
        lambda f: gqa.load(_questions(f, "gqa_questions.json"), f.choices),
        gqa.score,
        gqa.SCORERS,
        gqa.constant_answers,
        "per_structural",
        ("consistency", "distribution"),
    ),
    "oc": Benchmark(
        "GVTBench object counting",
        GVT,
        lambda f: oc.load(_questions(f, "gvtbench_oc.json")),
        oc.score,
        tuple(oc.SCORERS),
        oc.constant_answers,
        "per_count",
        ("mae", "rmse"),
    ),
    "mci": Benchmark(
        "GVTBench multi-class identification",
        GVT,
        lambda f: mci.load(_questions(f, "gvtbench_mci.json")),
        mci.score,
        tuple(mci.SCORERS),
        mci.constant_answers,
        "per_objects",
    ),
    "coco-caption": Benchmark(
        "COCO captions",
        ("image_id", "caption"),
        lambda f: coco_caption.load(_captions(f)),
        coco_caption.score,
        coco_caption.SCORERS,
        coco_caption.constant_answers,
        "metrics",
    ),
    "nocaps": Benchmark(
        "NoCaps",
        ("image_id", "caption"),
        lambda f: nocaps.load(_captions(f)),
        nocaps.score,
        coco_caption.SCORERS,
        coco_caption.constant_answers,
        "per_domain",
    ),
}
TITLES = {name: benchmark.title for name, benchmark in SUITE.items()} | {
    "retrieval": "Image-text retrieval",
    "diversity": "Query diversity",
}
