"""Questions and answers as training pairs of stage 2 (`--task vqa`): files joined to the rows of a store by image id.

Each step asks a question with one of its annotators' answers, drawn in proportion to how many gave it: the expectation
of LAVIS's loss, which sums the losses of all distinct answers with those weights (vqa_datasets.py).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xformer.data import Cache
from xformer.errors import EvaluationError, SettingsError
from xformer.evaluation.files import need, read_json
from xformer.evaluation.vqav2 import load
from xformer.order import generator
from xformer.settings import Settings


@dataclass(frozen=True)
class Question:
    """One question; `answers` holds what each annotator said, ten texts in VQAv2."""

    key: str
    image_id: str
    text: str
    answers: tuple[str, ...]

    def drawn_answer(self, seed: int, step: int) -> str:
        """An annotator's answer, a pure function of (seed, step, question)."""
        return self.answers[int(generator(seed, "answer", step, self.key).integers(len(self.answers)))]

    def frequent_answer(self) -> str:
        return Counter(self.answers).most_common(1)[0][0]


def read_questions(questions: Path | None, annotations: Path | None) -> list[Question]:
    """VQAv2's two files, or one list of objects with image_id, question and answer, as `train/qa.json` of the shapes.

    There `answer` is a text, or a list of texts, one per annotator, as in LAVIS's vqa_train.json: what several gave is
    drawn more often, as in VQAv2's annotations.

    Raises: SettingsError where no file is named, EvaluationError where one cannot be read as such, with the entry.
    """
    if questions is None:
        raise SettingsError(
            "--task vqa needs --questions (and --annotations for VQAv2's files): what to ask and answer."
        )
    content = read_json(questions, "questions")
    if isinstance(content, list):
        where = f"--questions {questions}"
        rows = [need(row, ("image_id", "question", "answer"), where) for row in content]
        found = [
            Question(str(i), str(r["image_id"]), _text(r["question"], f"{where}: entry {i}: question"),
                     _answers(r["answer"], f"{where}: entry {i}: answer"))
            for i, r in enumerate(rows)
        ]  # fmt: skip
    elif annotations is None:
        raise SettingsError(f"--questions {questions} holds no answers; give its --annotations too.")
    else:
        rows = load(questions, annotations)
        found = [Question(str(r["key"]), str(r["image_id"]), r["question"], tuple(r["answers"])) for r in rows]
    if not found:
        raise EvaluationError(f"--questions {questions}: holds no questions.")
    return found


def _answers(given: Any, where: str) -> tuple[str, ...]:
    """What each annotator said. Raises EvaluationError for no answer, and for one that is no text."""
    if not isinstance(given, list):
        return (_text(given, where),)
    if not given:
        raise EvaluationError(f"{where} is an empty list; give at least one answer, or leave the question out.")
    return tuple(_text(one, where) for one in given)


def _text(given: Any, where: str) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise EvaluationError(f"{where} is {json.dumps(given)}, not a text; write one, or leave the question out.")
    return str(given)


def refuse_missing_images(questions: Sequence[Question], caches: list[Cache]) -> None:
    """Raises EvaluationError where a question is about an image that no store has; dead letters are had, and skipped."""
    known = set().union(*(cache.store.index.column("id")["id"].to_pylist() for cache in caches))
    missing = [q for q in questions if q.image_id not in known]
    if missing:
        where = ", ".join(str(cache.store.path) for cache in caches)
        raise EvaluationError(
            f"{len(missing):,} of {len(questions):,} questions are about images that {where} lacks (first: image "
            f"{missing[0].image_id}, question {missing[0].text!r}); extract them too, or leave those questions out."
        )


def split_questions(
    questions: Sequence[Question], caches: list[Cache], settings: Settings
) -> tuple[tuple[str, Callable[[Question], bool]], tuple[str, Callable[[Question], bool]]]:
    """The stores' split and the filter of the training and of the validation questions.

    The stores' own split decides; where none of the questions is about its validation images, as with VQAv2's training
    file on features of its training images, images are held out by the hash of their id (corpus.val_fraction).
    """
    asked = {q.image_id for q in questions}
    for cache in caches:
        table = cache.store.index.column("id", "split")
        pairs = zip(table["id"].to_pylist(), table["split"].to_pylist(), strict=True)
        if any(split == "val" and key in asked for key, split in pairs):
            return ("train", lambda q: True), ("val", lambda q: True)

    def held_out(question: Question) -> bool:
        digest = hashlib.sha256(question.image_id.encode()).digest()
        return int.from_bytes(digest[:8], "little") / 2**64 < settings.corpus.val_fraction

    return ("train", lambda q: not held_out(q)), ("train", held_out)


def rows_of_questions(
    cache: Cache, questions: Sequence[Question], wanted: Callable[[Question], bool]
) -> tuple[np.ndarray, list[str]]:
    """The store rows of the wanted questions, int64 [N], and their numbers in `questions`, as text."""
    ids = cache.store.index.column("id")["id"].to_pylist()
    place = {key: row for row, key in enumerate(ids)}
    chosen = [(place[q.image_id], str(i)) for i, q in enumerate(questions) if q.image_id in place and wanted(q)]
    return np.array([row for row, _ in chosen], np.int64), [number for _, number in chosen]
