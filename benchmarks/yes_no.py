"""How an ablation's runs answer yes/no questions: a habit of saying yes or no moves a score as much as seeing does.

    python -m benchmarks.yes_no LAB

Of each variant, over its seeds: how often yes was said, how often it was right where the truth is yes and where it is no,
and their mean, which no habit can raise above one half.
"""

import json
import sys
from pathlib import Path

import numpy as np

from xformer.console import table
from xformer.evaluation.intervals import over_seeds
from xformer.evaluation.suite import SUITE, Files
from xformer.lab.ablate import SHAPES_FILES


def truths(benchmark: str, shapes: Path) -> np.ndarray:
    """The true answer of every question, in the order in which runs answer them; "" where it is not yes or no."""
    questions, annotations = (shapes / "val" / name if name else None for name in SHAPES_FILES[benchmark])
    said = [plain(str(row["truth"])) for row in SUITE[benchmark].load(Files(questions, annotations))]
    return np.array([text if text in ("yes", "no") else "" for text in said])


def plain(text: str) -> str:
    return text.lower().strip(". ")


def main(lab: Path) -> None:
    for benchmark in ("vqav2", "gqa", "mci"):
        truth = truths(benchmark, lab / "shapes")
        runs: dict[str, list[tuple[float, ...]]] = {}
        for file in sorted(lab.glob(f"eval/*-seed*/{benchmark}.json")):
            said = np.array([plain(text) for text in json.loads(file.read_text(encoding="utf-8"))["answers"]])
            if len(said) != len(truth):
                raise SystemExit(f"{file}: answers {len(said)} of {len(truth)} questions; run xformer ablate again.")
            yes, no = truth == "yes", truth == "no"
            right = [float((said[where] == truth[where]).mean()) for where in (yes, no)]
            share, neither = (
                float(np.mean(found)) for found in (said[yes | no] == "yes", ~np.isin(said[yes | no], ("yes", "no")))
            )
            runs.setdefault(file.parent.name.rpartition("-seed")[0], []).append(
                (share, neither, *right, sum(right) / 2)
            )
        counted = int((truth != "").sum())
        title = f"{benchmark}: {counted} yes/no questions, {(truth == 'yes').sum() / counted:.2f} of them yes"
        heads = ("", "seeds", "said yes", "least", "most", "neither", "right of yes", "right of no", "mean of both")
        rows = []
        for name, each in runs.items():
            share, *others = np.mean(each, 0)
            least, most = min(e[0] for e in each), max(e[0] for e in each)
            rows.append((name, len(each), *(f"{v:.2f}" for v in (share, least, most, *others))))
        table(title, heads, rows)


def absent_kinds(lab: Path) -> None:
    """What GQA's questions for absent kinds change: X-Former minus the others with and without them."""
    from pipeline.shapes_text import ABSENT

    asked = json.loads((lab / "shapes/val/gqa_questions.json").read_text(encoding="utf-8"))
    first = np.array([int(key) < ABSENT for key in asked])
    runs: dict[str, dict[str, np.ndarray]] = {}
    for file in sorted(lab.glob("eval/*-seed*/gqa.json")):
        variant, _, seed = file.parent.name.rpartition("-seed")
        runs.setdefault(variant, {})[seed] = np.array(json.loads(file.read_text(encoding="utf-8"))["scores"], float)
    rows = []
    for variant, each in runs.items():
        seeds = sorted(set(runs["xformer"]) & set(each))
        row: list[object] = [variant, len(seeds)]
        for where in (first, first | True):
            ours, theirs = (np.stack([one[seed][where] for seed in seeds]) for one in (runs["xformer"], each))
            told = over_seeds(ours, theirs)
            row += [
                100 * float(theirs.mean()),
                "{:+.2f} ({:+.2f} to {:+.2f})".format(told["difference"], *told["interval"]),
            ]
        rows.append(row)
    heads = ("", "seeds", f"{first.sum()} questions", "X-Former minus it", f"all {len(first)}", "X-Former minus it")
    table("GQA without and with the questions for absent kinds", heads, rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    absent_kinds(Path(sys.argv[1]))
