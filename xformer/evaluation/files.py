"""Questions, annotations and results as files: JSON with or without a byte-order mark, plain or gzip."""

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError

MAX_BYTES = 4 << 30
GZIP = b"\x1f\x8b"

# What a row of each results format holds; the first match names the format in an error.
FORMATS = {
    "VQAv2, OK-VQA, OC and MCI": ("question_id", "answer"),
    "GQA": ("questionId", "prediction"),
    "captions": ("image_id", "caption"),
}


def read_json(path: Path, option: str, hook: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file; `hook` is json's object_hook.

    Raises: EvaluationError, which names the option and the file.
    """
    if not path.is_file():
        raise EvaluationError(f"--{option} {path}: there is no such file.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise EvaluationError(f"--{option} {path}: larger than {MAX_BYTES >> 30} GiB.")
        content = path.read_bytes()
        if content[:2] == GZIP:
            with gzip.open(path) as stream:
                content = stream.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise EvaluationError(f"--{option} {path}: larger than {MAX_BYTES >> 30} GiB once unpacked.")
        text = content.decode("utf-8-sig")
        del content
        return json.loads(text, object_hook=hook)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise EvaluationError(f"--{option} {path}: a damaged gzip file: {error}.") from None
    except UnicodeDecodeError:
        raise EvaluationError(f"--{option} {path}: not a JSON file: it is not UTF-8 text.") from None
    except RecursionError:
        raise EvaluationError(f"--{option} {path}: not a JSON file of this kind: nested too deep.") from None
    except ValueError as error:
        raise EvaluationError(f"--{option} {path}: not valid JSON: {error}.") from None


def format_of(content: Any) -> str | None:
    """The name of the results format that `content` is in, or None."""
    if isinstance(content, dict) and {"image_to_text", "text_to_image"} <= set(content):
        return "retrieval"
    if isinstance(content, list) and content and isinstance(content[0], dict):
        return next((name for name, keys in FORMATS.items() if set(keys) <= set(content[0])), None)
    return None


def read_results(path: Path, keys: tuple[str, str]) -> list[tuple[Any, str]]:
    """The (id, answer) pairs of a results file, a list of objects with these two keys.

    Raises: EvaluationError for another benchmark's format, an answer that is not text, or a doubled id.
    """
    content, where = read_json(path, "results"), f"--results {path}"
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        other = format_of(content)
        found = f" (this is in the format of {other})" if other else ""
        raise EvaluationError(f"{where}: must be a list of objects with {keys[0]} and {keys[1]}{found}.")
    if not content:
        raise EvaluationError(f"{where}: holds no answers.")
    for number, row in enumerate(content):
        for key in keys:
            if key not in row:
                other = format_of([row])
                found = f"; this is in the format of {other}" if other else ""
                raise EvaluationError(f"{where}: entry {number} has no {key}{found}.")
        name, answer = row[keys[0]], row[keys[1]]
        if isinstance(name, bool) or not isinstance(name, int | str):
            raise EvaluationError(f"{where}: entry {number} has the {keys[0]} {name!r}, neither a number nor text.")
        if not isinstance(answer, str):
            raise EvaluationError(f"{where}: the {keys[1]} of {keys[0]} {name!r} is {answer!r}, not text.")
    pairs = [(row[keys[0]], row[keys[1]]) for row in content]
    doubled = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if doubled:
        raise EvaluationError(
            f"{where}: {len(doubled)} questions are answered more than once (first: {doubled[0]!r}); every question needs "
            "one answer."
        )
    return pairs


def match(
    pairs: list[tuple[Any, str]],
    wanted: list[Any],
    where: str,
    allow_partial: bool = False,
    optional: frozenset[Any] = frozenset(),
) -> dict[Any, str]:
    """Answers by id, exactly those wanted.

    Args:
        allow_partial: unanswered questions are left out instead of refused.
        optional: those of `wanted` that may stay unanswered.

    Raises: EvaluationError where answers are missing, or belong to no question.
    """
    known, asked = dict(pairs), set(wanted)
    if extra := [key for key in known if key not in asked]:
        hint = "; the ids there are numbers, here text" if _only_type_differs(extra[0], asked) else ""
        raise EvaluationError(f"{where}: {len(extra)} answers belong to no question (first: {extra[0]!r}{hint}).")
    required = [key for key in wanted if key not in optional]
    missing = [key for key in required if key not in known]
    if missing and (not allow_partial or len(missing) == len(required)):
        raise EvaluationError(
            f"{where}: {len(missing)} of {len(required)} questions have no answer (first: {missing[0]!r}); answer them all, "
            "or score what is there with --allow-partial."
        )
    return known


def _only_type_differs(key: Any, asked: set[Any]) -> bool:
    return isinstance(key, str) and key.isdigit() and int(key) in asked


def need(row: Any, keys: tuple[str, ...], where: str) -> dict[str, Any]:
    """The row itself. Raises EvaluationError where it is no object with these keys."""
    if not isinstance(row, dict):
        raise EvaluationError(f"{where}: needs an object with {', '.join(keys)} where a {type(row).__name__} stands.")
    if missing := [key for key in keys if key not in row]:
        raise EvaluationError(f"{where}: {missing[0]} is missing where {', '.join(keys)} are needed.")
    return row


def unique(ids: list[Any], what: str, where: str) -> None:
    """Raises EvaluationError where an id stands twice."""
    if doubled := [key for key, count in Counter(ids).items() if count > 1]:
        raise EvaluationError(f"{where}: {len(doubled)} {what} stand twice (first: {doubled[0]!r}).")
