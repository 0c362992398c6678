"""The command line. Every command is one call; heavy imports happen inside it, so that --help is quick."""

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from xformer.errors import SettingsError, Stopped, UserError
from xformer.evaluation.command import eval_command

app = typer.Typer(
    name="xformer",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="X-Former (ECCV 2024): frozen encoders run once into a Zarr store, light trainers read it again and again.\n\n"
    "A first run in an empty folder:  xformer extract --encoder clip ; xformer extract --encoder mae ;  "
    "xformer train --stage 1 --features store.zarr ; xformer train --stage 2 --features store.zarr ; "
    "xformer eval vqav2.  All of it at once: xformer demo --out demo",
)
corpus_app = typer.Typer(no_args_is_help=True, help="Draw the embedded corpus, or look at what a corpus holds.")
store_app = typer.Typer(no_args_is_help=True, help="Look at a feature store and check every byte of it.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(store_app, name="store")


class Encoder(StrEnum):
    clip = "clip"
    mae = "mae"


class Pretrained(StrEnum):
    clip = "clip"
    mae = "mae"
    llm = "llm"
    text = "text"


class Model(StrEnum):
    xformer = "xformer"
    qformer = "qformer"
    concat = "concat"
    early = "early"


class Task(StrEnum):
    vqa = "vqa"
    caption = "caption"


class Dtype(StrEnum):
    fp16 = "fp16"
    int8 = "int8"


NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO, errno.ESTALE)
WRONG_PLACE = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
Preset = Annotated[str, typer.Option(help="tiny (a laptop, embedded weights) or paper.")]
Config = Annotated[Path | None, typer.Option(help="A YAML file laid out as stages.yaml, holding any part of it.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. train.lr=1e-4; may be repeated.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the settings' seed.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Only errors and results as JSON.")]
Store = Annotated[Path, typer.Option(help="The feature store.")]
Pictures = Annotated[Path | None, typer.Option(help="Where the pictures lie now; left out, where they lay.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Dask worker processes on this machine.")]
Gpus = Annotated[bool, typer.Option("--gpus", help="Each worker uses one CUDA device.")]
Scheduler = Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")]


def _settings(preset: str, config: Path | None, overrides: list[str] | None, seed: int | None, quiet: bool):
    from xformer import console
    from xformer.settings import load_settings

    console.set_quiet(quiet or os.environ.get("RANK", "0") != "0")  # of several processes one speaks
    return load_settings(preset, config, overrides or [], seed)


