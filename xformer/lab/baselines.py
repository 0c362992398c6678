"""What needs no bridge to be answered: a constant answer, the language model without an image, and given a caption.

They depend on the frozen language model and the questions only, so they are measured once for a whole ablation.
"""

from pathlib import Path
from typing import Any

import numpy as np

from xformer import publish
from xformer.checkpoint import checkpoints
from xformer.console import say
from xformer.evaluation.suite import SUITE
from xformer.lab.results import UNKNOWN, read_json
from xformer.lab.run import Run, captions_missing, load, score
from xformer.settings import Settings

FILE = "baselines.json"  # beside the runs' JSONs, so that it is committed with them
CONSTANT, BLIND, TOLD = "constant answer", "blind LLM", "LLM given a true caption"


def measure(out: Path, runs: list[Run], base: Settings) -> None:
    """Writes OUT/results/baselines.json, unless it is there and belongs to the same questions and language model.

    Where no run of the base's language model is here whole (only JSONs were copied), what is there stays.
    """
    ours = (run for run in runs if run.settings.llm == base.llm and run.settings.eval == base.eval)
    run = next((run for run in ours if checkpoints(run.stage2) and run.made.get("features", UNKNOWN) != UNKNOWN), None)
    if run is None:
        return
    made = {key: run.made[key] for key in ("data", "limit")} | {"llm": run.made["weights"]["llm"]}
    made["eval"] = run.settings.eval.model_dump(mode="json")
    file = out / "results" / FILE
    if file.is_file() and read_json(file, file).get("made_with") == made:
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


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Scores by system and benchmark, from the folder of the runs' JSONs; {} where none were measured."""
    file = results / FILE
    return read_json(file, file).get("scores", {}) if file.is_file() else {}
