"""The end of an ablation: scores, claims with verdicts, and what the cache saved, as tables and as JSON."""

from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.console import duration, say, table
from xformer.evaluation.intervals import student
from xformer.lab import baselines, encoding
from xformer.lab.claims import explore, judge
from xformer.lab.results import read_results
from xformer.local import Phase
from xformer.settings import settings_from

Result = dict[str, Any]


def summarise(out: Path, asked: int) -> dict[str, Any]:
    """Prints and writes OUT/summary.json over all finished runs of OUT; `asked`: how many this call was asked for."""
    results, stores = list(read_results(out / "results").values()), encoding.known(out, out / "results")
    if stores:
        publish.write_json(out / "results" / encoding.FILE, stores)
    report: dict[str, Any] = {
        "runs": len(results),
        "asked": asked,
        "seeds": sorted({result["seed"] for result in results}),
        "scores": score_rows(results, baselines.read(out / "results")),
        "claims": judge(results),
        "explored": explore(results),
        "cost": cost(results, stores),
    }
    publish.write_json(out / "summary.json", report)
    show(report, out)
    return report


def score_rows(results: list[Result], systems: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By system and benchmark: the mean over seeds, half the width of its 95% interval, how many seeds and questions.

    The interval is over seeds only (Student's t); systems without seeds and variants with one seed have none.
    """
    found: dict[str, dict[str, Any]] = {}
    for system, scores in systems.items():
        found[system] = {name: {"mean": value["overall"], "half": None} for name, value in scores.items()}
    for variant in dict.fromkeys(result["variant"] for result in results):
        mine = [result for result in results if result["variant"] == variant]
        for name in dict.fromkeys(name for result in mine for name in result["scores"]):
            have = [r["scores"][name] for r in mine if "overall" in r["scores"].get(name, {})]
            if have:
                more = {"seeds": len(have), "n": have[0]["n"]}
                found.setdefault(variant, {})[name] = mean_and_half([scores["overall"] for scores in have]) | more
    return found


def mean_and_half(values: list[float]) -> dict[str, Any]:
    """The mean and half its 95% interval over seeds; None with one seed."""
    half = None
    if len(values) > 1:
        half = round(student(len(values) - 1) * float(np.std(values, ddof=1)) / len(values) ** 0.5, 2)
    return {"mean": round(float(np.mean(values)), 2), "half": half}


def cost(results: list[Result], stores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Measured seconds of training and evaluation, and of encoding once against encoding inside every run.

    Online seconds are estimated: images that the runs read, times the measured seconds per image of each encoder. In
    evaluation an image counts once per benchmark. A stage 1 that variants share counts once on both sides.

    Args:
        stores: encoding.known; {}: encoding is not counted.
    """
    phases = {"stage 1": 0.0, "stage 2": 0.0, "evaluation": 0.0}
    online: float | None = 0.0
    seen: set[str] = set()
    for result in results:
        used = result["cost"]
        counted: dict[Phase, int] = dict(used.get("images", {}))
        if used["stage1_run"] in seen:
            counted["stage1"] = 0
        else:
            phases["stage 1"] += used["stage1_seconds"]
        seen.add(used["stage1_run"])
        phases["stage 2"] += used["stage2_seconds"]
        phases["evaluation"] += used["evaluation_seconds"]
        if stores and online is not None:
            settings = settings_from(result["made_with"]["settings"], result["variant"])
            one = encoding.online_seconds(settings, result["model"], stores, counted)
            online = None if one is None else online + one
    if not stores or online is None:
        return {"runs": len(results), "seconds": phases, "note": "the store is not here: encoding is not counted"}
    once, rest = sum(seconds["once"] for seconds in stores.values()), sum(phases.values())
    return {
        "runs": len(results),
        "seconds": {"encoding, once": round(once, 1)} | {name: round(value, 1) for name, value in phases.items()},
        "encoding_seconds_once": round(once, 1),
        "encoding_online_seconds": round(online, 1),
        "saved_seconds": round(online - once, 1),
        "ratio": round((rest + online) / (rest + once), 2) if rest + once else None,
        "clip_passes": round(max(seconds["clip_passes"] for seconds in stores.values()), 1),
    }


def saving(spent: dict[str, Any]) -> str:
    """What the cache saved, as a sentence; nothing where it is not known."""
    if not spent.get("ratio"):
        return ""
    passes = spent.get("clip_passes", 1.0)
    ran = (
        "ran once"
        if passes <= 1
        else f"ran {passes:g} times over the images (its blocks were cached at different times)"
    )
    saved = spent["saved_seconds"]
    changed = f"the cache {'saved' if saved >= 0 else 'cost'} {duration(abs(saved))}"
    return (
        f"The CLIP {ran}; all encoding took {duration(spent['encoding_seconds_once'])}. Inside these {spent['runs']} runs "
        f"it would have taken {duration(spent['encoding_online_seconds'])} (estimated from the seconds per image of "
        f"encoding alone on the machine): {changed}; with online encoders "
        f"the whole would take {spent['ratio']:.2f} times as long."
    )


def show(report: dict[str, Any], out: Path) -> None:
    names = list(dict.fromkeys(name for scores in report["scores"].values() for name in scores))
    rows = [
        (system, seeds_of(scores), *[spread(scores.get(name)) for name in names])
        for system, scores in report["scores"].items()
    ]
    table("scores, mean over seeds +- 95% interval over seeds", ("", "seeds", *names), rows)
    lines = [
        (row["claim"], row["source"], *numbers(row), len(row["seeds"]), row["verdict"]) for row in report["claims"]
    ]
    heads = ("claim", "paper", "difference", "95% interval", "p (Holm)", "seeds", "verdict")
    table("claims (the rule stands in xformer/lab/claims.py)", heads, lines)
    lines = [(row["claim"], *numbers(row), len(row["seeds"])) for row in report["explored"] if "missing" not in row]
    if lines:
        table("X-Former minus Q-Former by type of GQA, and controls (no verdicts)", ("", *heads[2:6]), lines)
    spent = report["cost"]
    table("cost", ("phase", "time"), [(name, duration(value)) for name, value in spent["seconds"].items()])
    if text := saving(spent):
        say(text)
    say(f"in {out}: summary.json, results/ (one JSON per run); the page: xformer report {out} --out report.html")


def seeds_of(scores: dict[str, Any]) -> int | None:
    """Over how many seeds a system's scores are; None for one that has no seeds."""
    return max((value["seeds"] for value in scores.values() if "seeds" in value), default=None)


def spread(value: dict[str, Any] | None) -> str | None:
    if value is None:
        return None
    return f"{value['mean']:.2f}" + ("" if value["half"] is None else f" +- {value['half']:.2f}")


def numbers(row: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Difference, interval and corrected p of a claim, as text; an "unharmed" row has no p."""
    if "missing" in row:
        return None, None, None
    bound = np.inf if row["benchmark"] == "coco-caption" else 100.0  # CIDEr has no upper end
    low, high = (min(bound, max(-bound, limit)) for limit in row["interval"])  # few seeds reach beyond what can be
    p = f"{row['p_holm']:.4f}" if "p_holm" in row else None
    return f"{row['difference']:+.2f}", f"{low:+.2f} to {high:+.2f}", p
