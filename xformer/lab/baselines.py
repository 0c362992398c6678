"""What needs no bridge to be answered: a constant answer, the language model without an image, and given a caption.

They depend on the frozen language model and the questions only, so they are measured once for a whole ablation.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.checkpoint import checkpoints
from xformer.console import say
from xformer.evaluation.suite import SUITE
from xformer.lab.run import Run, captions_missing, load, score

CONSTANT, BLIND, TOLD = "constant answer", "blind LLM", "LLM given a true caption"


def measure(out: Path, runs: list[Run]) -> None:
    """Writes OUT/baselines.json, unless it is there and belongs to the same questions and weights."""
    run = next((run for run in runs if checkpoints(run.stage2)), None)
    if run is None:
        return  # every run was reused from its JSON
    made = {key: run.made.get(key) for key in ("weights", "data", "limit")}
    made["eval"] = run.settings.eval.model_dump(mode="json")
    file = out / "baselines.json"
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["made_with"] == made:
        return
    from xformer.evaluation.answers import Wanted, answer

    say("\nwhat needs no bridge: constant answers, the language model alone, and given a true caption")
    found: dict[str, dict[str, Any]] = {}
    for name, questions in run.benchmarks.items():
        captions = name == "coco-caption"
        if name == "diversity" or captions and captions_missing():
            continue
        rows = load(name, questions, run.limit)
        wanted = Wanted(blind=True, shuffled=False, told=not captions, prompt=None, captions=captions)
        progress = out / "eval" / run.name / "progress"  # the run's own answers are there already
        systems, _ = answer(run.stage2, questions.store, rows, [], wanted, progress)
        systems = {CONSTANT: SUITE[name].constant(rows)} | systems
        for system in (CONSTANT, BLIND, TOLD):
            if system in systems:
                report, each = score(name, rows, systems[system])
                found.setdefault(system, {})[name] = {"overall": report["overall"], "parts": _parts(rows, each, name)}
    publish.write_json(file, {"made_with": made, "scores": found})


def _parts(rows: list[dict[str, Any]], each: np.ndarray, name: str) -> dict[str, float]:
    """The mean by category, x100."""
    places: dict[str, list[float]] = {}
    for row, value in zip(rows, each, strict=True):
        if not np.isnan(value):
            categories = (row["structural"], row["semantic"]) if name == "gqa" else (str(row["category"]),)
            for category in categories:
                places.setdefault(category, []).append(float(value))
    return {category: round(100 * float(np.mean(values)), 2) for category, values in sorted(places.items())}


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Scores by system and benchmark; {} where none were measured."""
    file = out / "baselines.json"
    return json.loads(file.read_text(encoding="utf-8"))["scores"] if file.is_file() else {}
