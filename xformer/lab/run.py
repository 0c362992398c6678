"""One run of an ablation: both stages and every benchmark, from whatever was done before; its JSON is written last."""

import json
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from xformer import checkpoint, publish
from xformer.errors import EvaluationError
from xformer.evaluation import diversity
from xformer.evaluation.intervals import interval
from xformer.evaluation.suite import SUITE, Files, Row
from xformer.lab.results import UNKNOWN, pack, read_json, write_result
from xformer.settings import Settings

LIBRARIES = ("torch", "transformers", "accelerate", "numpy")
CURVES = {"stage1": ("itc", "itm", "itg", "reconstruction", "itm_accuracy"), "stage2": ("lm", "reconstruction")}


@dataclass(frozen=True)
class Questions:
    """A benchmark's files, and the store whose features answer them."""

    files: Files
    store: Path


@dataclass(frozen=True)
class Run:
    """All that one run needs, so that a worker on another machine can do it."""

    out: Path
    variant: str
    model: str
    seed: int
    changes: dict[str, Any]
    settings: Settings
    settings1: Settings  # of the stage-1 run, which variants that differ later share
    stage1_of: str
    store: Path
    benchmarks: dict[str, Questions]
    limit: int
    made: dict[str, Any] = field(default_factory=dict)  # code, weights, data, features: what else decides its numbers
    features1: Any = UNKNOWN  # the part of made's features that stage 1 reads

    @property
    def name(self) -> str:
        return f"{self.variant}-seed{self.seed}"

    @property
    def result(self) -> Path:
        return self.out / "results" / f"{self.name}.json"

    @property
    def stage1(self) -> Path:
        return self.out / "runs" / f"{self.stage1_of}-seed{self.seed}-stage1"

    @property
    def stage2(self) -> Path:
        return self.out / "runs" / f"{self.name}-stage2"

    def made_with(self) -> dict[str, Any]:
        """What the result depends on; a result with another one is refused."""
        return {"model": self.model, "settings": self.settings.dump(), **self.made}

    def made_stage2(self) -> dict[str, Any]:
        """What training depends on: the benchmarks' files, and how much of them is asked, change no weight."""
        trained = {key: value for key, value in self.made.items() if key != "limit"}
        if "data" in trained:
            trained["data"] = {"corpus": trained["data"]["corpus"]}
        return {"model": self.model, "settings": self.settings.dump(), **trained}

    def made_stage1(self) -> dict[str, Any]:
        return self.made_stage2() | {"settings": self.settings1.dump(), "features": self.features1}


def train_first(run: Run) -> None:
    """Stage 1, unless it is done; a killed one goes on from its newest checkpoint."""
    from xformer.train import train_stage1

    if not (run.stage1 / "summary.json").is_file():
        publish.write_json(run.stage1 / "made.json", run.made_stage1())
        resume = bool(checkpoint.checkpoints(run.stage1))
        train_stage1([run.store], run.stage1, run.settings1, run.model, resume)


def finish(run: Run) -> dict[str, Any]:
    """Stage 2 and the benchmarks, unless they are done; writes and returns the run's JSON."""
    from xformer.train import train_stage2

    if not (run.stage2 / "summary.json").is_file():
        publish.write_json(run.stage2 / "made.json", run.made_stage2())
        resume = bool(checkpoint.checkpoints(run.stage2))
        train_stage2([run.store], None if resume else run.stage1, run.stage2, run.settings, None, resume)
    scores, evaluation = evaluate(run)
    summaries = {s: json.loads((f / "summary.json").read_text()) for s, f in _stages(run).items()}
    result = {
        "variant": run.variant,
        "seed": run.seed,
        "model": run.model,
        "changes": run.changes,
        "scores": scores,
        "losses": {stage: _rounded(summary["validation"]) for stage, summary in summaries.items()},
        "cost": {
            "stage1_seconds": summaries["stage1"]["seconds"],
            "stage2_seconds": summaries["stage2"]["seconds"],
            "evaluation_seconds": round(sum(evaluation.values()), 1),  # of a benchmark that was cut off: its last go
            "stage1_run": run.stage1.name,
            "images": {
                "stage1": summaries["stage1"]["steps"] * run.settings1.stage1.batch,
                "stage2": summaries["stage2"]["steps"] * run.settings.stage2.batch,
                "eval": sum(found.get("images", 0) for found in scores.values()),
            },
            "trainable": {stage: summary["trainable"] for stage, summary in summaries.items()},
        },
        "curves": {stage: curves(folder, CURVES[stage]) for stage, folder in _stages(run).items()},
        "versions": versions(),
        "made_with": run.made_with(),
    }
    write_result(run.result, result)
    return result


def evaluate(run: Run) -> tuple[dict[str, Any], dict[str, float]]:
    """Every benchmark's scores, and its seconds; those of a benchmark that an earlier go finished are its seconds then."""
    file = run.out / "eval" / run.name / "seconds.json"
    scores: dict[str, Any] = {}
    seconds: dict[str, float] = read_json(file) if file.is_file() else {}
    for name, questions in run.benchmarks.items():
        began = time.perf_counter()
        scores[name] = measure(run, name, questions)
        seconds[name] = max(seconds.get(name, 0.0), round(time.perf_counter() - began, 2))
        publish.write_json(file, seconds)
    return scores, {name: seconds[name] for name in run.benchmarks}


