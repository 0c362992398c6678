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
from xformer.lab import baselines, encoding
from xformer.lab.results import differences, pack, read_json, read_results, refuse_mixed
from xformer.lab.run import CURVES, curves
from xformer.lab.summary import cost

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
    stores: dict[str, dict[str, float]] = field(default_factory=dict)  # encoding.known
    cost: dict[str, Any] = field(default_factory=dict)  # as summary.cost gives it


def collect(folders: list[Path]) -> Collected:
    """Everything in these folders. Raises EvaluationError where one holds no finished run, or where runs of ablations do
    not belong side by side."""
    found = Collected()
    files: dict[Path, Result] = {}
    for folder in folders:
        before = len(found.results)
        if not folder.is_dir():
            raise EvaluationError(f"{folder}: there is no such folder.")
        where = folder / "results" if (folder / "results").is_dir() else folder
        if results := read_results(where):
            files |= results
            _ablation(found, where.parent, where, list(results.values()))
        else:
            _evaluations(found, folder)
        if len(found.results) == before:
            raise EvaluationError(
                f"{folder} holds no finished run: neither results/ of xformer ablate, nor scores.json of xformer eval."
            )
    refuse_mixed(files)
    names = Counter((result["variant"], result["seed"]) for result in found.results)
    if doubled := next((key for key, count in names.items() if count > 1), None):
        raise EvaluationError(f"{doubled[0]} with seed {doubled[1]} stands twice in these folders; give one of them.")
    if files:
        found.cost = cost(list(files.values()), found.stores)
    return found


def _ablation(found: Collected, folder: Path, where: Path, results: list[Result]) -> None:
    found.results += results
    found.systems |= baselines.read(where)
    for name, seconds in encoding.known(folder, where).items():
        found.stores[f"{folder}/{name}" if name in found.stores else name] = seconds
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


def _place(written: str, folder: Path) -> Path | None:
    """Where a path that was written down lies now: below `folder` by its last parts, beside `folder`, or as it stands if
    it is absolute. What lies in the working folder by chance is not looked at."""
    path = Path(written)
    below = [folder.joinpath(*path.parts[start:]) for start in range(len(path.parts)) if path.parts[start] != "/"]
    return next((place for place in (*below, folder.resolve().parent / path) if place.exists()), None)


def _evaluations(found: Collected, folder: Path) -> None:
    """Runs that `xformer eval` scored; a run is named by its model, or its folder where two have the same."""
    by_run: dict[Path, dict[str, Path]] = {}
    diverse: dict[Path, dict[str, Any]] = {}
    for file in sorted(folder.rglob("scores.json")):
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("benchmark") == "diversity":
            for each in report["scores"].values():
                if run := _place(each["checkpoint"], folder):
                    diverse[run.resolve()] = each | {"n": report["n"]}
        elif report.get("benchmark") in SUITE and "checkpoint" in report and (file.parent / "answers.json").is_file():
            run = _place(report["checkpoint"], folder)
            if run is None or not all((run / name).is_file() for name in ("settings.json", "summary.json")):
                raise EvaluationError(f"{file} scores the run {report['checkpoint']}, which does not lie in {folder}.")
            by_run.setdefault(run, {})[report["benchmark"]] = file
    demo = read_json(folder / "demo.json") if (folder / "demo.json").is_file() else {}
    models = Counter(json.loads((run / "settings.json").read_text())["model"] for run in by_run)
    base: dict[str, Any] = {}
    for run, files in by_run.items():
        about, summary = read_json(run / "settings.json"), read_json(run / "summary.json")
        name = about["model"] if models[about["model"]] == 1 else run.name
        base = base or about["settings"]
        first = _place(about["init"], folder) if about["init"] else None
        stages = {"stage1": first} if first is not None and (first / "summary.json").is_file() else {}
        stages |= {"stage2": run}
        told = {stage: read_json(place / "summary.json") for stage, place in stages.items()}
        scores = {b: _scores(found, file, name, about["model"], b) for b, file in files.items()}
        if one := diverse.get(run.resolve()):
            scores["diversity"] = {key: one[key] for key in ("overall", "interval", "n", "effective_rank", "heat")}
            scores["diversity"] |= {"images": one["n"], "parts": {}}
        evaluation = sum(sum(json.loads(f.read_text())["seconds"].values()) for f in files.values())
        found.results.append(
            {
                "variant": name, "seed": about["settings"]["seed"], "model": about["model"],
                "changes": differences(base, about["settings"]),
                "scores": scores, "losses": {"stage2": summary["validation"]}, "versions": demo.get("versions", {}),
                "cost": {f"{s}_seconds": one["seconds"] for s, one in told.items()}
                | {"evaluation_seconds": evaluation, "trainable": {s: one["trainable"] for s, one in told.items()}},
                "curves": {stage: curves(place, CURVES[stage]) for stage, place in stages.items()},
                "made_with": {"model": about["model"], "settings": about["settings"]},
            }
        )  # fmt: skip
        if first is not None and "stage1" in stages:
            found.stage1[name, about["settings"]["seed"]] = first
        found.store = _place(about["features"][0], folder) or found.store
    if "cost" in demo:
        found.cost = demo["cost"]


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
