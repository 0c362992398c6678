"""`xformer demo`: the whole method on one machine, through the same commands that a user types."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.checkpoint import checkpoints
from xformer.console import duration, say, table
from xformer.lab.run import versions
from xformer.settings import Settings

MODELS = ("qformer", "xformer")
BENCHMARKS = {"vqav2": ("vqa_questions.json", "vqa_annotations.json"), "oc": ("gvtbench_oc.json", None)}


def run_demo(
    out: Path, settings: Settings, config: Path | None, overrides: list[str], command: Callable[[list[str]], None]
) -> dict[str, Any]:
    """Corpus, features, both models through both stages, scores, pictures. Returns what OUT/demo.json holds.

    Args:
        command: runs one command line of `xformer` in this process.
    """
    common = ["--preset", settings.preset, "--seed", str(settings.seed)]
    common += ["--config", str(config)] if config else []
    for assignment in overrides:
        common += ["--set", assignment]
    costs: dict[str, float] = {}

    def run(phase: str, *arguments: str) -> None:
        line = [*arguments, *common]
        say(f"\n$ xformer {' '.join(arguments)}")
        began = time.perf_counter()
        command(line)
        costs[phase] = costs.get(phase, 0) + time.perf_counter() - began

    began = time.perf_counter()
    corpus, store = out / "shapes", out / "store.zarr"
    if not (corpus / "shapes.json").is_file():
        run("corpus", "corpus", "shapes", "--out", str(corpus))
    both = ["--encoder", "clip", "--encoder", "mae"]
    run("extraction, once", "extract", *both, "--corpus", str(corpus), "--store", str(store))
    for model in MODELS:
        for stage in (1, 2):
            folder = out / "runs" / f"{model}-stage{stage}"
            start = ["--model", model] if stage == 1 else ["--init", str(out / "runs" / f"{model}-stage1")]
            start += ["--resume"] if checkpoints(folder) else []
            run(
                f"stage {stage} {model}",
                "train", "--stage", str(stage), "--features", str(store), "--out", str(folder), *start,
            )  # fmt: skip
        for benchmark, (questions, annotations) in BENCHMARKS.items():
            given = ["--questions", str(corpus / "val" / questions)]
            given += ["--annotations", str(corpus / "val" / annotations)] if annotations else []
            run(
                f"evaluation {model}",
                "eval", benchmark, "--checkpoint", str(out / "runs" / f"{model}-stage2"), "--features", str(store),
                *given, "--out", str(out / "eval" / f"{model}-{benchmark}"),
                "--blind" if model == MODELS[0] else "--no-blind", "--no-shuffled",
            )  # fmt: skip
    runs = [str(out / "runs" / f"{model}-stage2") for model in reversed(MODELS)]
    which = [
        "--checkpoint",
        runs[0],
        "--against",
        runs[1],
        "--features",
        str(store),
        "--out",
        str(out / "eval/diversity"),
    ]
    run("query similarity", "eval", "diversity", *which)
    report = {"seed": settings.seed, "seconds": costs}
    report |= _draw(out, store, corpus)
    report["scores"] = _scores(out)
    report["cache"] = cache = _saved(out, store)
    report["total_seconds"] = time.perf_counter() - began
    once, online, spent = cache["encoding_seconds_once"], cache["encoding_seconds_if_online"], sum(costs.values())
    report["cost"] = {
        "runs": 2 * len(MODELS), "seconds": costs, "encoding_seconds_once": once, "encoding_online_seconds": online,
        "saved_seconds": online - once, "ratio": round((spent - once + online) / spent, 2),
    }  # fmt: skip
    report["versions"] = versions()
    publish.write_json(out / "demo.json", report)
    _show(out, report)
    command(["report", str(out), "--out", str(out / "report.html")])
    return report


def _scores(out: Path) -> dict[str, Any]:
    """Per benchmark and system, by the first scorer of `eval`; both scorers are in the files under OUT/eval."""
    found: dict[str, Any] = {}
    for benchmark in BENCHMARKS:
        for model in MODELS:
            file = out / "eval" / f"{model}-{benchmark}" / "scores.json"
            scores = json.loads(file.read_text(encoding="utf-8"))["scores"]
            found.setdefault(benchmark, {}).update(scores)
    return found


def _saved(out: Path, store: Path) -> dict[str, Any]:
    """What the encoders cost once, and what they would have cost inside the four training runs."""
    from pipeline.store import describe

    described = describe(store)
    images, runs = described["images"], []
    clip = sum(a["seconds"] for n, a in described["arrays"].items() if n.startswith("clip/")) / images
    draws = [a["seconds"] for n, a in described["arrays"].items() if n.startswith(("mae/", "pixels/"))]
    mae = sum(draws) / images / max(1, sum(n.endswith("/tokens") and n.startswith("mae/") for n in described["arrays"]))
    seen = 0
    for model in MODELS:
        for stage in (1, 2):
            run = json.loads((out / "runs" / f"{model}-stage{stage}" / "settings.json").read_text(encoding="utf-8"))
            summary = json.loads((out / "runs" / f"{model}-stage{stage}" / "summary.json").read_text(encoding="utf-8"))
            batch = run["settings"][f"stage{stage}"]["batch"]
            passes = summary["steps"] * batch
            seen += passes
            runs.append(passes * (clip + (mae if model == "xformer" else 0)))
    return {
        "bytes": sum(a["bytes"] for a in described["arrays"].values()),
        "encoding_seconds_once": sum(a["seconds"] for a in described["arrays"].values()),
        "encoding_seconds_if_online": sum(runs),
        "images_read_in_training": seen,
    }


def _draw(out: Path, store: Path, corpus: Path) -> dict[str, Any]:
    from xformer import pictures

    say("\ndrawing pictures")
    folders = {model: [out / "runs" / f"{model}-stage{stage}" for stage in (1, 2)] for model in MODELS}
    pictures.loss_curves(folders, out / "losses.png")
    rebuilt = pictures.rebuild(out / "runs" / "xformer-stage1", store, 5)
    pictures.reconstructions(rebuilt, out / "reconstruction.png")
    given = {
        model: json.loads((out / "eval" / f"{model}-vqav2" / "answers.json").read_text(encoding="utf-8"))
        for model in MODELS
    }
    truths = json.loads((corpus / "val" / "vqa_annotations.json").read_text(encoding="utf-8"))["annotations"]
    truth = {row["question_id"]: row["multiple_choice_answer"] for row in truths}
    rows = []
    for theirs, ours in zip(
        given["qformer"][:: max(1, len(truths) // 12)], given["xformer"][:: max(1, len(truths) // 12)], strict=True
    ):
        name = f"{int(ours['image_id']):012d}.png"
        rows.append(
            {
                "picture": corpus / "val" / "images" / name,
                "question": ours["question"],
                "truth": truth[ours["question_id"]],
                "qformer": theirs["answers"]["qformer"],
                "xformer": ours["answers"]["xformer"],
            }
        )
    pictures.answers(rows[:12], out / "answers.png")
    return {"reconstruction": {"masked_mse": rebuilt["errors"], "n": rebuilt["n"]}}


def _show(out: Path, report: dict[str, Any]) -> None:
    names = {"qformer": "Q-Former", "xformer": "X-Former"}
    for benchmark, title in (("vqav2", "VQAv2, official scorer"), ("oc", "object counting, official rule")):
        systems = report["scores"][benchmark]
        part = "per_answer_type" if benchmark == "vqav2" else "per_count"
        kinds = list(next(iter(systems.values()))["official"][part])
        n = next(iter(systems.values()))["official"]["n"]
        order = [s for s in ("constant answer", "blind LLM", *MODELS, "LLM given a true caption") if s in systems]
        rows = [
            (names.get(s, s), *[systems[s]["official"][part].get(k) for k in kinds], systems[s]["official"]["overall"])
            for s in order
        ]
        table(f"{title}, {n} questions, seed {report['seed']}", ("", *kinds, "overall"), rows)
    q, x = (report["scores"]["vqav2"][m]["official"]["overall"] for m in MODELS)
    verdict = "ahead of" if x > q else "behind" if x < q else "level with"
    say(
        f"X-Former is {verdict} the Q-Former by {abs(x - q):.2f} points; one seed at this size is no evidence either way."
    )
    errors = report["reconstruction"]["masked_mse"]
    table("masked MSE on the validation split", ("predictor", "MSE"), [(k, f"{v:.4f}") for k, v in errors.items()])
    table("cost", ("phase", "time"), [(k, duration(v)) for k, v in report["seconds"].items()])
    cache = report["cache"]
    say(
        f"Encoding ran once ({cache['encoding_seconds_once']:.0f} s, {cache['bytes'] / 1e6:.0f} MB). Inside the four "
        f"training runs it would have cost {cache['encoding_seconds_if_online']:.0f} s: every image is read "
        "again in every epoch, stage and model."
    )
    say(f"Total {duration(report['total_seconds'])}. Pictures: {out}/losses.png, reconstruction.png, answers.png")
