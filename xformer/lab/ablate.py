"""`xformer ablate`: plan, refuse what cannot work, extract once, train and evaluate every variant over the seeds, compare.

A finished run is one JSON and is never repeated; one that was killed goes on from its newest checkpoint.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.checkpoint import checkpoints
from xformer.console import say, table
from xformer.errors import EvaluationError, SettingsError
from xformer.evaluation.suite import Files
from xformer.lab import baselines, features, summary
from xformer.lab.clock import Clock
from xformer.lab.parallel import devices, on_dask
from xformer.lab.results import (
    UNKNOWN,
    code_sha256,
    read_json,
    read_result,
    read_results,
    refuse_mixed,
    refuse_other,
)
from xformer.lab.run import Questions, Run, captions_missing, finish, train_first
from xformer.lab.variants import Ablations, Variant, chosen, load_ablations
from xformer.settings import Settings
from xformer.weights import sha256_of

SHAPES_FORMAT = 2  # pipeline/shapes.py, which training does not import
SHAPES_FILES = {
    "vqav2": ("vqa_questions.json", "vqa_annotations.json"),
    "okvqa": ("vqa_questions.json", "vqa_annotations.json"),
    "gqa": ("gqa_questions.json", None),
    "oc": ("gvtbench_oc.json", None),
    "mci": ("gvtbench_mci.json", None),
    "coco-caption": (None, "captions.json"),
    "nocaps": (None, "captions.json"),
}


@dataclass(frozen=True)
class Request:
    """What was asked for. `command` runs one command line of `xformer` in this process."""

    out: Path
    command: Callable[[list[str]], None]
    preset: str = "tiny"
    config: Path | None = None
    overrides: list[str] = field(default_factory=list)
    quick: bool = False
    only: list[str] = field(default_factory=list)
    seeds: list[int] | None = None
    corpus: Path | None = None
    workers: int = 1
    gpus: bool = False
    scheduler: str | None = None
    plan_only: bool = False

    @property
    def side_by_side(self) -> int | None:
        """How many runs at once; None: as many as a running cluster takes."""
        return None if self.scheduler else self.workers if not self.gpus else len(devices(self.workers))


@dataclass
class Plan:
    """Everything that is decided before anything runs."""

    ablations: Ablations
    base: Settings
    variants: list[Variant]
    runs: list[Run]
    corpus: Path

    def needs(self, done: list[str]) -> dict[str, features.Needs]:
        """What each store must hold for the variants that are not done."""
        left = {run.variant for run in self.runs if run.name not in done}
        return features.needs([variant for variant in self.variants if variant.name in left], self.base)


def ablate(request: Request) -> dict[str, Any]:
    """Runs what is missing and compares. Returns what OUT/summary.json holds.

    Raises: SettingsError, WeightsError, StoreError, EvaluationError, before anything runs where that can be known.
    """
    if request.scheduler:  # whose workers have working folders of their own
        corpus = request.corpus.resolve() if request.corpus else None
        request = replace(request, out=request.out.resolve(), corpus=corpus)
    plan = make_plan(request)
    plan.runs = with_data(plan)
    done = refuse(plan)
    show_plan(plan, done, request.side_by_side)
    if request.plan_only:
        return {"runs": [run.name for run in plan.runs], "done": done}
    with publish.exclusive(request.out / ".lock") as mine:
        if not mine:
            raise SettingsError(f"--out {request.out}: another ablation is at work there; wait for it.")
        if len(done) < len(plan.runs):
            prepare(request, plan, done)
            plan.runs = with_data(plan, done)
            refuse(plan)
            work(request, plan, done)
        baselines.measure(request.out, plan.runs, plan.base)
        return summary.summarise(request.out, len(plan.runs))


def make_plan(request: Request) -> Plan:
    """Reads the ablations, checks settings, features, weights and files. Nothing is written."""
    ablations, base, known = load_ablations(request.preset, request.config, request.overrides)
    variants, seeds, limit = chosen(ablations, known, request.quick, request.only, request.seeds)
    features.needs(variants, base)  # refuses what no encoder can make
    corpus = request.corpus or request.out / "shapes"
    photographs = {given.images for given in ablations.benchmarks.values() if given and given.images}
    if photographs and request.corpus is None:
        raise SettingsError(
            "ablations.benchmarks ask for photographs, but the runs would train on drawn shapes: give --corpus."
        )
    if len({folder.name for folder in photographs}) < len(photographs):
        named = ", ".join(sorted(map(str, photographs)))
        raise SettingsError(
            f"ablations.benchmarks: image folders need different names, their stores are named so: {named}."
        )
    made = {"code": code_sha256(), "limit": {"questions": limit}}
    weights = {variant.name: features.frozen_weights(variant) for variant in variants}
    runs = []
    for seed in seeds:  # one seed after the other: what was stopped early is complete over fewer seeds
        for variant in variants:
            store = request.out / features.store_of(variant, base)
            runs.append(
                Run(
                    out=request.out, variant=variant.name, model=variant.model, seed=seed, changes=variant.changes,
                    settings=variant.seeded(seed), settings1=known[variant.stage1_of].seeded_stage1(seed, base),
                    stage1_of=variant.stage1_of, store=store, limit=limit, made=made | {"weights": weights[variant.name]},
                    benchmarks=_benchmarks(request, ablations, corpus, store),
                )
            )  # fmt: skip
    return Plan(ablations, base, variants, runs, corpus)


def _benchmarks(request: Request, ablations: Ablations, corpus: Path, store: Path) -> dict[str, Questions]:
    """Each benchmark's files and store. Raises EvaluationError for files that are not there."""
    drawn = corpus / "shapes.json"
    ours = request.corpus is None or drawn.is_file()
    if drawn.is_file() and (have := read_json(drawn, corpus).get("format")) != SHAPES_FORMAT:
        raise EvaluationError(
            f"{corpus} was drawn by another version (format {have}, not {SHAPES_FORMAT}) and asks other questions; move it "
            "away: it is drawn again with the same pictures, and only what is asked anew is answered again."
        )
    found = {}
    for name, given in ablations.benchmarks.items():
        if given is None:
            continue
        files, source = Files(given.questions, given.annotations), store
        if given.images is not None:
            source = store.with_name(f"eval-{given.images.name}-{store.name}")
            if not given.images.is_dir():
                raise EvaluationError(f"ablations.benchmarks.{name}.images: {given.images} is no folder.")
        if name != "diversity":
            questions, annotations = SHAPES_FILES[name]
            if given.questions is None and given.annotations is None:
                if not ours:
                    raise EvaluationError(f"ablations.benchmarks.{name}: give its files; {corpus} is no shapes corpus.")
                val = corpus / "val"
                files = Files(val / questions if questions else None, val / annotations if annotations else None)
            exists = drawn.is_file() or given.questions is not None or given.annotations is not None
            for file in (files.questions, files.annotations):
                if exists and file is not None and not file.is_file():
                    raise EvaluationError(f"ablations.benchmarks.{name}: there is no file {file}.")
        found[name] = Questions(files, source)
    return found


