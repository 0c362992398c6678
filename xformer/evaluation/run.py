"""`xformer eval`: answers, from a results file or from a model, scored beside what needs no image at all."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.console import say
from xformer.errors import EvaluationError
from xformer.evaluation import page, retrieval, tables
from xformer.evaluation.files import match, read_results
from xformer.evaluation.intervals import interval, paired
from xformer.evaluation.paper import PAPER
from xformer.evaluation.suite import READS, SHAPES, SUITE, Benchmark, Files, Row

# What the shapes corpus asks where it has no such benchmark.
STAND_INS = {
    "okvqa": "the shapes corpus asks nothing that needs knowledge: its VQAv2 questions stand in for OK-VQA's",
    "nocaps": "the shapes corpus has no domains: its captions stand in for NoCaps, as one set",
}
Open = Callable[[Path, set[str] | None], Path]  # (a run, image ids or None for all) -> the store to answer from


@dataclass(frozen=True)
class Request:
    """What was asked for. With `results` no model is loaded, and `against` is another results file instead of a run."""

    benchmark: str
    out: Path
    files: Files = Files()
    results: Path | None = None
    checkpoint: Path | None = None
    against: Path | None = None
    images: Path | None = None
    scorer: str | None = None
    prompt: str | None = None
    limit: int | None = None
    allow_partial: bool = False
    blind: bool = True
    shuffled: bool = True
    overrides: list[str] = field(default_factory=list)


def evaluate(request: Request, open_store: Open) -> dict[str, Any]:
    """Answers and scores a benchmark; writes scores.json, results.json, answers.json and page.html into `out`.

    Raises: EvaluationError, StoreError, CheckpointError, SettingsError.
    """
    _refuse_what_is_not_read(request)
    if request.benchmark == "retrieval" and request.results is not None:
        return _score_rankings(request, request.results)
    if request.benchmark == "diversity" and request.results is not None:
        raise EvaluationError("diversity has no results file; it needs a checkpoint and features.")
    if request.benchmark not in SUITE and not _is_writer():
        return {}  # these two are the work of one process
    if request.benchmark == "retrieval":
        from xformer.evaluation.rank import evaluate_retrieval

        return evaluate_retrieval(request, open_store)
    if request.benchmark == "diversity":
        from xformer.evaluation.queries import evaluate_diversity

        return evaluate_diversity(request, open_store)
    return _evaluate_answers(request, SUITE[request.benchmark], open_store)


def _refuse_what_is_not_read(request: Request) -> None:
    """Raises EvaluationError for a scorer that a benchmark does not have, and a file that it does not read."""
    scorers = SUITE[request.benchmark].scorers if request.benchmark in SUITE else ()
    if request.scorer and request.scorer not in scorers:
        raise EvaluationError(
            f"--scorer {request.scorer}: {request.benchmark} has {', '.join(scorers) or 'only one scorer'}."
        )
    reads = READS[request.benchmark]
    for name, path in vars(request.files).items():
        if path is not None and name not in reads:
            wanted = " and ".join(f"--{option}" for option in reads) or "no file"
            raise EvaluationError(f"--{name} {path}: {request.benchmark} reads {wanted}.")


def _score_rankings(request: Request, results: Path) -> dict[str, Any]:
    data = retrieval.load(request.files.annotations or SHAPES / "captions.json")
    data = retrieval.first(data, request.limit) if request.limit else data
    systems = {
        str(file): retrieval.score(retrieval.read_rankings(file, data), data)
        for file in (results, request.against)
        if file
    }
    report: dict[str, Any] = {"benchmark": "retrieval", "n": len(data["images"]), "n_texts": len(data["texts"])}
    if request.against is not None:
        ours, theirs = systems[str(results)][1], systems[str(request.against)][1]
        report["against"] = paired(ours, theirs) | {"than": str(request.against), "metric": "R@1, both ways"}
    report["scores"] = {"chance": retrieval.chance(data)} | {name: found for name, (found, _) in systems.items()}
    tables.report_retrieval(request.out, report)
    return report


def _evaluate_answers(request: Request, benchmark: Benchmark, open_store: Open) -> dict[str, Any]:
    rows = benchmark.load(request.files)
    total = len(rows)
    rows = rows[: request.limit] if request.limit else rows
    report: dict[str, Any] = {"benchmark": request.benchmark, "title": benchmark.title, "of": total}
    if request.results is not None:
        rows, systems = _given(request, benchmark, rows)
        report["results"] = str(request.results)
        name, other = str(request.results), str(request.against)
    else:
        systems, described, other = _generated(request, rows, open_store)
        report |= described
        name = described["model"]
    report["n"] = len(rows)
    if request.benchmark in STAND_INS and request.files == Files():
        report["note"] = STAND_INS[request.benchmark]
        say(report["note"])
    systems = {"constant answer": benchmark.constant(rows)} | systems
    scorers = [request.scorer] if request.scorer else list(benchmark.scorers)
    report["scores"], each = score_systems(benchmark, rows, systems, scorers)
    if request.against is not None:
        report["against"] = {s: _compare(each[s][name], each[s][other]) | {"than": other} for s in scorers}
    report["paper"] = {"note": "the paper's own numbers, not measured here", "numbers": PAPER[request.benchmark]}
    if _is_writer():
        _write(request, benchmark, rows, systems, each[scorers[0]], report, name, other)
    tables.show(benchmark, report)
    say(f"in {request.out}: scores.json, results.json (the answers), answers.json (all systems), page.html")
    return report


def _is_writer() -> bool:
    """Of several processes the first one writes."""
    return os.environ.get("RANK", "0") == "0"


def score_systems(
    benchmark: Benchmark, rows: list[Row], systems: dict[str, list[str]], scorers: list[str]
) -> tuple[dict[str, Any], dict[str, dict[str, list[float]]]]:
    """Reports by system and scorer, with a 95% interval of `overall`; and every question's score by scorer and system."""
    reports: dict[str, Any] = {name: {} for name in systems}
    each: dict[str, dict[str, list[float]]] = {scorer: {} for scorer in scorers}
    for scorer in scorers:
        for name, given in systems.items():
            found, values = benchmark.score(rows, given, scorer)
            counted = [v for v in values if not math.isnan(v)]
            reports[name][scorer] = {"overall": found["overall"], "interval": interval(counted)} | found
            each[scorer][name] = values
    return reports, each


