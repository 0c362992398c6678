"""The paper's comparisons as claims, and what a set of runs says about each: holds, does not hold, undecided.

The rule was fixed before any run over five seeds was looked at (docs/lab.md, 2026-11-25), and applies to every row alike:

  * Scores are compared per question, over the seeds that both systems have, with the interval of intervals.over_seeds:
    which seeds were drawn and which questions were asked both count as chance. p is the larger one of two: Student's t
    with that interval's variance and degrees of freedom, and the paired randomisation test over questions, which takes
    the trained models as given. The p of all predefined "above" rows are corrected together (Holm 1979); a row that was
    not run counts there with p = 1, so that running less makes no claim easier.
  * "A above B" holds where the whole 95% interval lies above 0 and the corrected p is below 0.05. It does not hold where
    the whole interval lies below WORTH, the smallest difference that would matter. Otherwise it is undecided. The three
    are asked in this order.
  * "A as good as B" (Table 4) holds where the whole interval lies above -HARM, and does not hold where it lies below.
  * With fewer than MIN_SEEDS seeds nothing is decided, whatever the numbers are.

What stands beside the claims (explore) was not predefined: its p are corrected among themselves and decide nothing. A
score of yes/no questions moves with how often a model says yes (python -m benchmarks.yes_no), as much as with what it sees.
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

TINY_BLOCKS, PAPER_BLOCKS = (2, 3, 4), (26, 28, 30)  # of Table 5, in the two presets

CONTROLS = (  # on VQAv2: the first minus the second
    ("xformer", "masked-concat", "X-Former minus concatenation under the same masks"),
    ("no-reconstruction", "concat", "X-Former on whole images minus concatenation"),
    ("whole-in-stage2", "xformer", "Stage 2 and answers on whole images minus on masked ones"),
    ("layerwise", "xformer", "BLIP-2's ITG, which does not read Z', minus X-Former's"),
    ("one-draw", "xformer", "Always the same mask of an image minus one per epoch"),
)

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
    """The comparisons of the paper, and the controls: the same list whatever was run, with the CLIP blocks of the paper
    preset where one of those was run and else those of the tiny one."""
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
    blocks = PAPER_BLOCKS if any(f"clip-{block}" in variants for block in PAPER_BLOCKS) else TINY_BLOCKS
    for block, theirs in zip(blocks, (53.7, 52.5, 52.4), strict=True):
        text = f"MAE tokens above those of CLIP block {block} on VQAv2"
        found.append(Claim("Table 5", text, x, f"clip-{block}", "vqav2", None, paper=(55.0, theirs)))
    whole = "Masks and reconstruction help on VQAv2 (against whole images)"
    found += [
        Claim("Table 6", whole, x, "no-reconstruction", "vqav2"),
        Claim(
            "Table 6", "Reconstruction in stage 2 harms on VQAv2", x, "reconstruction-in-stage2", "vqav2", paper=(55.0, 52.4)
        ),
        Claim("Sec. 4", "Queries differ more (Q-Former's cosine minus X-Former's)", x, q, "diversity"),
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
    _correct([row for row in rows if row["kind"] == "above"])
    for row in rows:
        row["verdict"], row["why"] = verdict(row)
    return rows


def explore(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as judge's, without verdicts: X-Former minus Q-Former by structural and semantic type of GQA (Table 2, Fig. 5),
    and X-Former against the controls that no claim reads."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        runs.setdefault(result["variant"], {})[result["seed"]] = result
    parts = [
        sorted({p.split("/")[i] for r in results for p in r["scores"].get("gqa", {}).get("parts", {}) if "/" in p})
        for i in (0, 1)
    ]
    rows = []
    for kind, names in zip(("structural", "semantic"), parts, strict=True):
        for name in names:
            rows.append(Claim("Table 2", f"GQA {name} ({kind})", "xformer", "qformer", "gqa", name))
    families = [rows, [Claim("control", text, better, worse, "vqav2") for better, worse, text in CONTROLS]]
    found: list[dict[str, Any]] = []
    for family in families:
        told = []
        for claim in family:
            row = {"source": claim.source, "claim": claim.text, "benchmark": claim.benchmark, "part": claim.part}
            told.append(row | compare(claim, runs.get(claim.better, {}), runs.get(claim.worse, {})))
        _correct(told)
        found += told
    return found


def _correct(family: list[dict[str, Any]]) -> None:
    """Adds `p_holm` to the measured rows of a family; the others count with p = 1."""
    for row, p in zip(family, holm([row.get("p", 1.0) for row in family]), strict=True):
        if "p" in row:
            row["p_holm"] = p


def compare(claim: Claim, ours: dict[int, dict], theirs: dict[int, dict]) -> dict[str, Any]:
    """The numbers of one claim, or `missing` with the reason why there are none."""
    common = sorted(set(ours) & set(theirs))
    if not common:
        absent = [name for name, runs in ((claim.better, ours), (claim.worse, theirs)) if not runs]
        return {"seeds": [], "missing": f"not run: {', '.join(absent)}" if absent else "no seed in common"}
    pairs = {seed: [scores_of(runs[seed], claim.benchmark, claim.part) for runs in (ours, theirs)] for seed in common}
    seeds = [seed for seed, pair in pairs.items() if all(map(len, pair))]
    if not seeds:
        told = (
            run["scores"].get(claim.benchmark, {}).get("missing") for runs in (ours, theirs) for run in runs.values()
        )
        nothing = f"no questions of {claim.benchmark} {claim.part or ''}".strip()
        return {"seeds": common, "missing": next(filter(None, told), nothing)}
    stacks = [[pairs[seed][side] for seed in seeds] for side in (0, 1)]
    if len({len(e) for stack in stacks for e in stack}) > 1:
        return {"seeds": seeds, "missing": "the runs answered different questions"}
    a, b = (claim.sign * np.stack(stack) for stack in stacks)
    means = {"ours": round(100 * float(np.mean(stacks[0])), 2), "theirs": round(100 * float(np.mean(stacks[1])), 2)}
    found = over_seeds(a, b)
    found["p_questions"] = found["p"]
    found["p"] = max(found["p"], round(p_of_mean(a - b), 4))
    counts = {"questions_better": found.pop("better"), "questions_worse": found.pop("worse")}
    return {"seeds": seeds} | means | found | counts


def p_of_mean(differences: np.ndarray) -> float:
    """The two-sided p of the mean of [seeds, N] being 0, with the variance and degrees of intervals.seeded_mean: it is
    0.05 where that interval just reaches 0."""
    degrees, error = spread_of_mean(differences)
    if not error:
        return float(differences.mean() == 0)
    # Student's t by x = sqrt(degrees) tan(angle), whose density is cos(angle) ** (degrees - 1)
    angle = np.arctan(abs(float(differences.mean())) / error / degrees**0.5)
    weights = [np.cos(np.linspace(start, np.pi / 2, 20_001)) ** (degrees - 1) for start in (angle, 0.0)]
    spans = (np.pi / 2 - angle, np.pi / 2)
    beyond, whole = (float(np.trapezoid(w)) * span for w, span in zip(weights, spans, strict=True))
    return float(beyond / whole)


def spread_of_mean(values: np.ndarray) -> tuple[int, float]:
    """Degrees of freedom and standard error of the mean of [seeds, N], as in intervals.seeded_mean."""
    seeds, n = values.shape
    of_questions = float(values.mean(0).var(ddof=1)) / n if n > 1 else 0.0
    if seeds == 1:
        return 10_000, of_questions**0.5
    of_seeds = float(values.mean(1).var(ddof=1)) / seeds
    left = values - values.mean(1)[:, None] - values.mean(0) + values.mean()
    twice = float((left**2).sum()) / max(1, (seeds - 1) * (n - 1)) / (seeds * n)
    variance = max(of_seeds, of_questions, of_seeds + of_questions - twice)
    parts = of_seeds**2 / (seeds - 1) + of_questions**2 / max(1, n - 1)
    return min(10_000, max(seeds - 1, int(variance**2 / parts) if parts else 0)), float(variance) ** 0.5


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
        p = f"paired p = {row['p']:.4f}, which decides nothing here"
        if low > -HARM:
            return HOLDS, f"the interval lies above -{HARM:g}; {p}"
        if high < -HARM:
            return FAILS, f"the interval lies below -{HARM:g}; {p}"
        return UNDECIDED, f"the interval is too wide; {p}"
    if low > 0 and row["p_holm"] < ALPHA:
        return HOLDS, f"the interval lies above 0, corrected p = {row['p_holm']:.4f}"
    if high < 0:
        return FAILS, "the interval lies below 0"
    if high < WORTH:
        return FAILS, f"the interval lies below {WORTH:g}, the smallest difference that matters"
    if low > 0:
        return UNDECIDED, f"the interval lies above 0, but the corrected p = {row['p_holm']:.4f}"
    return UNDECIDED, "the interval holds 0 and differences that matter"
