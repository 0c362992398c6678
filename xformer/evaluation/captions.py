"""Caption metrics as COCO's evaluation computes them (github.com/cocodataset/cocoapi; pycocoevalcap 1.2): BLEU 1-4, METEOR,
ROUGE-L, CIDEr, SPICE, each by pycocoevalcap's own scorer, one by one, because its `evaluate()` downloads models.
"""

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from xformer.errors import EvaluationError

Texts = dict[int, list[str]]
PTB, REGULAR = "PTB tokeniser (Java)", "regular-expression tokeniser"
# What PTBTokenizer's wrapper in pycocoevalcap drops after tokenising.
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
WORDS = re.compile(
    r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|(?:[^\W\d_]\.){2,}|\d+(?:[.,:/]\d+)+|\w+(?:[-/]\w+)*|\.\.\.|--|[^\w\s]"
)


def tokenise(captions: Texts) -> tuple[Texts, str, str]:
    """Captions -> tokens joined by spaces; the tokeniser that was used; and why, where it is not the official one."""
    flat = {key: [{"caption": " ".join(text.split())} for text in texts] for key, texts in captions.items()}
    reason = "java is not on the PATH"
    if shutil.which("java"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # type: ignore[import-not-found]

        try:
            found = PTBTokenizer().tokenize(flat)
            if {k: len(v) for k, v in found.items()} == {k: len(v) for k, v in captions.items()}:
                return found, PTB, ""
            reason = "java's tokeniser did not return one line per caption"
        except (OSError, UnicodeDecodeError) as error:
            reason = f"java's tokeniser failed: {error}"
    plain = {k: [tokenise_plainly(row["caption"]) for row in rows] for k, rows in flat.items()}
    return plain, REGULAR, reason


def tokenise_plainly(text: str) -> str:
    """Close to the PTB tokeniser with -lowerCase: contractions split, punctuation dropped, hyphenated words kept."""
    return " ".join(word for word in WORDS.findall(text.lower()) if word not in DROPPED and word not in '()[]{}"“”')


NAMES = ("BLEU", "METEOR", "ROUGE-L", "CIDEr", "SPICE")


def score_captions(references: Texts, captions: Texts, names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """The named metrics of `captions` (one each) against `references`, as fractions, with every caption's values.

    CIDEr's document frequencies come from these references: the score of a subset is not comparable with the whole.

    Returns: {"metrics": {name: float or "not available: why"}, "each": {name: [N]}, "tokeniser", "tokeniser_reason"}.
    """
    _require_pycocoevalcap()
    from pycocoevalcap.bleu.bleu import Bleu  # type: ignore[import-not-found]
    from pycocoevalcap.cider.cider import Cider  # type: ignore[import-not-found]
    from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-not-found]

    joined, tokeniser, reason = tokenise(
        {**{2 * k: v for k, v in references.items()}, **{2 * k + 1: v for k, v in captions.items()}}
    )
    truth, given = {k: joined[2 * k] for k in references}, {k: joined[2 * k + 1] for k in captions}
    metrics: dict[str, Any] = {}
    each: dict[str, list[float]] = {}
    if "BLEU" in names:
        bleu, bleus = Bleu(4).compute_score(truth, given, verbose=0)
        for i in range(4):
            metrics[f"BLEU-{i + 1}"], each[f"BLEU-{i + 1}"] = float(bleu[i]), [float(v) for v in bleus[i]]
    scorers: dict[str, Callable] = {
        "METEOR": _meteor,
        "ROUGE-L": Rouge().compute_score,
        "CIDEr": Cider().compute_score,
        "SPICE": _spice,
    }
    for name in (name for name in scorers if name in names):
        value, values = scorers[name](truth, given)
        metrics[name] = value if isinstance(value, str) else float(value)
        each[name] = [float(v) for v in values]
    return {"metrics": metrics, "each": each, "tokeniser": tokeniser, "tokeniser_reason": reason}


def _require_pycocoevalcap() -> None:
    try:
        import pycocoevalcap.cider.cider  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise EvaluationError(
            "caption scores need pycocoevalcap, which is not installed; run: pip install 'xformer-mllm[captions]'."
        ) from None


@lru_cache(maxsize=1)
def _meteor_program() -> Any:
    """METEOR's Java program, started once: it takes seconds to read its paraphrases."""
    from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[import-not-found]

    return Meteor()


def _meteor(truth: Texts, given: Texts) -> tuple[float | str, list[float]]:
    if not shutil.which("java"):
        return "not available: java is not on the PATH", []
    try:
        return _meteor_program().compute_score(truth, given)
    except (OSError, ValueError) as error:
        _meteor_program.cache_clear()
        return f"not available: its Java program failed: {error}", []


def _spice(truth: Texts, given: Texts) -> tuple[float | str, list[float]]:
    """SPICE only where its CoreNLP jars lie already: its own class would download them."""
    import pycocoevalcap.spice  # type: ignore[import-not-found]

    jars = Path(pycocoevalcap.spice.__path__[0]) / "lib"
    wanted = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    if missing := [name for name in wanted if not (jars / name).is_file()]:
        return f"not available: {missing[0]} is not in {jars}", []
    if not shutil.which("java"):
        return "not available: java is not on the PATH", []
    from pycocoevalcap.spice.spice import Spice  # type: ignore[import-not-found]

    try:
        value, values = Spice().compute_score(truth, given)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"not available: its Java program failed: {error}", []
    return value, [v["All"]["f"] for v in values]