def _compare(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if not math.isnan(a)]
    return paired([a for a, _ in both], [b for _, b in both])


def _given(request: Request, benchmark: Benchmark, rows: list[Row]) -> tuple[list[Row], dict[str, list[str]]]:
    """The rows that every given results file answers, and the answers."""
    keys = [row["key"] for row in rows]
    asked = set(keys)
    optional = frozenset(row["key"] for row in rows if not row.get("balanced", True))
    found: dict[str, dict[Any, str]] = {}
    for file in (request.results, request.against):
        if file is not None:
            pairs = read_results(file, benchmark.keys)
            if request.limit:
                pairs = [pair for pair in pairs if pair[0] in asked]
            found[str(file)] = match(pairs, keys, f"--results {file}", request.allow_partial, optional)
    answered = asked.intersection(*(set(known) for known in found.values()))
    kept = [row for row in rows if row["key"] in answered]
    if not kept:
        raise EvaluationError(
            f"--against {request.against}: answers none of the questions that {request.results} answers."
        )
    needed = len(keys) - len(optional)
    if len(answered - optional) < needed:
        say(f"partial: n={len(answered - optional)}/{needed}")
    return kept, {name: [known[row["key"]] for row in kept] for name, known in found.items()}


def _generated(request: Request, rows: list[Row], open_store: Open) -> tuple[dict[str, list[str]], dict[str, Any], str]:
    """What the model and its baselines answer; and the name of the system given by --against."""
    from xformer.checkpoint import newest_run
    from xformer.evaluation.answers import Wanted, answer

    run = request.checkpoint or newest_run(Path("runs"), stage=2)
    asked = {str(row["image_id"]) for row in rows}
    captions = request.benchmark in ("coco-caption", "nocaps")
    wanted = Wanted(request.blind, request.shuffled, request.blind and not captions, request.prompt, captions)
    store = open_store(run, asked)
    systems, described = answer(run, store, rows, request.overrides, wanted, request.out / "progress")
    other = ""
    if request.against is not None:
        alone = Wanted(False, False, False, request.prompt, captions)
        theirs, about = answer(
            request.against,
            open_store(request.against, asked),
            rows,
            request.overrides,
            alone,
            request.out / "progress",
        )
        other = about["model"] if about["model"] != described["model"] else f"{about['model']} of {request.against}"
        systems[other] = theirs[about["model"]]
        described["against_checkpoint"] = {"name": other, **about}
    return systems, described, other


def _write(
    request: Request, benchmark: Benchmark, rows: list[Row], systems: dict[str, list[str]],
    each: dict[str, list[float]], report: dict[str, Any], name: str, other: str,
) -> None:  # fmt: skip
    first, second = benchmark.keys
    for system, file in ((name, "results.json"), (other, "results-against.json")):
        if system in systems:
            given = zip(rows, systems[system], strict=True)
            publish.write_json(request.out / file, [{first: row["key"], second: text} for row, text in given])
    shown = [
        {
            "question_id": row["key"],
            "image_id": row["image_id"],
            "question": row["question"],
            "truth": row["truth"],
            "category": row["category"],
            "answers": {system: given[i] for system, given in systems.items()},
            "scores": {
                system: None if math.isnan(each[system][i]) else round(each[system][i], 4) for system in systems
            },
        }
        for i, row in enumerate(rows)
    ]
    lines = ",\n".join(json.dumps(row) for row in shown)
    publish.write_bytes(request.out / "answers.json", f"[\n{lines}\n]\n".encode())
    pictures = page.picture_folder(request.images, request.files.questions or request.files.annotations)
    publish.write_bytes(request.out / "page.html", page.answers_page(report, benchmark.part, shown, pictures).encode())
    publish.write_json(request.out / "scores.json", report)
