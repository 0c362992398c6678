"""VQAv2 scoring: the official evaluator (GT-Vision-Lab/VQA, vqaEval.py) and LAVIS's older copy of it.

`official` normalises prediction and ground truth, but only where the ten answers are not all the same. `lavis` (used
for BLIP-2, and so for the paper's tables) always normalises the prediction and strips only punctuation from the truth.
"""

import re
from collections import Counter
from typing import Any

from xformer.errors import EvaluationError

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
    return text.replace("\n", " ").replace("\t", " ").strip()


def score_question(prediction: str, answers: list[str], scorer: str) -> float:
    """One question, 0..1: the mean over annotators of min(1, matches among the others / 3).

    Args:
        scorer: "official" or "lavis".
    """
    prediction, answers = clean(prediction), [clean(a) for a in answers]
    if scorer == "lavis":
        prediction = normalise_words(strip_punctuation(prediction))
        answers = [strip_punctuation(a) for a in answers]
    elif len(set(answers)) > 1:
        prediction = normalise_words(strip_punctuation(prediction))
        answers = [normalise_words(strip_punctuation(a)) for a in answers]
    matches = sum(a == prediction for a in answers)
    return sum(min(1.0, (matches - (a == prediction)) / 3) for a in answers) / len(answers)


SCORERS = ("official", "lavis")


def score(results: list[dict[str, Any]], annotations: list[dict[str, Any]], scorer: str) -> dict[str, Any]:
    """Scores results [{question_id, answer}] against annotations, x100, two decimals, per answer and question type.

    Raises: EvaluationError where the ids are not exactly those of the annotations.
    """
    given = [row["question_id"] for row in results]
    wanted = {row["question_id"] for row in annotations}
    if len(set(given)) != len(given):
        doubled = next(i for i, n in Counter(given).items() if n > 1)
        raise EvaluationError(f"question {doubled} is answered more than once; every question needs one answer.")
    if missing := wanted - set(given):
        raise EvaluationError(
            f"{len(missing)} of {len(wanted)} questions have no answer (first: {min(missing, key=str)}); answer them all, "
            "or score what is there with --allow-partial."
        )
    if extra := set(given) - wanted:
        raise EvaluationError(f"{len(extra)} answers belong to no question (first: {min(extra, key=str)}).")
    predictions = {row["question_id"]: str(row["answer"]) for row in results}
    everything: list[float] = []
    by_answer: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for row in annotations:
        answers = [str(a["answer"]) for a in row["answers"]]
        value = score_question(predictions[row["question_id"]], answers, scorer)
        everything.append(value)
        by_answer.setdefault(row["answer_type"], []).append(value)
        by_question.setdefault(row["question_type"], []).append(value)
    return {
        "overall": _percent(everything),
        "per_answer_type": {k: _percent(by_answer[k]) for k in sorted(by_answer)},
        "per_question_type": {k: _percent(by_question[k]) for k in sorted(by_question)},
        "n": len(everything),
        "n_per_answer_type": {k: len(by_answer[k]) for k in sorted(by_answer)},
    }


def _percent(values: list[float]) -> float:
    return round(100 * sum(values) / len(values), 2) if values else 0.0


def constant_answers(annotations: list[dict[str, Any]]) -> dict[str, str]:
    """The most frequent answer of each answer type: what a model that never looks can reach."""
    counts: dict[str, Counter[str]] = {}
    for row in annotations:
        counts.setdefault(row["answer_type"], Counter())[row["multiple_choice_answer"]] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
