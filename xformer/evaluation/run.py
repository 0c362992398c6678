"""`xformer eval`: questions -> answers on cached features -> scores, beside what needs no image at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.console import say, table
from xformer.errors import EvaluationError
from xformer.evaluation import counting, vqa

DEFAULTS = {
    "vqav2": ("shapes/val/vqa_questions.json", "shapes/val/vqa_annotations.json"),
    "oc": ("shapes/val/gvtbench_oc.json", None),
    "mci": ("shapes/val/gvtbench_mci.json", None),
}
TITLES = {"vqav2": "VQAv2", "oc": "GVTBench object counting", "mci": "GVTBench multi-class identification"}


def _read(path: Path, what: str) -> Any:
    if not path.is_file():
        raise EvaluationError(f"--{what} {path}: there is no such file.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"--{what} {path}: not valid JSON: {error}.") from None


def load_benchmark(benchmark: str, questions: Path | None, annotations: Path | None) -> list[dict[str, Any]]:
    """Question rows with question_id, image_id, question, and the truth. Raises EvaluationError for a wrong format."""
    question_file, annotation_file = DEFAULTS[benchmark]
    questions = questions or Path(question_file)
    content = _read(questions, "questions")
    try:
        if benchmark != "vqav2":
            return [
                {"question_id": i, "image_id": row["image_id"], "question": row["text_in"], **row}
                for i, row in enumerate(content)
            ]
        truths = _read(annotations or Path(str(annotation_file)), "annotations")["annotations"]
        asked = {row["question_id"]: row for row in content["questions"]}
        if len(asked) != len(content["questions"]):
            raise EvaluationError(f"{questions}: a question_id stands twice.")
        if set(asked) != {row["question_id"] for row in truths}:
            raise EvaluationError(f"{questions} and its annotations do not hold the same questions.")
        return [row | {"question": asked[row["question_id"]]["question"]} for row in truths]
    except (KeyError, TypeError) as error:
        raise EvaluationError(f"{questions}: not in the format of {TITLES[benchmark]}: {error} is missing.") from None


def score_answers(benchmark: str, rows: list[dict[str, Any]], answers: list[str]) -> dict[str, Any]:
    """Scores by every scorer of a benchmark: {scorer: {overall, ...}}."""
    if benchmark == "vqav2":
        results = [{"question_id": r["question_id"], "answer": a} for r, a in zip(rows, answers, strict=True)]
        return {scorer: vqa.score(results, rows, scorer) for scorer in vqa.SCORERS}
    if benchmark == "oc":
        scorers = {"official": counting.count_official, "strict": counting.count_strict}
        return {name: counting.score_oc(answers, rows, count) for name, count in scorers.items()}
    rules = {"official": counting.yes_official, "strict": counting.yes_strict}
    return {name: counting.score_mci(answers, rows, rule) for name, rule in rules.items()}


def constant_answers(benchmark: str, rows: list[dict[str, Any]]) -> list[str]:
    """The answers of a model that never looks: the most frequent one, per answer type where there are types."""
    if benchmark == "vqav2":
        best = vqa.constant_answers(rows)
        return [best[row["answer_type"]] for row in rows]
    return [counting.constant(rows)] * len(rows)


def evaluate(
    benchmark: str,
    run: Path,
    store: Path,
    questions: Path | None,
    annotations: Path | None,
    results: Path | None,
    out: Path,
    overrides: list[str],
    limit: int | None = None,
    allow_partial: bool = False,
    blind: bool = True,
) -> dict[str, Any]:
    """Answers and scores a benchmark; writes OUT/scores.json and OUT/results.json. Returns the scores.

    Args:
        results: a file [{question_id, answer}]; given, no model is loaded and only scoring is done.

    Raises: EvaluationError, StoreError, CheckpointError.
    """
    rows = load_benchmark(benchmark, questions, annotations)
    total = len(rows)
    if limit:
        rows = rows[:limit]
    if not rows:
        raise EvaluationError(f"{questions}: holds no questions.")
    report: dict[str, Any] = {"benchmark": benchmark, "n": len(rows), "of": total}
    systems: dict[str, list[str]] = {"constant answer": constant_answers(benchmark, rows)}
    if results is not None:
        rows, answers = _given(results, rows, allow_partial)
        report |= {"n": len(rows), "results": str(results)}
        systems = {"constant answer": constant_answers(benchmark, rows), str(results): answers}
    else:
        answers, described = _answer(run, store, rows, overrides, blind, systems)
        report |= described
        systems[described["model"]] = answers
    report["scores"] = {name: score_answers(benchmark, rows, given) for name, given in systems.items()}
    publish.write_json(out / "scores.json", report)
    keyed = [
        {"question_id": r["question_id"], "image_id": r["image_id"], "question": r["question"], "answer": a}
        for r, a in zip(rows, answers, strict=True)
    ]
    publish.write_json(out / "results.json", keyed)
    _show(benchmark, report)
    say(f"scores in {out / 'scores.json'}, answers in {out / 'results.json'}")
    return report


def _given(results: Path, rows: list[dict], allow_partial: bool) -> tuple[list[dict], list[str]]:
    given = _read(results, "results")
    try:
        pairs = [(row["question_id"], str(row["answer"])) for row in given]
    except (KeyError, TypeError):
        raise EvaluationError(f"--results {results}: must be a list of question_id and answer.") from None
    known = dict(pairs)
    if len(known) != len(pairs):
        raise EvaluationError(f"--results {results}: a question is answered more than once.")
    wanted = {row["question_id"] for row in rows}
    if extra := set(known) - wanted:
        raise EvaluationError(f"--results {results}: {len(extra)} answers belong to no question.")
    if missing := wanted - set(known):
        if not allow_partial or not known:
            raise EvaluationError(
                f"--results {results}: {len(missing)} of {len(wanted)} questions have no answer; answer them all, or "
                "score what is there with --allow-partial."
            )
        say(f"partial: n={len(known)}/{len(wanted)}")
    kept = [row for row in rows if row["question_id"] in known]
    return kept, [known[row["question_id"]] for row in kept]


def _answer(
    run: Path, store: Path, rows: list[dict], overrides: list[str], blind: bool, systems: dict[str, list[str]]
) -> tuple[list[str], dict[str, Any]]:
    """Loads a stage-2 run and answers from the store; adds the blind language model to `systems`."""
    from xformer.data import Cache
    from xformer.evaluation import generate
    from xformer.evaluation.load import load_stage2, rows_of_images
    from xformer.local import mask_ratio
    from xformer.train import compare_identities

    stage2, state, settings = load_stage2(run, overrides)
    cache = Cache(store, settings, state["model"], pixels=False, phase="eval")
    compare_identities(state["identities"], cache.identities(), str(run), str(store))
    places, captions = rows_of_images(cache, [str(row["image_id"]) for row in rows])
    asked = [row["question"] for row in rows]
    answers = generate.answer(stage2, cache, np.array(places), asked, settings, f"answer with {state['model']}")
    if blind:
        systems["blind LLM"] = generate.answer_blind(stage2.llm, asked, settings)
        if all(captions):
            told = generate.answer_from_captions(stage2.llm, [str(c) for c in captions], asked, settings)
            systems["LLM given a true caption"] = told
    return answers, {
        "model": state["model"],
        "checkpoint": str(run),
        "step": state["step"],
        "features": str(store),
        "llm": settings.llm.weights,
        "eval": settings.eval.model_dump(mode="json"),
        "mask_ratio": mask_ratio(settings, state["model"], "eval"),
    }


def _show(benchmark: str, report: dict[str, Any]) -> None:
    first = next(iter(report["scores"].values()))
    for scorer in first:
        inner = first[scorer]
        part = next((k for k in ("per_answer_type", "per_count", "per_objects") if k in inner), None)
        kinds = list(inner[part]) if part else []
        extra = [k for k in ("mae", "rmse") if k in inner]
        rows = [
            (name, *[s[scorer][part].get(k) for k in kinds], s[scorer]["overall"], *[s[scorer][k] for k in extra])
            for name, s in report["scores"].items()
        ]
        title = f"{TITLES[benchmark]}, {scorer} scorer, n = {report['n']}"
        table(title, ("", *kinds, "overall", *extra), rows)