def refuse(plan: Plan) -> list[str]:
    """The names of the runs that are finished. Raises SettingsError where one, or a part of one, was made otherwise, and
    EvaluationError where runs of other variants in the same folder were."""
    done = []
    again = not captions_missing()
    for run in plan.runs:
        result = read_result(run.result)
        if result is not None:
            refuse_other(run.result, result["made_with"], run.made_with())
            lacks = "missing" in result["scores"].get("coco-caption", {})
            if not (lacks and again and (run.stage2 / "summary.json").is_file()):  # it was done without the extra
                done.append(run.name)
                continue
        for folder, want in ((run.stage1, run.made_stage1()), (run.stage2, run.made_stage2())):
            if (folder / "made.json").is_file():
                refuse_other(folder, read_json(folder / "made.json"), want)
    refuse_mixed(read_results(plan.runs[0].out / "results"))
    return done


def show_plan(plan: Plan, done: list[str], side_by_side: int | None) -> None:
    rows = []
    for variant in plan.variants:
        mine = [run for run in plan.runs if run.variant == variant.name]
        changes = ", ".join(f"{k}={v}" for k, v in variant.changes.items() if k != "model") or "-"
        shared = variant.stage1_of if variant.stage1_of != variant.name else "own"
        rows.append((variant.name, variant.model, changes, shared, f"{sum(r.name in done for r in mine)}/{len(mine)}"))
    table("ablation", ("variant", "model", "changes", "stage 1", "done"), rows)
    for store, need in plan.needs(done).items():
        path = plan.runs[0].out / store
        wanted = [f"CLIP blocks {', '.join(map(str, need.layers))}"]
        wanted += [f"{need.draws} MAE draws at {need.ratio:g}"] if need.draws else []
        wanted += ["the MAE on whole images"] if need.whole else []
        lacking = features.missing(need, path)
        say(
            f"{path}: {', '.join(wanted)}; "
            + (f"{len(lacking)} arrays to extract" if lacking else "nothing to extract")
        )
    if len(done) < len(plan.runs):
        say(f"{len(plan.runs) - len(done)} runs to do; {Clock(plan.runs, done, side_by_side).left()}")


