"""The evaluator of VQAv2 and OK-VQA: the official one (GT-Vision-Lab/VQA, vqaEval.py) and LAVIS's older copy of it.

`official` normalises prediction and ground truth, but only where the ten answers are not all the same. `lavis`
(lavis/common/vqa_tools/vqa_eval.py, used for BLIP-2 and so for the paper's tables) always normalises the prediction, and
strips only punctuation from the truth, that too only where the ten answers are not all the same.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError
from xformer.evaluation.files import need, read_json, unique

PUNCTUATION = [*';/[]"{}()=+\\_-><@`,?!']
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
MAX_PERIODS = 32  # the official call passes re.UNICODE (32) where re.sub expects a count

# Written without their apostrophes in answers; the evaluator puts these back.
_ONE = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've "
    "isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't "
    "somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd "
    "they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd "
    "who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've 'twas"
).split()
# Two apostrophes, one of which may be missing.
_TWO = (
    "couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've "
    "something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've"
).split()
CONTRACTIONS = {word.replace("'", ""): word for word in _ONE}
for _word in _TWO:
    _first, _second = (i for i, c in enumerate(_word) if c == "'")
    CONTRACTIONS[_word[:_first] + _word[_first + 1 :]] = _word
    CONTRACTIONS[_word[:_second] + _word[_second + 1 :]] = _word
CONTRACTIONS |= {
    "let's": "let's", "she's": "she's", "somebody'd": "somebodyd",  # reversed in the original
    "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've",
}  # fmt: skip


def strip_punctuation(text: str) -> str:
    """Punctuation goes where it touches a space or the text holds digit,digit; else it becomes a space."""
    digits = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if touches or digits else " ")
    return re.sub(r"\.(?!\d)", "", out, count=MAX_PERIODS)


def normalise_words(text: str) -> str:
    """Lower case; number words become digits, articles go, contractions get their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def clean(text: str) -> str:
    """Newlines and tabs become spaces (vqaEval.py does so before anything else)."""
    return text.replace("\n", " ").replace("\t", " ").strip()


_strip_punctuation = lru_cache(maxsize=1 << 18)(strip_punctuation)


@lru_cache(maxsize=1 << 18)
def normalise(text: str) -> str:
    """The whole normalisation, in the evaluator's order."""
    return normalise_words(strip_punctuation(clean(text)))


def score_question(prediction: str, answers: list[str], scorer: str) -> float:
    """One question, 0..1: the mean over annotators of min(1, matches among the others / 3).

    Args:
        scorer: "official" or "lavis".
    """
    if scorer == "lavis":
        truths = map(_strip_punctuation, answers) if len(set(answers)) > 1 else answers
        matches = sum(truth == normalise(prediction) for truth in truths)
    else:
        cleaned = [clean(a) for a in answers]
        if len(set(cleaned)) > 1:
            matches = sum(normalise(a) == normalise(prediction) for a in answers)
        else:
            matches = len(answers) * (cleaned[0] == clean(prediction))
    others = matches * min(1.0, (matches - 1) / 3) + (len(answers) - matches) * min(1.0, matches / 3)
    return others / len(answers)


SCORERS = ("official", "lavis")


def score(rows: list[dict[str, Any]], answers: list[str], scorer: str) -> tuple[dict[str, Any], list[float]]:
    """Scores `answers[i]` to question `rows[i]`, x100, two decimals, overall and per answer and question type.

    Returns: the report, and every question's score, 0..1.
    """
    each = [score_question(answer, row["answers"], scorer) for row, answer in zip(rows, answers, strict=True)]
    by_answer: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for row, value in zip(rows, each, strict=True):
        by_answer.setdefault(row["answer_type"], []).append(value)
        by_question.setdefault(row["question_type"], []).append(value)
    report = {
        "overall": percent(each),
        "per_answer_type": {k: percent(by_answer[k]) for k in sorted(by_answer)},
        "per_question_type": {k: percent(by_question[k]) for k in sorted(by_question)},
        "n": len(each),
        "n_per_answer_type": {k: len(by_answer[k]) for k in sorted(by_answer)},
    }
    return report, each


def percent(values: list[float] | list[bool]) -> float:
    """The mean x100, two decimals."""
    return round(100 * sum(values) / len(values), 2) if values else 0.0


def constant_answers(rows: list[dict[str, Any]]) -> list[str]:
    """The most frequent answer of each answer type: what a model that never looks can reach."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        counts.setdefault(row["answer_type"], Counter())[row["truth"]] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    return [best[row["answer_type"]] for row in rows]


def _only_the_answer(found: dict) -> Any:
    """Keeps one shared string of each annotator's answer object: two million objects would take a gigabyte."""
    answer = found.get("answer")
    return sys.intern(answer) if isinstance(answer, str) and "question_id" not in found else found


def load(questions: Path, annotations: Path, name_type: Callable[[dict, dict], str]) -> list[dict[str, Any]]:
    """Questions with their ten answers, in the order of the annotations.

    Args:
        name_type: (the annotation file, a row) -> the name of the row's question type.

    Raises: EvaluationError for a wrong format, ids that differ, or a question without ten answers.
    """
    asked_file, truth_file = f"--questions {questions}", f"--annotations {annotations}"
    content = need(read_json(questions, "questions"), ("questions",), asked_file)["questions"]
    truths = need(read_json(annotations, "annotations", _only_the_answer), ("annotations",), truth_file)
    if not isinstance(content, list) or not isinstance(truths["annotations"], list):
        raise EvaluationError(f"{asked_file}: questions and annotations must be lists, as in the VQA format.")
    unique([need(row, ("question_id", "image_id", "question"), asked_file)["question_id"] for row in content],
           "question ids", asked_file)  # fmt: skip
    asked = {row["question_id"]: row["question"] for row in content}
    rows = []
    for row in truths["annotations"]:
        need(row, ("question_id", "image_id", "answers", "answer_type", "question_type"), truth_file)
        given = row["answers"]
        if not isinstance(given, list) or len(given) != 10 or not all(isinstance(a, str) for a in given):
            count = len(given) if isinstance(given, list) else 0
            raise EvaluationError(
                f"{truth_file}: question {row['question_id']!r} needs ten answers that are text; it has {count} entries."
            )
        rows.append(
            {
                "key": row["question_id"],
                "image_id": row["image_id"],
                "question": asked.get(row["question_id"], ""),
                "answers": given,
                "answer_type": sys.intern(str(row["answer_type"])),
                "question_type": sys.intern(name_type(truths, row)),
                "category": sys.intern(str(row["answer_type"])),
                "truth": str(row.get("multiple_choice_answer") or Counter(given).most_common(1)[0][0]),
            }
        )
    unique([row["key"] for row in rows], "question ids", truth_file)
    if differ := set(asked) ^ {row["key"] for row in rows}:
        raise EvaluationError(
            f"{asked_file} and {truth_file} do not hold the same questions: {len(differ)} stand in only one of them "
            f"(first: {min(differ, key=str)!r})."
        )
    return rows
