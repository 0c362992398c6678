"""Scoring 214,354 answers (VQAv2's validation size), and query features from the cache beside encoding the images."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from xformer.console import table

QUESTIONS = 214_354
SCORE = r"""
import re, resource, sys, time
from pathlib import Path
began = time.perf_counter()
from xformer.console import set_quiet
from xformer.evaluation.run import Request, evaluate
from xformer.evaluation.suite import Files
set_quiet(True)
here = Path(sys.argv[1])
files = Files(here / "q.json", here / "a.json")
evaluate(Request("vqav2", here / "out", files, here / "r.json"), lambda *_: here)
used = resource.getrusage(resource.RUSAGE_SELF)
status = Path("/proc/self/status").read_text()  # ru_maxrss would begin with the parent's
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)
"""


def write_answers(folder: Path, count: int) -> None:
    """Questions, ten answers each, and predictions with the shapes of VQAv2's files, from a seed."""
    import random

    draw = random.Random(0)
    words = [f"{a} {b}" if draw.random() < 0.3 else b for a in ("red", "two", "a") for b in map(str, range(3000))]
    kinds = ("yes/no", "number", "other")
    questions, truths, results = [], [], []
    for i in range(count):
        key, kind = {"question_id": 1000 * i + 1, "image_id": i // 5}, kinds[draw.choices((0, 1, 2), (38, 13, 49))[0]]
        common = draw.choice(("yes", "no")) if kind == "yes/no" else draw.choice(words)
        given = [common if draw.random() < 0.6 else draw.choice(words) for _ in range(10)]
        answers = [{"answer": a, "answer_confidence": "yes", "answer_id": k + 1} for k, a in enumerate(given)]
        questions.append(key | {"question": f"What is the number {i} of the things in the picture?"})
        kind_of = {"question_type": f"what {i % 65}", "answer_type": kind, "multiple_choice_answer": common}
        truths.append(key | kind_of | {"answers": answers})
        results.append({"question_id": key["question_id"], "answer": draw.choice(given) + draw.choice(("", ".", " !"))})
    for name, content in (("q", {"questions": questions}), ("a", {"annotations": truths}), ("r", results)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def scoring() -> dict:
    """`xformer eval vqav2 --results` in a fresh process on one core, everything included: reading, both scorers,
    intervals, the page; seconds and peak memory against the limits of 60 s and 2 GB."""
    with tempfile.TemporaryDirectory() as folder:
        write_answers(Path(folder), QUESTIONS)
        line = [sys.executable, "-c", SCORE, folder]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        seconds, processor, peak = map(float, done.stdout.split())
    found = {
        "answers": QUESTIONS,
        "seconds": seconds,
        "processor seconds": processor,  # what a core of its own would take
        "peak (MiB)": peak,
        "processor seconds : 60": processor / 60,
        "peak : 2 GB": peak / 1907,
    }
    table("scoring VQAv2, both scorers", ("", "value"), found.items())
    return found


def queries() -> dict:
    """At the paper's widths on the CPU, random weights: queries of one image from cached tokens, and from the picture (ViT-g
    and MAE ViT-H, which are the same work whatever their weights); generation with OPT-2.7b by operation counts."""
    import numpy as np
    import timm
    import torch
    from transformers import ViTMAEConfig, ViTMAEModel

    from pipeline.index import Index
    from pipeline.store import FeatureArray, create_array, write_shard
    from xformer.model import build_xformer
    from xformer.settings import load_settings

    settings = load_settings("paper")
    torch.manual_seed(0)
    images, tokens, visible = 4, 257, 65
    xformer = build_xformer(settings, "xformer", vocabulary=0).eval()
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"queries from the cache": [], "encoding": []}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        store = Path(folder) / "s.zarr"
        index = Index.__new__(Index)
        index.folder, index.count, index.shard_rows, index.shards = store / "index", 64, 64, 1
        for name, shape in (("clip/39/tokens", (tokens, 1408)), ("mae/draw-0/tokens", (visible, 1280))):
            create_array(store, name, index, shape, "float16", {"a": 1}, {})
            block = draw.standard_normal((64, *shape), np.float32).astype(np.float16)
            write_shard(store, name, index, 0, block, [str(i) for i in range(64)], [], 0.0)
        clip = FeatureArray(store, "clip/39/tokens", index)
        mae = FeatureArray(store, "mae/draw-0/tokens", index)

        def cached() -> None:
            rows = draw.permutation(64)[:images]
            xformer(torch.from_numpy(clip.read(rows)).float(), torch.from_numpy(mae.read(rows)).float())

        giant: Any = timm.create_model(settings.clip.architecture, num_classes=0).eval()
        huge = ViTMAEModel(ViTMAEConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16,
                                        intermediate_size=5120, patch_size=14, mask_ratio=0.75)).eval()  # fmt: skip
        pixels = torch.randn(images, 3, 224, 224)

        def encoding() -> None:
            giant.forward_features(pixels)
            huge(pixels)

        for name, run in (("queries from the cache", cached), ("encoding", encoding)):
            for _ in range(3):
                began = time.perf_counter()
                run()
                seconds[name].append((time.perf_counter() - began) / images)
    found = {f"{name} (s per image)": statistics.median(values) for name, values in seconds.items()}
    q, e = found["queries from the cache (s per image)"], found["encoding (s per image)"]
    found["from images : from the cache"] = (q + e) / q
    # Generation, counted: OPT-2.7b has 2.65e9 weights, 2 operations each per token and beam; 32 queries and about 15
    # prompt tokens are read once, then each of at most 10 tokens is written by 5 beams.
    operations = 2 * 2.65e9 * (32 + 15 + 5 * 10)
    flops = 521e9 / max(e * 521 / (521 + 83), 1e-9)  # what the encoders reached on this machine
    found["generation, OPT-2.7b, GFLOP per question"] = operations / 1e9
    found["generation at the encoders' speed (s per question)"] = operations / flops
    found["whole question, from images : from the cache"] = (q + e + operations / flops) / (q + operations / flops)
    table("query features at the paper's widths", ("", "value"), [(k, f"{v:.3f}") for k, v in found.items()])
    return found
