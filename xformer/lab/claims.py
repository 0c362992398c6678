"""The paper's comparisons as claims, and what a set of runs says about each: holds, does not hold, undecided.

The rule was fixed before any run was looked at, and applies to every row alike:

  * Scores are compared per question, over the seeds that both systems have, with the interval of intervals.over_seeds
    (seeds and questions both count as chance) and the paired randomisation test over questions. The p-values of all
    rows that could be computed are corrected together (Holm 1979).
  * "A above B" holds where the whole 95% interval lies above 0 and the corrected p is below 0.05. It does not hold where
    the whole interval lies below WORTH, the smallest difference that would matter. Otherwise it is undecided.
  * "A as good as B" (Table 4) holds where the whole interval lies above -HARM, and does not hold where it lies below.
  * With fewer than MIN_SEEDS seeds nothing is decided, whatever the numbers are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from xformer.evaluation.intervals import over_seeds
from xformer.lab.results import scores_of

ALPHA = 0.05
WORTH = 1.0  # points of accuracy, or hundredths of a cosine
HARM = 2.0  # CIDEr x 100
MIN_SEEDS = 5

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Claim:
    """`better` scores above `worse` on a benchmark (`part` of it), or, for `kind` "unharmed", as well as it."""

    source: str
    text: str
    better: str
    worse: str
    benchmark: str
    part: str | None = None
    kind: str = "above"
    paper: tuple[float, float] | None = None  # the paper's own figures of both, with other data and sizes

    @property
    def sign(self) -> int:
        """-1 where a lower value is the better one: the cosine of the queries."""
        return -1 if self.benchmark == "diversity" else 1


def predefined(variants: list[str]) -> list[Claim]:
    """The comparisons of the paper, and the controls; Table 5 takes every variant whose name begins with clip-."""
    q, x = "qformer", "xformer"
    found = [
        Claim("Table 1", "X-Former above the Q-Former on VQAv2", x, q, "vqav2", None, paper=(51.3, 49.9)),
        Claim("Table 1", "... on yes/no questions", x, q, "vqav2", "yes/no"),
        Claim("Table 1", "... on number questions", x, q, "vqav2", "number"),
        Claim("Table 1", "... on other questions", x, q, "vqav2", "other"),
        Claim("Table 2", "X-Former above the Q-Former on GQA", x, q, "gqa", None, paper=(34.9, 33.1)),
        Claim("Table 3", "X-Former above the Q-Former on object counting", x, q, "oc", None, paper=(39.64, 25.88)),
        Claim("Table 3", "X-Former above the Q-Former on MCI", x, q, "mci", None, paper=(69.44, 61.5)),
        Claim("Table 4", "Captioning as good as the Q-Former's (CIDEr)", x, q, "coco-caption", None, "unharmed"),
    ]
    for other, name in (("concat", "concatenation"), ("early", "early cross-attention")):
        found += [
            Claim("Fig. 2", f"X-Former above {name} on {title}", x, other, benchmark)
            for benchmark, title in (("vqav2", "VQAv2"), ("gqa", "GQA"), ("oc", "object counting"))
        ]
    theirs = iter((53.7, 52.5, 52.4))
    for name in (v for v in variants if v.startswith("clip-")):
        ours = next(theirs, None)
        text = f"MAE tokens above those of CLIP block {name.removeprefix('clip-')} on VQAv2"
        found.append(Claim("Table 5", text, x, name, "vqav2", None, paper=(55.0, ours) if ours else None))
    found += [
        Claim("Table 6", "Reconstruction in stage 1 helps on VQAv2", x, "no-reconstruction", "vqav2"),
        Claim(
            "Table 6", "Reconstruction in stage 2 harms on VQAv2", x, "reconstruction-in-stage2", "vqav2", paper=(55.0, 52.4)
        ),
        Claim("Sec. 4", "Queries differ more than the Q-Former's (cosine)", x, q, "diversity"),
        Claim("control", "X-Former above a Q-Former of the same size on VQAv2", x, "wide-qformer", "vqav2"),
        Claim("control", "X-Former above a Q-Former of the same size on object counting", x, "wide-qformer", "oc"),
    ]  # fmt: skip
    return found


def judge(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per predefined claim: its numbers where both systems were run, and its verdict."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        runs.setdefault(result["variant"], {})[result["seed"]] = result
    rows = []
    for claim in predefined(list(runs)):
        row = {
            "source": claim.source, "claim": claim.text, "better": claim.better, "worse": claim.worse,
            "benchmark": claim.benchmark, "part": claim.part, "kind": claim.kind, "paper": claim.paper,
        }  # fmt: skip
        rows.append(row | compare(claim, runs.get(claim.better, {}), runs.get(claim.worse, {})))
    measured = [row for row in rows if "p" in row]
    for row, p in zip(measured, holm([row["p"] for row in measured]), strict=True):
        row["p_holm"] = p
    for row in rows:
        row["verdict"], row["why"] = verdict(row)
    return rows


def compare(claim: Claim, ours: dict[int, dict], theirs: dict[int, dict]) -> dict[str, Any]:
    """The numbers of one claim, or `missing` with the reason why there are none."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        absent = [name for name, runs in ((claim.better, ours), (claim.worse, theirs)) if not runs]
        return {"seeds": [], "missing": f"not run: {', '.join(absent)}" if absent else "no seed in common"}
    stacks = []
    for runs in (ours, theirs):
        reason = next((r["scores"].get(claim.benchmark, {}).get("missing") for r in runs.values()), None)
        each = [scores_of(runs[seed], claim.benchmark, claim.part) for seed in seeds]
        if not all(len(e) for e in each):
            return {
                "seeds": seeds,
                "missing": reason or f"no questions of {claim.benchmark} {claim.part or ''}".strip(),
            }
        stacks.append(each)
    if len({len(e) for stack in stacks for e in stack}) > 1:
        return {"seeds": seeds, "missing": "the runs answered different questions"}
    a, b = (claim.sign * np.stack(stack) for stack in stacks)
    means = {"ours": round(100 * float(np.mean(stacks[0])), 2), "theirs": round(100 * float(np.mean(stacks[1])), 2)}
    found = over_seeds(a, b)
    counts = {"questions_better": found.pop("better"), "questions_worse": found.pop("worse")}
    return {"seeds": seeds} | means | found | counts