def prepare(request: Request, plan: Plan, done: list[str]) -> None:
    """Draws the corpus and extracts what is missing, each once, through the same commands that a user types."""
    common = ["--preset", request.preset] + (["--config", str(request.config)] if request.config else [])
    for assignment in [*request.overrides, *[f"{k}={json.dumps(v)}" for k, v in plan.ablations.base.items()]]:
        common += ["--set", assignment]
    if request.corpus is None and not (plan.corpus / "shapes.json").is_file():
        request.command(["corpus", "shapes", "--out", str(plan.corpus), *common])
    elsewhere = {given.images for given in plan.ablations.benchmarks.values() if given and given.images}
    for name, need in plan.needs(done).items():
        store = request.out / name
        sources = {store: plan.corpus} | {store.with_name(f"eval-{i.name}-{name}"): i for i in elsewhere}
        for target, source in sources.items():
            if features.missing(need, target):
                if target != (base := target.with_name(target.name.replace(name, "store.zarr"))):
                    features.share(base, target)
                for line in features.lines(need, target, source):
                    say(f"\n$ xformer {' '.join(line)}")
                    request.command([*line, *common, *(["--gpus"] if request.gpus else [])])


def with_data(plan: Plan, done: list[str] | None = None) -> list[Run]:
    """The runs, with one hash of their images and captions, one of each benchmark's files, and the fingerprints of the
    features that they read; UNKNOWN where the store or the corpus is not there.

    Args:
        done: for all but these runs everything must be there now. Raises EvaluationError or StoreError where it is not.
    """
    stores = {q.store for run in plan.runs for q in run.benchmarks.values()} | {run.store for run in plan.runs}
    images = {store: features.data_sha256(store) if features.indexed(store) else UNKNOWN for store in stores}
    files = {f for run in plan.runs for q in run.benchmarks.values() for f in files_of(q)}
    if done is not None and (gone := sorted(str(file) for file in files if not file.is_file())):
        raise EvaluationError(f"a benchmark's file is not there: {gone[0]}.")
    known = {file: sha256_of(file) for file in files if file.is_file()}
    lacking = {}
    for variant in plan.variants:
        ((store, need),) = features.needs([variant], plan.base).items()
        lacking[variant.name] = features.missing(need, plan.runs[0].out / store)
    read: dict[str, dict[str, Any]] = {}  # by variant: the same for every seed
    runs = []
    for run in plan.runs:
        data = {"corpus": images[run.store]}
        for name, questions in run.benchmarks.items():
            parts = [known.get(file, UNKNOWN) for file in files_of(questions)]
            parts += [images[questions.store]] if questions.store != run.store else []
            data[name] = UNKNOWN if UNKNOWN in parts else "".join(part[:16] for part in parts)
        elsewhere = [q.store for q in run.benchmarks.values() if not features.indexed(q.store)]
        must = done is not None and run.name not in done
        if must or not (lacking[run.variant] or elsewhere):
            if run.variant not in read:
                read[run.variant] = {"all": features.arrays_read(run), "1": features.arrays_read(run, ("stage1",))}
            arrays = read[run.variant]
            runs.append(replace(run, made=run.made | {"data": data, "features": arrays["all"]}, features1=arrays["1"]))
        else:
            runs.append(replace(run, made=run.made | {"data": data, "features": UNKNOWN}))
    return runs


def files_of(questions: Questions) -> list[Path]:
    return [file for file in (questions.files.questions, questions.files.annotations) if file is not None]


def work(request: Request, plan: Plan, done: list[str]) -> None:
    """Every run that is not done: one after the other here, or on Dask workers."""
    todo = [run for run in plan.runs if run.name not in done]
    if any("coco-caption" in run.benchmarks for run in todo) and (reason := captions_missing()):
        say(f"coco-caption is not measured: {reason}")
    begun = [run for run in todo if checkpoints(run.stage1) or checkpoints(run.stage2)]
    count = len(done)
    say(f"\n{len(todo)} of {len(plan.runs)} runs to do" + (f", {len(begun)} of them begun" if begun else ""))
    clock = Clock(plan.runs, done, request.side_by_side)
    if request.workers > 1 or request.gpus or request.scheduler:
        finished: Iterator[Run] = on_dask(todo, request.workers, request.gpus, request.scheduler)
        for run in finished:
            count += 1
            say(f"[{count}/{len(plan.runs)}] {run.name} is done; {clock.after(run)}")
        return
    for run in todo:
        count += 1
        say(f"\n[{count}/{len(plan.runs)}] {run.name}; {clock.left()}")
        train_first(run)
        finish(run)
        clock.after(run)