@corpus_app.command("shapes")
def corpus_shapes(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    train: Annotated[int | None, typer.Option(help="Training pictures.")] = None,
    val: Annotated[int | None, typer.Option(help="Validation pictures, with questions.")] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Draw the embedded corpus: pictures of coloured shapes, captions, and questions in the real formats."""
    settings = _settings(preset, config, set_, seed, quiet)
    from pipeline.shapes import write_shapes
    from xformer.console import table

    report = write_shapes(
        out,
        settings.corpus.train if train is None else train,
        settings.corpus.val if val is None else val,
        settings.seed,
        settings.image_size if preset == "tiny" else 224,
    )
    table(f"shapes corpus in {out}", ("what", "count"), report.items())


@corpus_app.command("info")
def corpus_info(
    source: Annotated[
        Path,
        typer.Argument(help="A shapes folder, tars, a COCO or Visual Genome JSON, a CSV, TSV or Parquet, or pictures."),
    ],
    images: Annotated[Path | None, typer.Option(help="The pictures of a caption file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Read a whole corpus: images, captions, and every broken file with its reason."""
    settings = _settings("tiny", None, None, None, quiet)
    from pipeline.survey import survey

    survey(source, images, settings.corpus.max_image_pixels, json_file)


@app.command()
def pretrain(
    what: Annotated[Pretrained, typer.Argument(help="Which tiny frozen model to make again.")],
    corpus: Annotated[Path, typer.Option(help="A shapes corpus.")],
    out: Annotated[Path, typer.Option(help="Folder for weights and card.")],
    steps: Annotated[int | None, typer.Option(help="Training steps; left out, what the shipped weights had.")] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Make one of the embedded frozen models again (clip, mae, llm), or the text tokenizer."""
    settings = _settings(preset, config, set_, seed, quiet)
    more = {} if steps is None else {"steps": steps}
    if what is Pretrained.clip:
        from pipeline.pretrain_clip import pretrain_clip

        pretrain_clip(corpus, out, settings.clip, settings.image_size, settings.seed, **more)
    elif what is Pretrained.mae:
        from pipeline.pretrain_mae import pretrain_mae

        pretrain_mae(corpus, out, settings.mae, settings.image_size, settings.seed, **more)
    elif what is Pretrained.llm:
        from pipeline.pretrain_llm import pretrain_llm

        pretrain_llm(corpus, out, settings.seed, **more)
    else:
        from pipeline.pretrain_text import write_text_tokenizer

        write_text_tokenizer(corpus, out)


@app.command()
def extract(
    encoder: Annotated[list[Encoder], typer.Option(help="clip, mae, or both (repeat the option).")],
    corpus: Annotated[Path | None, typer.Option(help="The corpus; left out, the shapes corpus in ./shapes.")] = None,
    images: Annotated[Path | None, typer.Option(help="The pictures of a caption file.")] = None,
    store: Store = Path("store.zarr"),
    draws: Annotated[int | None, typer.Option(min=1, help="Mask draws to store; epoch e reads draw e mod K.")] = None,
    mask_ratio: Annotated[float | None, typer.Option(help="Share of patches the MAE does not see; 0 = none.")] = None,
    layers: Annotated[str | None, typer.Option(help="CLIP blocks to cache, 1-based, e.g. 39,26,28,30.")] = None,
    views: Annotated[
        int | None, typer.Option(min=1, help="Augmentation views; draw d is made on view d mod V.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="fp16, or int8 with scales.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="int8 even where it loses more than the settings allow.")
    ] = False,
    shard_rows: Annotated[int | None, typer.Option(min=1, help="Images per shard: one unit of work.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images of the corpus.")] = None,
    workers: Workers = None,
    gpus: Gpus = False,
    scheduler: Scheduler = None,
    weights: Annotated[str | None, typer.Option(help="Folder, embedded:NAME, or hub:OWNER/NAME@REVISION.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Run frozen encoders once over a corpus, into the store. Rerunning does only what is missing."""
    overrides = list(set_ or [])
    if layers is not None:
        overrides.append(f"clip.layers=[{layers}]")
    given = {"mae.draws": draws, "mae.mask_ratio": mask_ratio, "store.shard_rows": shard_rows, "store.views": views}
    for key, value in (given | {"store.dtype": dtype.value if dtype else None}).items():
        overrides += [] if value is None else [f"{key}={value}"]
    if weights is not None:
        overrides += [f"{kind.value}.weights={weights}" for kind in encoder]
    settings = _settings(preset, config, overrides, seed, quiet)
    from pipeline.corpora import open_corpus
    from pipeline.shapes import ensure_shapes
    from pipeline.survey import report_extraction

    kinds = list(dict.fromkeys(kind.value for kind in encoder))
    source = open_corpus(corpus or ensure_shapes(Path("shapes"), settings), images)
    from pipeline.extract import extract as run

    report = run(source, store, kinds, settings, limit, workers=workers, scheduler=scheduler, gpus=gpus, force=force)
    report_extraction(report, json_file)


@app.command()
def plan(
    corpus: Annotated[Path | None, typer.Option(help="The corpus; left out, --images must be given.")] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Plan for so many images; 14000000 is the paper's.")] = None,
    root: Annotated[Path | None, typer.Option(help="The pictures of a caption file.")] = None,
    store: Store = Path("store.zarr"),
    gpus_count: Annotated[int, typer.Option(min=1, help="GPUs to plan for.")] = 8,
    gpu_tflops: Annotated[float, typer.Option(min=0.001, help="What each achieves; 125 is 40% of an A100.")] = 125.0,
    storage_gbs: Annotated[float | None, typer.Option(min=0.001, help="GB/s that the storage delivers.")] = None,
    gpus: Annotated[bool, typer.Option("--gpus", help="Probe this machine's GPU instead of its CPU.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the plan here.")] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """What it will cost, before anything runs: bytes, hours, read rate, and when the cache pays.

    Draws, layers, views, dtype and recipe come from the settings, e.g. --set mae.draws=4 --set store.dtype=int8.
    """
    settings = _settings(preset, config, set_, seed, quiet)
    from pipeline.corpora import open_corpus
    from pipeline.plan import Machine
    from pipeline.plan import plan as run
    from pipeline.plan_tables import show
    from xformer import operations, publish

    if corpus is None and images is None:
        raise UserError("plan: give --corpus SRC, --images N, or both.")
    source = open_corpus(corpus, root) if corpus is not None else None
    device, counted = "cuda" if gpus else "cpu", operations.encoder_operations(settings)
    machine = Machine(gpus_count, gpu_tflops, storage_gbs)

    def training(captions: list[str]) -> dict:
        return operations.training_costs(settings, "xformer", counted["clip_tokens"], captions, device)

    def encoder_rate() -> float:
        return operations.encoder_rate(settings, device)

    report = run(source, images, settings, machine, counted, training, encoder_rate, gpus, store)
    show(report)
    if json_file:
        publish.write_json(json_file, report)


@store_app.command("info")
def store_info(
    store: Annotated[Path, typer.Argument()],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Arrays, shapes, bytes, committed shards, seconds of encoding, and dead letters."""
    _settings("tiny", None, None, None, quiet)
    from pipeline.survey import report_store
    from pipeline.upkeep import info

    report_store(info(store), json_file)


@store_app.command("verify")
def store_verify(
    store: Annotated[Path, typer.Argument()],
    repair: Annotated[bool, typer.Option("--repair", help="Make exactly the damaged shards again.")] = False,
    source: Annotated[bool, typer.Option("--source", help="Compare the pictures with the index instead.")] = False,
    images: Pictures = None,
    workers: Workers = None,
    gpus: Gpus = False,
    scheduler: Scheduler = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Compare every byte of every committed shard with its record.

    --repair makes shards again from the pictures; until then their old commits stay. Nothing else is touched.
    """
    _settings("tiny", None, None, None, quiet)
    from pipeline import audit, sources
    from pipeline.places import shown
    from xformer import publish
    from xformer.console import say
    from xformer.errors import StoreError

    if repair and source:
        raise UserError("verify: --repair mends shards and --source looks at pictures; give one of them.")
    name, what, repaired = shown(store), "damaged", []
    if source:
        problems, what = sources.changed(store, images), "changed"
    elif repair:
        from pipeline.redo import repair as run

        repaired, problems = run(store, images, workers=workers, gpus=gpus, scheduler=scheduler)
    else:
        problems = audit.verify(store)
    for problem in problems:
        print(problem, file=sys.stderr)
    if json_file:
        publish.write_json(json_file, {"store": name, what: problems, "repaired": repaired})
    if problems and source:
        raise StoreError(f"{name} was planned over other pictures: {len(problems)} differ; give another --store.")
    if problems:
        again = "what remains is said above" if repair else f"run: xformer store verify {name} --repair"
        raise StoreError(f"damaged parts of {name}: {len(problems)}; {again}.")
    for line in repaired:
        say(f"mended: {line}")
    say(f"{name}: " + ("every picture is the one that was planned" if source else "every committed shard is intact"))
    for line in [] if source else audit.unfinished(store):
        say(f"{line}; run the same extraction again to finish it")


@store_app.command("show")
def store_show(
    store: Annotated[Path, typer.Argument()],
    ids: Annotated[list[str] | None, typer.Option("--id", help="An image id; may be repeated.")] = None,
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many rows, spread over the store.")] = 6,
    out: Annotated[Path, typer.Option(help="A PNG.")] = Path("rows.png"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """A contact sheet of rows: image, masks, and what is cached."""
    _settings("tiny", None, None, None, quiet)
    from pipeline.contact import contact_sheet
    from pipeline.places import shown
    from xformer import publish
    from xformer.console import say

    drawn = contact_sheet(store, ids or [], rows, out)
    say(f"{', '.join(drawn)} drawn in {out}")
    if json_file:
        publish.write_json(json_file, {"store": shown(store), "ids": drawn, "picture": str(out)})


@store_app.command("fidelity")
def store_fidelity(
    store: Annotated[Path, typer.Argument()],
    images: Pictures = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """What int8 loses: relative RMSE, cosine and the worst token, against fp16 on a sample."""
    _settings("tiny", None, None, None, quiet)
    from pipeline.fidelity import report

    report(store, json_file, images)


@store_app.command("retry")
def store_retry(
    store: Annotated[Path, typer.Argument()],
    images: Pictures = None,
    workers: Workers = None,
    gpus: Gpus = False,
    scheduler: Scheduler = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Try dead letters again whose picture can be read by now; only their shards are made again.

    A row is fixed by its picture's sha256: what was unusable at planning or has changed since stays dead.
    """
    _settings("tiny", None, None, None, quiet)
    from pipeline.places import shown
    from pipeline.redo import retry
    from xformer import publish
    from xformer.console import say

    done = retry(store, images, workers=workers, gpus=gpus, scheduler=scheduler)
    say(
        f"{shown(store)}: {done['looked at']} dead rows looked at, {done['tried']} tried again, {done['dead']} dead "
        "letters left" + ("; mended pictures belong into a new store" if done["dead"] else "")
    )
    if json_file:
        publish.write_json(json_file, {"store": shown(store), **done})


@store_app.command("merge")
def store_merge(
    store: Annotated[Path, typer.Argument(help="The store to fill; a new one, or one of the same corpus.")],
    sources: Annotated[list[Path], typer.Argument(help="Stores that were made elsewhere.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Copy committed shards of other stores of the same corpus into one; each is checked, what differs is refused."""
    _settings("tiny", None, None, None, quiet)
    from pipeline.merge import merge
    from xformer import publish
    from xformer.console import say

    done = merge(store, sources)
    say(f"{store}: {done['copied']} shards copied ({done['bytes'] / 1e6:,.1f} MB), {done['kept']} kept")
    for name, count in done["missing"].items():
        say(f"{name} still lacks {count} shards")
    if json_file:
        publish.write_json(json_file, done)


@store_app.command("gc")
def store_gc(
    store: Annotated[Path, typer.Argument()],
    drop: Annotated[list[str] | None, typer.Option(help="An array or prefix, e.g. mae/draw-3 or clip/26.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Remove what killed extractions left behind, and with --drop whole encoders, layers or draws."""
    _settings("tiny", None, None, None, quiet)
    from pipeline.places import shown
    from pipeline.upkeep import drop as run
    from xformer import publish
    from xformer.console import say

    gone, freed = run(store, drop or [])
    if json_file:
        publish.write_json(json_file, {"store": shown(store), "removed": gone, "bytes": freed})
    say(
        f"{shown(store)}: {len(gone)} things removed, {freed / 1e6:,.1f} MB free"
        + "".join(f"\n  {name}" for name in gone[:20])
    )


@app.command()
def train(
    stage: Annotated[
        int, typer.Option(min=1, max=2, help="1: ITC + ITM + ITG + reconstruction; 2: align with the LLM.")
    ],
    features: Annotated[list[Path], typer.Option(help="A feature store; may be repeated.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; left out, runs/stage1 or runs/stage2.")] = None,
    init: Annotated[
        Path | None, typer.Option(help="The stage-1 run to start from; stage 2: left out, runs/stage1.")
    ] = None,
    model: Annotated[Model | None, typer.Option(help="Left out: xformer, or what the stage-1 run was.")] = None,
    llm: Annotated[str | None, typer.Option(help="Stage 2: weights of another frozen OPT.")] = None,
    task: Annotated[
        Task | None, typer.Option(help="Stage 2: fine-tune a stage-2 run (--init, left out runs/stage2) on this.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(help="--task vqa: VQAv2's question file, or a list with image_id, question, answer.")
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="--task vqa: VQAv2's annotation file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Train on cached features; on several GPUs: accelerate launch --no_python xformer train ..."""
    overrides = list(set_ or []) + ([] if llm is None else [f"llm.weights={llm}"])
    settings = _settings(preset, config, overrides, seed, quiet)
    if stage == 1 and task is not None:
        raise SettingsError("--task fine-tunes a stage-2 run; give --stage 2.")
    if task is not Task.vqa and (questions or annotations):
        raise SettingsError(
            "--questions and --annotations are read by --stage 2 --task vqa only; give it, or leave them."
        )
    from xformer.train import train_stage1, train_stage2

    if stage == 1:
        chosen = model.value if model else "xformer"
        train_stage1(features, out or Path("runs/stage1"), settings, chosen, resume, init)
    else:
        name = task.value if task else "stage2"
        chosen, doing = model.value if model else None, task.value if task else None
        run = out or Path("runs") / name
        train_stage2(features, init, run, settings, chosen, resume, doing, questions, annotations)


def _temporary(images: Path, run: Path, wanted: set[str] | None, overrides: list[str]) -> Path:
    from pipeline.temporary import temporary_store

    return temporary_store(images, run, wanted, overrides)


app.command("eval")(eval_command(_settings, _temporary))


Checkpoint = Annotated[
    Path | None, typer.Option(help="A stage-2 run, checkpoint, or saved model; left out, the newest in runs/.")
]


def _stage2(checkpoint: Path | None) -> Path:
    from xformer.checkpoint import newest_run

    return checkpoint or newest_run(Path("runs"), stage=2)


def _pictures(images: list[Path]) -> list[Path]:
    """Files as they are named; of a folder all of its pictures."""
    from pipeline.corpora import open_corpus

    found = []
    for image in images:
        found += [image / row.location for row in open_corpus(image).rows()] if image.is_dir() else [image]
    return found


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="For example: How many donuts are there?")],
    checkpoint: Checkpoint = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Answer a question about one picture."""
    _settings("tiny", None, None, None, True)
    from pipeline.temporary import picture_store
    from xformer.ask import ask as run

    folder = _stage2(checkpoint)
    run(folder, picture_store([image], folder, set_), image, question, set_ or [])


@app.command()
def caption(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or a folder: JSON lines.")],
    checkpoint: Checkpoint = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Describe pictures."""
    _settings("tiny", None, None, None, True)
    from pipeline.temporary import picture_store
    from xformer.ask import caption as run

    folder, pictures = _stage2(checkpoint), _pictures(images)
    as_lines = any(image.is_dir() for image in images)
    run(folder, picture_store(pictures, folder, set_), pictures, as_lines, set_ or [])


@app.command()
def show(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or a folder of them.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A run (of either stage), checkpoint, or saved model; left out, the newest in runs/."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for one PNG per picture.")] = Path("show"),
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Draw the masked input, its reconstruction, each query's attention, and the similarity of the queries."""
    _settings("tiny", None, None, None, True)
    from pipeline.temporary import picture_store
    from xformer.checkpoint import newest_run
    from xformer.console import set_quiet
    from xformer.show import show as run

    folder, pictures = checkpoint or newest_run(Path("runs"), stage=None), _pictures(images)
    store = picture_store(pictures, folder, set_)
    set_quiet(quiet)
    run(folder, store, pictures, out, set_ or [])


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A LAVIS or MAE .pth file, or a transformers BLIP-2 folder.")],
    out: Annotated[Path, typer.Option(help="A new folder: a run for BLIP-2, weights for an MAE.")],
    norm_pix: Annotated[
        bool | None, typer.Option("--norm-pix/--raw-pix", help="What an MAE decoder predicts, if its name is silent.")
    ] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Import BLIP-2 or MAE weights; every key is imported, ignored with a reason, or an error."""
    settings = _settings(preset, config, set_, seed, quiet)
    from xformer.importing import import_weights

    import_weights(source, out, settings, norm_pix)


@app.command()
def params(
    llm: Annotated[str | None, typer.Option(help="opt-2.7b, opt-6.7b, or a folder; left out, the settings'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """Trainable and frozen parameters of every system, part by part, beside the paper's figures."""
    settings = _settings(preset, config, set_, seed, quiet)
    from xformer.params import params as run

    run(settings, llm, as_json)


@app.command()
def ablate(
    out: Annotated[Path, typer.Option(help="Folder for the store, the runs, and one small JSON per finished run.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="The settings' quick set: the four models, two seeds.")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="Only this variant; may be repeated.")] = None,
    seeds: Annotated[str | None, typer.Option(help="For example 0,1,2; left out, the settings'.")] = None,
    corpus: Annotated[Path | None, typer.Option(help="Left out, the shapes corpus, drawn into OUT/shapes.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what would be done.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, on Dask processes of this machine.")] = 1,
    gpus: Annotated[
        bool, typer.Option("--gpus", help="Runs on the CUDA devices; --workers beyond their number share them.")
    ] = False,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """The paper's ablations on one cache: extract once, run every variant over the seeds, compare, judge the claims.

    Variants stand in stages.yaml under `ablations`. Run the same command again to go on after a stop: no finished run is
    repeated, and a run that was cut off continues from its newest checkpoint.
    """
    overrides = list(set_ or [])
    _settings(preset, config, overrides, None, quiet)
    from xformer.lab.ablate import Request
    from xformer.lab.ablate import ablate as run

    numbers = None if seeds is None else _numbers(seeds)
    run(
        Request(
            out,
            run_command,
            preset,
            config,
            overrides,
            quick,
            only or [],
            numbers,
            corpus,
            workers,
            gpus,
            scheduler,
            plan,
        )
    )


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of xformer ablate, their results/, or of demo and eval.")],
    out: Annotated[Path, typer.Option(help="The page; pictures and tables lie beside it.")] = Path("report.html"),
    quiet: Quiet = False,
) -> None:
    """One self-contained page of finished runs: claims, scores, curves, answers, reconstructions, costs, settings."""
    _settings("tiny", None, None, None, quiet)
    from xformer.lab.report import report as run

    run(runs, out)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise SettingsError(f"--seeds {text}: give whole numbers with commas between them, for example 0,1,2.")
    return [int(part) for part in parts]


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a recorded reference.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="Another, for example reference/tiny.")],
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.png.")] = Path("compare"),
    quiet: Quiet = False,
) -> None:
    """Two runs side by side: settings, losses, curves; and whether one lies in a reference's band."""
    _settings("tiny", None, None, None, quiet)
    from xformer.compare import compare as run

    run(first, second, out)


@app.command()
def reference(
    out: Annotated[Path, typer.Option(help="Folder for stage1.json, stage2.json and their pictures.")],
    seeds: Annotated[int, typer.Option(help="Runs of each stage; the band is what one more seed would do.")] = 3,
    steps: Annotated[int, typer.Option(min=3, help="Steps of each stage.")] = 300,
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    quiet: Quiet = False,
) -> None:
    """Record a short reference run over several seeds, to compare others with."""
    settings = _settings(preset, config, set_, None, quiet)
    from xformer.reference import record

    record(out, settings, seeds, steps, config, list(set_ or []), run_command)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    preset: Preset = "tiny",
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    quiet: Quiet = False,
) -> None:
    """The whole method on this machine: corpus, features, both models, both stages, scores, pictures."""
    settings = _settings(preset, config, set_, seed, quiet)
    from xformer.demo import run_demo

    run_demo(out, settings, config, list(set_ or []), run_command)


def run_command(arguments: list[str]) -> None:
    """One command line inside this process. Raises what the command raises."""
    if app(args=arguments, standalone_mode=False) == 130:  # what Typer makes of Ctrl-C
        raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; a user's mistake is one sentence on stderr and an exit code that is not 0."""
    code, words = 0, sys.argv[1:] if arguments is None else arguments
    try:
        run_command(words)
    except (KeyboardInterrupt, typer.Abort, Stopped) as stop:
        training = words[:1] == ["train"]  # demo and ablate resume their runs themselves
        how = "go on with --resume" if training else "run the same command again to go on"
        said = stop if training and isinstance(stop, Stopped) else f"stopped; what was committed stays, {how}."
        if os.environ.get("RANK", "0") == "0":
            print(f"xformer: {said}", file=sys.stderr)
        code = 130
    except UserError as error:
        print(f"xformer: {error}", file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        if error.errno in WRONG_PLACE and error.filename:
            print(f"xformer: {error.filename}: {os.strerror(error.errno)}; give another path.", file=sys.stderr)
            raise SystemExit(2) from None
        if error.errno not in NO_PLACE:
            raise
        where = f" at {error.filename}" if error.filename else ""
        again = "run again with --resume" if words[:1] == ["train"] else "run again"
        print(
            f"xformer: {os.strerror(error.errno)}{where}; what was committed stays: mend that and {again}.",
            file=sys.stderr,
        )
        code = 3
    except Exception as error:
        if _lost_another(error):  # whichever process failed says why
            if os.environ["RANK"] == "0":
                print("xformer: another process of this run ended; its own message says why.", file=sys.stderr)
            raise SystemExit(3) from None
        if isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
            print(
                "xformer: out of memory; make the batch, the model or the number of workers smaller.", file=sys.stderr
            )
            raise SystemExit(3) from None
        show = getattr(error, "show", None)  # Typer's own usage errors know how to show themselves
        if not callable(show):
            raise
        show()
        code = getattr(error, "exit_code", 2)
    if code:
        raise SystemExit(code)


def _lost_another(error: Exception) -> bool:
    """Whether a run of several processes broke here because another of them is gone (gloo's and NCCL's own errors)."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or "gloo/transport" in str(error)


if __name__ == "__main__":
    main()
