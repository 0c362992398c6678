"""Extraction against the bare encoder: one process, two Dask workers; and the plan's seconds against real ones.

A ViT-B/16 with random weights, 224 pixels, on drawn JPEGs. Rates are those of the steady state: between the results of an
early and a late shard, so that neither the first decode nor the last write counts. Bare passes are timed before and after
every extraction, whose ratio is to their mean, and processor seconds stand beside, since other work on the machine comes
and goes. Two to four minutes each on two idle cores.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from xformer.console import quietly, say, table

ROWS = BATCH = 8
SHARDS, ROUNDS, PASSES = 7, 4, 2  # of one process; PASSES of the bare encoder before and after
WORKER_ROWS, WORKER_SHARDS, WORKER_ROUNDS, WORKER_PASSES = 4, 30, 3, 6  # of two workers


PLANNED = 800  # images of the plan's real run


def prepare(folder: Path, pictures: int) -> tuple[Any, Any]:
    """A corpus of drawn JPEGs and settings with a random ViT-B."""
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    from pipeline.corpora import open_corpus
    from xformer.settings import load_settings

    (folder / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for number in range(pictures):
        coarse = draw.integers(0, 255, (30, 40, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((320, 240)).save(folder / f"pictures/{number:04d}.jpg", quality=90)
    (folder / "vit").mkdir()
    name = "vit_base_patch16_224"
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "vit/model.safetensors")
    given = [f"clip.weights={folder / 'vit'}", f"clip.architecture={name}", "clip.width=768", "clip.layers=[12]"]
    given += ["clip.autocast=fp32", f"clip.batch={BATCH}"]
    return open_corpus(folder / "pictures"), load_settings("paper", overrides=given)


def declared(corpus: Any, path: Path, settings: Any) -> tuple[Any, Any]:
    """A store with an index and declared arrays, and everything that is to do in it."""
    from pipeline import cluster
    from pipeline.extract import declare, plan_index, wanted

    index = plan_index(path, corpus, settings, None)
    specs = wanted("clip", settings, False)
    declare(path, index, specs, settings, corpus, False)
    job = cluster.Job(str(path), settings.model_dump_json(), str(corpus.root), False)
    return job, {shard: (list(specs), []) for shard in range(index.shards)}


def steady(results: Iterable[dict], skip: int) -> tuple[float, float]:
    """Wall and processor seconds per image from the end of shard number `skip` to that of the last but `skip`, in the
    order in which they ended: shards in flight overtake each other, and those that wait to be handed on are done."""
    ends = sorted((result["ended"], result["processor"], result["rows"]) for result in results)[skip : -skip or None]
    rows = sum(rows for _, _, rows in ends[1:])
    return (ends[-1][0] - ends[0][0]) / rows, (ends[-1][1] - ends[0][1]) / rows


BARE = """
import sys, time
from pathlib import Path
import torch
from benchmarks.extraction import bare_pass
from pipeline.encode import encoder
torch.set_num_threads(1)
model, rounds = encoder("clip", Path(sys.argv[1]).read_text()), int(sys.argv[2])
run = bare_pass(model, int(sys.argv[3]))
run()
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
for _ in range(rounds):
    run()
