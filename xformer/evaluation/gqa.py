"""GQA (Hudson & Manning 2019), after the official eval.py: accuracy by structural and semantic type (Figure 5 of
X-Former), consistency, validity, plausibility, distribution.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.files import need, read_json
from xformer.evaluation.vqa import normalise, percent

COMMON = ("color", "material", "shape")  # what eval.py takes for the choices of "Common" questions
SCORERS = ("official", "lavis")  # exact equality; LAVIS normalises both sides as in VQA first


def load(questions: Path, choices: Path | None) -> list[dict[str, Any]]:
    """Questions by id, with the choices of each where a choices file is given. Raises EvaluationError."""
    where = f"--questions {questions}"
    content = read_json(questions, "questions")
    if not isinstance(content, dict) or not content:
        raise EvaluationError(f"{where}: not in GQA's format, an object from question id to question.")
    allowed = read_json(choices, "choices") if choices else {}
    rows = []
    for key, row in content.items():
        if not isinstance(row, dict):
            raise EvaluationError(f"{where}: not in GQA's format, an object from question id to question.")
        need(row, ("question", "imageId", "answer", "types"), f"{where}: question {key!r}")
        types = need(row["types"], ("structural", "semantic"), f"{where}: the types of question {key!r}")
        given = need(allowed, (key,), f"--choices {choices}")[key] if choices and row.get("isBalanced", True) else None
        if given is not None:
            need(given, ("valid", "plausible"), f"--choices {choices}: question {key!r}")
        rows.append(
            {
                "key": key,
                "image_id": row["imageId"],
                "question": row["question"],
                "truth": str(row["answer"]),
                "balanced": bool(row.get("isBalanced", True)),
                "structural": str(types["structural"]),
                "semantic": str(types["semantic"]),
                "detailed": str(types.get("detailed", "")),
                "category": str(types["structural"]),
                "group": (row.get("groups") or {}).get("global"),
                "entailed": [str(e) for e in row.get("entailed") or []],
                "choices": given,
            }
        )
    if not any(row["balanced"] for row in rows):
        raise EvaluationError(f"{where}: holds no balanced question, and only those are scored.")
    return rows


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """Everything eval.py prints but the accuracies by length and by steps, and grounding; x100, two decimals. What cannot
    be computed says why in words.

    Returns: the report, and 0 or 1 for every row, NaN for unbalanced ones: they count only for consistency.
    """
    said = {row["key"]: answer for row, answer in zip(rows, answers, strict=True)}
    right = {row["key"]: float(_equal(said[row["key"]], row["truth"], scorer)) for row in rows}
    balanced = [row for row in rows if row["balanced"]]
    groups: dict[str, dict[str, list[float]]] = {"per_kind": {}, "per_structural": {}, "per_semantic": {}}
    for row in balanced:
        kind = "open" if row["structural"] == "query" else "binary"
        for name, value in (("kind", kind), ("structural", row["structural"]), ("semantic", row["semantic"])):
            groups[f"per_{name}"].setdefault(value, []).append(right[row["key"]])
    with_choices = [row for row in balanced if row["choices"] is not None]
    no_file = "not available: no choices file (--choices)"
    report: dict[str, Any] = {
        "overall": percent([right[row["key"]] for row in balanced]),
        **{name: {k: percent(found[k]) for k in sorted(found)} for name, found in groups.items()},
        "consistency": _consistency(balanced, right),
        "validity": percent([_among(said, row, "valid") for row in with_choices]) if with_choices else no_file,
        "plausibility": percent([_among(said, row, "plausible") for row in with_choices]) if with_choices else no_file,
        "distribution": _distribution(balanced, said),
        "n": len(balanced),
    }
    return report, [right[row["key"]] if row["balanced"] else math.nan for row in rows]


def _equal(prediction: str, truth: str, scorer: str) -> bool:
    return prediction == truth if scorer == "official" else normalise(prediction) == normalise(truth)


def _among(said: dict[str, str], row: dict[str, Any], which: str) -> bool:
    allowed = COMMON if "Common" in row["detailed"] else row["choices"][which]
    return said[row["key"]] in allowed


def _consistency(balanced: list[dict[str, Any]], right: dict[str, float]) -> float | str:
    """For each correct question the mean accuracy of the questions it entails, itself excluded; the mean of those."""
    found = []
    for row in balanced:
        entailed = [key for key in row["entailed"] if key != row["key"]]
        if not right[row["key"]] or not entailed:
            continue
        if missing := [key for key in entailed if key not in right]:
            return f"not available: entailed question {missing[0]} is not answered (all questions are needed)"
        found.append(sum(right[key] for key in entailed) / len(entailed))
    return percent(found) if found else "not available: no correct question entails another"


def _distribution(balanced: list[dict[str, Any]], said: dict[str, str]) -> float | str:
    """Chi-square between true and predicted answers per global group, weighted by group size, / 100; lower is better."""
    gold: dict[str, Counter[str]] = {}
    guessed: dict[str, Counter[str]] = {}
    for row in balanced:
        if row["group"] is not None:
            gold.setdefault(row["group"], Counter())[row["truth"]] += 1
            guessed.setdefault(row["group"], Counter())[said[row["key"]]] += 1
    if not gold:
        return "not available: no question has a global group"
    total = weighted = 0.0
    for group, counts in gold.items():
        chi = sum((guessed[group][answer] - n) ** 2 / n for answer, n in counts.items())
        size = sum(counts.values())
        weighted, total = weighted + chi * size, total + size
    return round(weighted / total / 100, 4)


def constant_answers(rows: list[dict[str, Any]]) -> list[str]:
    """The most frequent answer of each structural type."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["structural"], Counter())[row["truth"]] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    return [best[row["structural"]] for row in rows]
