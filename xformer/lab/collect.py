"""What a report is made of: finished runs of an ablation's folder, or what `xformer eval` left of single runs."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xformer.errors import EvaluationError
from xformer.evaluation.page import BASELINES
from xformer.evaluation.suite import SUITE, Files
from xformer.lab import baselines
from xformer.lab.results import pack, read_results
from xformer.lab.run import CURVES, curves

Result = dict[str, Any]


@dataclass
class Collected:
    """Results, and where what a page shows beside numbers lies; `answers` by benchmark: rows as page.card reads them."""

    results: list[Result] = field(default_factory=list)
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)
    stage1: dict[tuple[str, int], Path] = field(default_factory=dict)
    store: Path | None = None
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pictures: Path | None = None
    summary: dict[str, Any] = field(default_factory=dict)


def collect(folders: list[Path]) -> Collected:
    """Everything in these folders. Raises EvaluationError where one holds no finished run."""
    found = Collected()
    for folder in folders:
        before = len(found.results)
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: there is no such folder.")
        results = read_results(folder / "results") or read_results(folder)
        if results:
            _ablation(found, folder if (folder / "results").is_dir() else folder.parent, results)
        else:
            _evaluations(found, folder)
        if len(found.results) == before:
            raise EvaluationError(
                f"{folder} holds no finished run: neither results/ of xformer ablate, nor scores.json of xformer eval."
            )
    names = Counter((result["variant"], result["seed"]) for result in found.results)
    if doubled := next((key for key, count in names.items() if count > 1), None):
        raise EvaluationError(f"{doubled[0]} with seed {doubled[1]} stands twice in these folders; give one of them.")
    return found


def _ablation(found: Collected, folder: Path, results: list[Result]) -> None:
    found.results += results
    found.systems |= baselines.read(folder)
    if (folder / "summary.json").is_file():
        found.summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if (folder / "store.zarr").is_dir():
        found.store = folder / "store.zarr"
    for result in results:
        stage1 = folder / "runs" / result["cost"]["stage1_run"]
        if (stage1 / "summary.json").is_file():
            found.stage1[result["variant"], result["seed"]] = stage1
    seed = min(result["seed"] for result in results)
    for benchmark in ("vqav2", "oc", "gqa"):
        given = {r["variant"]: folder / "eval" / f"{r['variant']}-seed{seed}" / f"{benchmark}.json" for r in results}
        texts = {name: json.loads(file.read_text()) for name, file in given.items() if file.is_file()}
        if not texts:
            continue
        paths = {key: Path(value) for key, value in next(iter(texts.values()))["files"].items()}
        if not all(path.is_file() for path in paths.values()):
            continue
        rows = SUITE[benchmark].load(Files(**paths))
        count = min(len(text["answers"]) for text in texts.values())
        found.answers[benchmark] = [
            {
                "image_id": row["image_id"],
                "question": row["question"],
                "truth": row["truth"],
                "answers": {name: text["answers"][i] for name, text in texts.items()},
                "scores": {name: text["scores"][i] for name, text in texts.items()},
            }
            for i, row in enumerate(rows[:count])
        ]
        beside = paths.get("questions", paths.get("annotations", folder)).parent / "images"
        found.pictures = beside if beside.is_dir() else found.pictures


def _evaluations(found: Collected, folder: Path) -> None:
    """Runs that `xformer eval` scored; a run is named by its model, or its folder where two have the same."""
    by_run: dict[Path, dict[str, Path]] = {}
    for file in sorted(folder.rglob("scores.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("benchmark") in SUITE and "checkpoint" in report and (file.parent / "answers.json").is_file():
            run = Path(report["checkpoint"])
            if (run / "settings.json").is_file() and (run / "summary.json").is_file():
                by_run.setdefault(run, {})[report["benchmark"]] = file
    models = Counter(json.loads((run / "settings.json").read_text())["model"] for run in by_run)
    for run, files in by_run.items():
        about = json.loads((run / "settings.json").read_text(encoding="utf-8"))
        name = about["model"] if models[about["model"]] == 1 else run.name
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        first = Path(about["init"])
        stages = {"stage1": first, "stage2": run} if (first / "summary.json").is_file() else {"stage2": run}
        seconds = {s: json.loads((f / "summary.json").read_text())["seconds"] for s, f in stages.items()}
        scores = {b: _scores(found, file, name, about["model"], b) for b, file in files.items()}
        evaluation = sum(sum(json.loads(f.read_text())["seconds"].values()) for f in files.values())
        found.results.append(
            {
                "variant": name, "seed": about["settings"]["seed"], "model": about["model"], "changes": {},
                "scores": scores, "losses": {"stage2": summary["validation"]}, "versions": {},
                "cost": {f"{s}_seconds": value for s, value in seconds.items()} | {"evaluation_seconds": evaluation},
                "curves": {stage: curves(place, CURVES[stage]) for stage, place in stages.items()},
                "made_with": {"model": about["model"], "settings": about["settings"]},
            }
        )  # fmt: skip
        if "stage1" in stages:
            found.stage1[name, about["settings"]["seed"]] = first
        features = Path(about["features"][0])
        found.store = features if features.is_dir() else found.store


def _scores(found: Collected, file: Path, name: str, model: str, benchmark: str) -> dict[str, Any]:
    """One benchmark of one run from what `xformer eval` wrote; its rows join those of the other runs."""
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = json.loads((file.parent / "answers.json").read_text(encoding="utf-8"))
    scorer = next(iter(report["scores"][model]))
    for system, inner in report["scores"].items():
        if BASELINES.fullmatch(system) and "shuffled" not in system:
            found.systems.setdefault(system, {})[benchmark] = {"overall": inner[scorer]["overall"], "parts": {}}
    places: dict[str, list[float]] = {}
    for row in rows:
        if row["scores"][model] is not None:
            places.setdefault(str(row["category"]), []).append(row["scores"][model])
    known = found.answers.setdefault(benchmark, [{**row, "answers": {}, "scores": {}} for row in rows])
    if [row["question_id"] for row in known] == [row["question_id"] for row in rows]:
        for shown, row in zip(known, rows, strict=True):
            shown["answers"][name], shown["scores"][name] = row["answers"][model], row["scores"][model]
    inner = report["scores"][model][scorer]
    counted = sum(len(values) for values in places.values())
    folder = file.parents[2] / "shapes" / "val" / "images"
    found.pictures = folder if folder.is_dir() else found.pictures
    return {
        "overall": inner["overall"], "interval": inner["interval"], "n": counted,
        "images": len({row["image_id"] for row in rows}),
        "parts": {category: pack(list(np.asarray(values, float))) for category, values in sorted(places.items())},
    }  # fmt: skip