print(time.perf_counter() - began)
"""


def bare_pass(model: Any, rows: int) -> Callable[[], float]:
    """The forward pass alone on one prepared batch; returns its processor seconds."""
    import torch

    batch = torch.randn(rows, 3, 224, 224)

    def run() -> float:
        began = time.process_time()
        with torch.inference_mode():
            model.model.forward_intermediates(
                batch, indices=[11], return_prefix_tokens=True, norm=False, stop_early=True, output_fmt="NLC",
                intermediates_only=True,
            )  # fmt: skip
        return time.process_time() - began

    return run


def one_process(folder: Path) -> dict[str, float]:
    """Bare forward passes and extractions in turn, in this process, with the same threads."""
    from pipeline import cluster
    from pipeline.encode import encoder
    from xformer.settings import with_overrides

    corpus, settings = prepare(folder, ROWS * SHARDS)
    settings = with_overrides(settings, [f"store.shard_rows={ROWS}"])
    run = bare_pass(encoder("clip", settings.model_dump_json()), BATCH)
    run()

    def bare_now() -> tuple[float, float]:
        began = time.perf_counter()
        worked = sum(run() for _ in range(PASSES))
        return (time.perf_counter() - began) / (PASSES * BATCH), worked / (PASSES * BATCH)

    bare, ours = [bare_now()], []
    for number in range(ROUNDS):
        job, todo = declared(corpus, folder / f"{number}.zarr", settings)
        ours.append(steady(cluster.run_here(job, todo, 1, None), 1))
        bare.append(bare_now())
        line(
            f"round {number + 1} of {ROUNDS}, ms per image: bare {1e3 * bare[-1][0]:.0f}, extraction {1e3 * ours[-1][0]:.0f}"
        )
    wall, worked = ([b / o[part] for b, o in zip(neighbours(bare, part), ours, strict=True)] for part in (0, 1))
    return {
        "bare encoder, ms per image": 1e3 * statistics.median(seconds for seconds, _ in bare),
        "extraction, ms per image": 1e3 * statistics.median(seconds for seconds, _ in ours),
        "extraction : bare encoder, rate": statistics.median(wall),
        "lowest of the rounds": min(wall),
        "the same in processor time": statistics.median(worked),
    }


def neighbours(found: list[tuple[float, float]], part: int) -> list[float]:
    """The mean of each two measurements that follow each other."""
    return [(before[part] + after[part]) / 2 for before, after in pairwise(found)]


def line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def two_workers(folder: Path) -> dict[str, float]:
    """Two Dask workers of one thread against two processes that do nothing but forward passes."""
    from pipeline import cluster
    from xformer.settings import with_overrides

    corpus, settings = prepare(folder, WORKER_ROWS * WORKER_SHARDS)
    settings = with_overrides(settings, [f"store.shard_rows={WORKER_ROWS}"])
    (folder / "settings.json").write_text(settings.model_dump_json())

    def bare_now() -> float:
        command = [sys.executable, "-c", BARE, str(folder / "settings.json"), str(WORKER_PASSES), str(WORKER_ROWS)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        children = [subprocess.Popen(command, **pipes) for _ in range(2)]
        for child in children:
            assert child.stdout is not None and child.stdout.readline().strip() == "ready"
        seconds = [float(out.split()[-1]) for out in _start_together(children)]
        return sum(WORKER_PASSES * WORKER_ROWS / s for s in seconds)

    bare, ours = [bare_now()], []
    for number in range(WORKER_ROUNDS):
        job, todo = declared(corpus, folder / f"w{number}.zarr", settings)
        wall, _ = steady(cluster.run_on_dask(job, todo, 2, None), 8)  # all are at work, and not one alone
        ours.append(1 / wall)
        bare.append(bare_now())
        line(f"round {number + 1} of {WORKER_ROUNDS}, images/s: bare {bare[-1]:.2f}, two workers {ours[-1]:.2f}")
    ratios = [o / (b + a) * 2 for o, (b, a) in zip(ours, pairwise(bare), strict=True)]
    return {
        "two bare encoders, images/s": statistics.median(bare),
        "two workers, images/s": statistics.median(ours),
        "two workers : two bare encoders": statistics.median(ratios),
        "lowest of the rounds": min(ratios),
    }


def _start_together(children: list) -> list[str]:
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    return [child.communicate()[0] for child in children]


def extraction() -> dict[str, Any]:
    """Both comparisons, each in a folder of its own."""
    found = {}
    for title, run in (("one process", one_process), ("two Dask workers, one thread each", two_workers)):
        with tempfile.TemporaryDirectory() as folder, quietly():
            found[title] = run(Path(folder))
        table(f"extraction with a ViT-B, {title}", ("", "value"), found[title].items())
    return found


def planned() -> dict[str, Any]:
    """The plan's seconds for this machine against the same extractions and trainings, done: predicted : measured."""
    from pipeline.corpora import open_corpus
    from pipeline.extract import extract
    from pipeline.plan import Machine, plan
    from pipeline.shapes import write_shapes
    from xformer import operations
    from xformer.settings import load_settings
    from xformer.train import train_stage1, train_stage2

    few = [
        "train.max_steps=60",
        "train.validate_every=1000000",
        "train.save_every=1000000",
        "stage1.validate_batches=1",
    ]
    settings, found = load_settings(overrides=few), {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        with quietly():
            write_shapes(here / "shapes", PLANNED, 100, seed=0)
        source, counted = open_corpus(here / "shapes"), operations.encoder_operations(settings)
        report = plan(
            source, None, settings, Machine(8, 125.0, None), counted,
            lambda captions: operations.training_costs(settings, "xformer", counted["clip_tokens"], captions, "cpu"),
            lambda: operations.encoder_rate(settings, "cpu"), False, here / "s.zarr",
        )  # fmt: skip
        real: dict[str, float] = {}
        with quietly():
            for kind in ("clip", "mae"):
                done = extract(source, here / "s.zarr", [kind], settings, in_process=True)
                real[f"extract {kind}"] = done["encoders"][kind]["seconds"]
                line(f"extract {kind}: {real[f'extract {kind}']:.1f} s")
            stage1 = train_stage1([here / "s.zarr"], here / "1", settings, "xformer", False)
            stage2 = train_stage2([here / "s.zarr"], here / "1", here / "2", settings, None, False)
            line(f"train: {stage1['seconds']:.1f} s and {stage2['seconds']:.1f} s")
            real |= {"train stage 1": stage1["seconds"], "train stage 2": stage2["seconds"]}
        size = done["bytes"]
    rows = [
        (p["phase"], p["here_seconds"], real[p["phase"]], p["here_seconds"] / real[p["phase"]])
        for p in report["phases"][1:]  # the first, reading every image once, is a tenth of a second here: all start-up
    ]
    table("plan against a real small run (seconds)", ("phase", "planned", "measured", "planned : measured"), rows)
    say(f"bytes: planned {report['bytes']:,}, stored {size:,}")
    for name, predicted, measured, ratio in rows:
        found[name] = {"planned": predicted, "measured": measured, "ratio": ratio}
    return found | {"bytes": {"planned": report["bytes"], "stored": size}}


if __name__ == "__main__":
    print(json.dumps({"extraction": extraction(), "plan": planned()}, indent=2))
