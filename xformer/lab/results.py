"""A finished run as one small JSON: what made it, every question's score, losses, cost. It can be committed and is reused.

Scores are packed: 0 and 1 as bits, anything else as float16, both in base64, question by question within each category.
"""

import base64
import hashlib
import io
import json
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.errors import EvaluationError, SettingsError

FORMAT = "xformer ablation run 1"
UNKNOWN = "not known yet"  # stands for what only the store can tell, before it is made
PACKAGE = Path(__file__).resolve().parents[1]
# Modules that only show, convert or publish: they change no number of a run. Everything else of the package does.
SHOWS = (
    "ask", "attention", "console", "demo", "errors", "import_blip2", "import_mae", "importing", "accounting", "params",
    "operations", "pictures", "pretrained", "publish", "reference", "saved", "settings", "show", "compare", "lab/",
    "alarms", "monitor", "stopping", "trackers", "evaluation/page", "evaluation/tables",
    "evaluation/paper", "evaluation/command", "evaluation/retrieval", "evaluation/rank",
)  # fmt: skip


@cache
def code_sha256() -> str:
    """One hash of the code that decides a run's numbers; comments, docstrings and layout do not count.

    Features are made by other code (pipeline/): their arrays carry a fingerprint of what made them.
    """
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).with_suffix("").as_posix()
        if not any(name == shown or shown.endswith("/") and name.startswith(shown) for shown in SHOWS):
            digest.update(f"{name}\n{significant(file.read_text(encoding='utf-8'))}".encode())
    return digest.hexdigest()


def significant(source: str) -> str:
    """The tokens of a program that mean something: no comments, no docstrings, no layout but lines and blocks."""
    tokens = [
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (tokenize.COMMENT, tokenize.NL)
    ]
    starts, ends = (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT), (tokenize.NEWLINE, tokenize.ENDMARKER)
    words: list[str] = []
    dropped = False
    for before, token, after in zip([None, *tokens], tokens, [*tokens[1:], tokens[-1]], strict=False):
        alone = (before is None or before.type in starts) and after.type in ends
        if token.type == tokenize.STRING and alone:
            dropped = True  # a docstring, with the end of its line
            continue
        if dropped and token.type == tokenize.NEWLINE:
            dropped = False
            continue
        words.append({tokenize.INDENT: "<", tokenize.DEDENT: ">", tokenize.NEWLINE: ";"}.get(token.type, token.string))
    return " ".join(words)


def pack(values: list[float]) -> dict[str, Any]:
    """Scores [N] as text; floats keep three digits. NaN (a question that does not count) is not packed: leave it out."""
    array = np.asarray(values, np.float64)
    if np.isin(array, (0.0, 1.0)).all():
        return {"n": len(values), "bits": base64.b64encode(np.packbits(array.astype(bool)).tobytes()).decode()}
    return {"n": len(values), "float16": base64.b64encode(array.astype("<f2").tobytes()).decode()}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """float64 [N]. Raises EvaluationError where the text holds another number of scores."""
    try:
        if "bits" in packed:
            raw = np.frombuffer(base64.b64decode(packed["bits"]), np.uint8)
            values = np.unpackbits(raw, count=packed["n"]).astype(np.float64)
        else:
            values = np.frombuffer(base64.b64decode(packed["float16"]), "<f2").astype(np.float64)
        if len(values) != packed["n"]:
            raise ValueError("another number of scores")
        return values
    except (KeyError, ValueError, TypeError) as error:
        raise EvaluationError(f"packed scores are damaged: {error}.") from None


def scores_of(result: dict[str, Any], benchmark: str, part: str | None = None) -> np.ndarray:
    """Every question's score [N] of a benchmark, in an order that is the same for all runs; of one category, or all.

    A part "attr" of GQA takes every category that has it ("query/attr", "verify/attr").
    """
    parts = result["scores"].get(benchmark, {}).get("parts", {})
    names = [name for name in sorted(parts) if part is None or part == name or part in name.split("/")]
    return np.concatenate([unpack(parts[name]) for name in names]) if names else np.empty(0)


def read_results(folder: Path) -> dict[Path, dict[str, Any]]:
    """Every run's JSON in a folder by its file, sorted. Raises EvaluationError for one that is damaged."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise EvaluationError(f"{file}: not a run's JSON: {error}; remove it to run that again.") from None
        if isinstance(content, dict) and content.get("format") == FORMAT:
            if not isinstance(content.get("made_with"), dict):
                raise EvaluationError(f"{file}: does not say what it was made with; remove it to run that again.")
            found[file] = content
    return found


def refuse_mixed(found: dict[Path, dict[str, Any]]) -> None:
    """Raises EvaluationError, naming the field and two files, where runs do not belong side by side: another base, code,
    data, features or weights. Models, seeds, and what a variant changes may differ, and so may versions."""
    first: dict[str, tuple[Any, Path]] = {}
    for file, result in found.items():
        own = {f"settings.{key}" for key in _flat(result["changes"])} | {"model", "settings.seed"}
        own |= {"weights.llm"} if "settings.llm.weights" in own else set()
        own |= {"weights.text", "weights.bert"} if "settings.qformer.text" in own else set()
        for key, value in _flat(result["made_with"]).items():
            if key in own or any(key.startswith(f"{name}.") for name in own):
                continue
            there, other = first.setdefault(key, (value, file))
            if value != there:
                raise EvaluationError(
                    f"{other} and {file} were not made alike: {key} is {_short(there)} in the first and {_short(value)} "
                    "in the second; runs that are compared must share base settings, code and data."
                )


def read_result(file: Path) -> dict[str, Any] | None:
    """A run's JSON, or None where there is none. Raises EvaluationError for one that is damaged."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] == FORMAT and isinstance(content["made_with"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise EvaluationError(f"{file}: not a run's JSON; remove it to run that again.")


def read_json(file: Path, remove: Path | None = None) -> dict[str, Any]:
    """What a file of a run's folder holds. Raises EvaluationError where it is cut off or damaged; it advises to remove
    `remove`, left out the folder, whose other files are of no use then."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (ValueError, OSError):
        pass
    raise EvaluationError(f"{file}: cut off or damaged; remove {remove or file.parent} to do that part again.")


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Publishes a run's JSON, one line per entry, so that a committed file has small diffs."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in ({"format": FORMAT} | result).items()]
    publish.write_bytes(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def refuse_other(file: Path, made: dict[str, Any], want: dict[str, Any]) -> None:
    """Raises SettingsError, naming what differs, where a run was made with other settings, code, data or features.

    Where `want` says UNKNOWN, nothing is compared.
    """
    have, wanted = _flat(made), _flat(want)
    unknown = [key for key, value in wanted.items() if value == UNKNOWN]
    for key in sorted(set(have) | set(wanted)):
        if any(key == name or key.startswith(f"{name}.") for name in unknown):
            continue
        if key in have and key in wanted and have[key] != wanted[key] or (key in have) != (key in wanted):
            there, here = (_short(values.get(key)) for values in (have, wanted))
            raise SettingsError(
                f"{file} was made with other settings, code or data: {key} is {there} there and {here} here; remove it to "
                "run that again, or give another --out."
            )


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def differences(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The settings of `other` that are not those of `base`, by dotted name; the seed does not count."""
    have = _flat(base)
    return {k: v for k, v in _flat(other).items() if k != "seed" and (k not in have or have[k] != v)}


def _short(value: Any) -> str:
    return f"{value[:12]}" if isinstance(value, str) and len(value) == 64 else repr(value)