def _stages(run: Run) -> dict[str, Path]:
    return {"stage1": run.stage1, "stage2": run.stage2}


def versions() -> dict[str, str]:
    """Of the libraries that decide numbers and of this package; the device, and how many threads add up on a CPU."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    more = {"xformer": version("xformer-mllm"), "device": device, "threads": str(torch.get_num_threads())}
    return {name: version(name) for name in LIBRARIES} | more


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


def curves(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, list[float]]]:
    """The losses of a run's log: {"train" or "validate": {"step": [...], loss: [...]}}. A step that was logged again
    after a resume counts once."""
    found: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validate": {}}
    for text in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off by a kill; the step was done again
        if line["event"] in found:
            found[line["event"]][line["step"]] = line
    out: dict[str, dict[str, list[float]]] = {}
    for event, lines in found.items():
        rows = [lines[step] for step in sorted(lines)]
        have = [name for name in names if rows and all(name in row for row in rows)]
        out[event] = {"step": [row["step"] for row in rows]}
        out[event] |= {name: [round(row[name], 4) for row in rows] for name in have}
    return out


def load(name: str, questions: Questions, limit: int) -> list[Row]:
    """The questions of a benchmark in their order. Raises EvaluationError."""
    rows = SUITE[name].load(questions.files)
    return rows[:limit] if limit else rows


def measure(run: Run, name: str, questions: Questions) -> dict[str, Any]:
    """A benchmark's scores of the stage-2 run, packed by category; `missing` with the reason where there are none."""
    if name == "diversity":
        return _diversity(run, questions)
    if name == "coco-caption" and (reason := captions_missing()):
        return {"missing": reason}
    from xformer.evaluation.answers import Wanted, answer

    rows = load(name, questions, run.limit)
    folder, captions = run.out / "eval" / run.name, name == "coco-caption"
    wanted = Wanted(blind=False, shuffled=False, told=False, prompt=None, captions=captions)
    systems, _ = answer(run.stage2, questions.store, rows, [], wanted, folder / "progress")
    given = systems[run.model]
    report, each = score(name, rows, given)
    files = {key: str(path.resolve()) for key, path in vars(questions.files).items() if path is not None}
    texts = json.dumps(
        {"files": files, "scores": [None if np.isnan(v) else round(float(v), 3) for v in each], "answers": given}
    )
    publish.write_bytes(folder / f"{name}.json", (texts + "\n").encode())
    return packed(report, rows, each, name)


def captions_missing() -> str:
    """Why captions cannot be scored here, or nothing."""
    try:
        import pycocoevalcap.cider.cider  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return "CIDEr needs the extra `captions`: pip install 'xformer-mllm[captions]'"
    return ""


def score(name: str, rows: list[Row], given: list[str]) -> tuple[dict[str, Any], np.ndarray]:
    """The report of a benchmark's first scorer, and every question's score [N], NaN where it does not count.

    Captions are scored by CIDEr and BLEU-4 only: the other metrics start Java once per run.
    """
    if name == "coco-caption":
        from xformer.evaluation.captions import score_captions

        references = {i: row["references"] for i, row in enumerate(rows)}
        found = score_captions(references, {i: [text] for i, text in enumerate(given)}, ("BLEU", "CIDEr"))
        metrics = {key: round(100 * value, 2) for key, value in found["metrics"].items()}
        return {"overall": metrics["CIDEr"], "metrics": metrics}, np.array(found["each"]["CIDEr"])
    benchmark = SUITE[name]
    report, each = benchmark.score(rows, given, benchmark.scorers[0])
    return report, np.array(each)


def packed(report: dict[str, Any], rows: list[Row], each: np.ndarray, name: str) -> dict[str, Any]:
    """What the run's JSON holds of a benchmark: overall with its interval, and every question's score by category."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        if not np.isnan(each[i]):
            category = f"{row['structural']}/{row['semantic']}" if name == "gqa" else str(row["category"])
            places.setdefault(category, []).append(i)
    counted = each[~np.isnan(each)]
    if not len(counted):
        raise EvaluationError(f"{name}: none of its questions counts.")
    found = {"overall": report["overall"], "interval": interval(counted), "n": len(counted)}
    found |= {"images": len({str(row["image_id"]) for row in rows})}
    found |= {key: report[key] for key in ("mae", "rmse", "metrics") if key in report}
    return found | {"parts": {category: pack(each[where].tolist()) for category, where in sorted(places.items())}}


def _diversity(run: Run, questions: Questions) -> dict[str, Any]:
    from xformer.evaluation.queries import queries_of
    from xformer.evaluation.run import Request

    request = Request(benchmark="diversity", out=run.out, limit=run.limit or None)
    _, queries = queries_of(run.stage2, questions.store, request)
    report, each = diversity.measure(queries)
    heat = np.round(report["heat"], 2).tolist()
    found = {"overall": report["overall"], "interval": report["interval"], "n": len(each), "images": len(each)}
    return found | {"effective_rank": report["effective_rank"], "heat": heat, "parts": {"all": pack(each)}}