def holm(values: list[float]) -> list[float]:
    """Holm's step-down correction of p-values, in the same order."""
    order = np.argsort(values, kind="stable")
    found, worst = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        worst = max(worst, min(1.0, values[place] * (len(values) - rank)))
        found[place] = round(worst, 4)
    return found


def verdict(row: dict[str, Any]) -> tuple[str, str]:
    """The rule of this file's head on one row: the verdict, and what decided it."""
    if "missing" in row:
        return UNDECIDED, row["missing"]
    if len(row["seeds"]) < MIN_SEEDS:
        return UNDECIDED, f"{len(row['seeds'])} of the {MIN_SEEDS} seeds that a verdict needs"
    low, high = row["interval"]
    if row["kind"] == "unharmed":
        if low > -HARM:
            return HOLDS, f"the interval lies above -{HARM:g}"
        return (
            (FAILS, f"the interval lies below -{HARM:g}") if high < -HARM else (UNDECIDED, "the interval is too wide")
        )
    if low > 0:
        if row["p_holm"] < ALPHA:
            return HOLDS, f"the interval lies above 0, corrected p = {row['p_holm']:.4f}"
        return UNDECIDED, f"the interval lies above 0, but the corrected p = {row['p_holm']:.4f}"
    if high < 0:
        return FAILS, "the interval lies below 0"
    if high < WORTH:
        return FAILS, f"the interval lies below {WORTH:g}, the smallest difference that matters"
    return UNDECIDED, "the interval holds 0 and differences that matter"
