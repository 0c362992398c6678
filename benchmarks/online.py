"""What the cache buys and what our loop costs, as ratios measured side by side in one run.

python -m benchmarks.online [stage1] [stage2] [overhead] [--json FILE]

A step from the cache against the same step with both encoders run online on the same images: widths and token counts are
the paper's, weights random. On two CPU cores every depth is a third of the paper's (ViT-g 13 of 39 blocks, MAE encoder 11
of 32, Q-Former 4 of 12, MAE decoder 3 of 8, OPT-2.7b 11 of 32 layers) and so are the vocabularies, so that the parts
keep their proportions; with a GPU they are whole and the batch is 64. Beside each measured ratio stands the one from
operation counts of the same models (torch.utils.flop_counter). Processor time is the fairer figure where other work runs
on the machine. `overhead` replays the very tensors that a real tiny run trained on in a bare loop.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as formulation
from xformer.console import say, set_quiet, table
from xformer.model import Batch, Stage1, build_xformer
from xformer.params import VIT_MAE_HUGE, llm_config
from xformer.settings import load_settings
from xformer.stage2 import Stage2

ROUNDS = 3
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
BATCH = 64 if GPU else 4
SHARE = 1 if GPU else 3  # of the paper's depths
VIT, MAE, LLM = (round(depth / SHARE) for depth in (39, 32, 32))  # BLIP-2 drops ViT-g's last block
MEASURED = 0.85  # of the ratio of operation counts is asked for
TEXT2 = 32  # tokens of stage 2's text beside 32 queries


class Encoders(nn.Module):
    """Frozen ViT-g and MAE ViT-H of the given depths, with random weights, as an online trainer would hold them."""

    def __init__(self) -> None:
        import timm
        from transformers import ViTMAEConfig, ViTMAEModel

        super().__init__()
        self.clip: Any = timm.create_model("eva_giant_patch14_clip_224", pretrained=False, num_classes=0, depth=VIT)
        self.mae: Any = ViTMAEModel(ViTMAEConfig(**VIT_MAE_HUGE | {"num_hidden_layers": MAE}))
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        """The batch with C and M made from its pixels: C before the final norm, M of the visible patches."""
        assert batch.pixels is not None and batch.kept is not None
        patches, prefix = self.clip.forward_intermediates(
            batch.pixels,
            indices=[VIT - 1],
            return_prefix_tokens=True,
            norm=False,
            output_fmt="NLC",
            intermediates_only=True,
        )[0]
        mae = self.mae(batch.pixels, noise=1.0 - batch.kept.float()).last_hidden_state
        moved = vars(batch) | {"clip": torch.cat([prefix, patches], 1).float(), "mae": mae}
        return Batch(**moved)


def longest(batch: Batch, tokens: int) -> Batch:
    """The same texts padded, or the longer ones cut, to `tokens`."""
    ids, mask = (nn.functional.pad(x, (0, max(0, tokens - x.shape[1])))[:, :tokens] for x in (batch.ids, batch.mask))
    return Batch(**vars(batch) | {"ids": ids, "mask": mask})


def measure(steps: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, Any]]:
    """Forward and backward of each step: FLOP once, then alternating rounds of wall and processor seconds."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in steps.items():
        attention = torch.nn.attention.SDPBackend.MATH
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(attention):
            run().backward()
        found[name] = {"flop": counter.get_total_flops(), "seconds": [], "processor": []}
    for _ in range(ROUNDS):
        for name, run in steps.items():
            began, worked = time.perf_counter(), time.process_time()
            run().backward()
            if GPU:
                torch.cuda.synchronize()
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["processor"].append(time.process_time() - worked)
    return found


def ratios(found: dict[str, dict[str, Any]], pairs: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Of each pair (slow, fast): measured as the median over neighbouring rounds, its spread, and by operation counts."""
    rows = []
    for name, (slow, fast) in pairs.items():
        a, b = found[slow], found[fast]
        each = sorted(x / y for x, y in zip(a["seconds"], b["seconds"], strict=True))
        processor = statistics.median(x / y for x, y in zip(a["processor"], b["processor"], strict=True))
        counted, measured = a["flop"] / b["flop"], statistics.median(each)
        best = measured if GPU else processor
        rows.append(
            {"name": name, "wall": measured, "lowest": each[0], "highest": each[-1], "processor": processor,
             "operation_counts": counted, "measured_share": best / counted}
        )  # fmt: skip
    return rows


def show(title: str, found: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    timed = [
        (name, statistics.median(f["seconds"]), statistics.median(f["processor"]), f["flop"] / BATCH / 1e9)
        for name, f in found.items()
    ]
    table(title, ("step", "seconds", "processor s", "GFLOP per image"), timed)
    heads = ("slow : fast", "wall", "lowest", "highest", "processor", "by operations", "of that")
    keys = ("name", "wall", "lowest", "highest", "processor", "operation_counts", "measured_share")
    table(f"ratios; of that: measured over operations, at least {MEASURED} is asked for", heads,
          [tuple(row[key] for key in keys) for row in rows])  # fmt: skip
    return {"batch": BATCH, "depth_share": f"1/{SHARE}", "device": str(DEVICE), "steps": found, "ratios": rows}


def moved(batch: Batch) -> Batch:
    return batch.to(DEVICE)


def stage1() -> dict[str, Any]:
    """X-Former's four losses from the cache and online, at 16 and at 32 text tokens; LAVIS's formulation online."""
    model: Stage1 = formulation.build().to(DEVICE)
    encoders = Encoders().to(DEVICE)
    drawn = formulation.make_batch(BATCH)
    short, long = (moved(longest(drawn, tokens)) for tokens in (16, 32))

    def run(batch: Batch, online: bool, as_lavis: bool = False) -> Callable[[], Tensor]:
        def once() -> Tensor:
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                given = encoders(batch) if online else batch
                return (formulation.as_lavis if as_lavis else formulation.ours)(model, given)

        return once

    found = measure(
        {
            "cached, 16 tokens": run(short, False),
            "online, 16 tokens": run(short, True),
            "cached, 32 tokens": run(long, False),
            "online, 32 tokens": run(long, True),
            "LAVIS's step online": run(long, True, as_lavis=True),
        }
    )
    rows = ratios(
        found,
        {
            "ours online : ours cached, 16 tokens": ("online, 16 tokens", "cached, 16 tokens"),
            "ours online : ours cached, 32 tokens": ("online, 32 tokens", "cached, 32 tokens"),
            "LAVIS online : ours cached, 32 tokens": ("LAVIS's step online", "cached, 32 tokens"),
            "LAVIS online : ours cached, 16 tokens": ("LAVIS's step online", "cached, 16 tokens"),
        },
    )
    where = "whole" if SHARE == 1 else f"1/{SHARE} of the paper's"
    return show(f"stage-1 step, paper widths, depth {where}, batch {BATCH}, {DEVICE}", found, rows)


class RandomLlm(nn.Module):
    """OPT-2.7b's shape with random weights, in the place of FrozenLlm."""

    def __init__(self) -> None:
        from transformers import OPTForCausalLM

        super().__init__()
        config = llm_config("opt-2.7b")
        config.num_hidden_layers, config.vocab_size = LLM, round(50272 / SHARE)
        self.model: Any = OPTForCausalLM(config).eval().requires_grad_(False)
        self.width = 2560

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)


def stage2() -> dict[str, Any]:
    """The language-model loss through a frozen OPT-2.7b from the cache and online."""
    torch.manual_seed(0)
    layers = formulation.LAYERS if SHARE > 1 else 12
    settings = load_settings("paper", overrides=["qformer.dropout=0", f"qformer.layers={layers}"])
    llm: Any = RandomLlm()
    model = Stage2(build_xformer(settings, "xformer", 0), llm, 768).to(DEVICE)
    encoders = Encoders().to(DEVICE)
    batch = moved(formulation.make_batch(BATCH))
    ids = torch.randint(4, 10_000, (BATCH, TEXT2), device=DEVICE)
    mask = torch.ones_like(ids, dtype=torch.bool)

    def run(online: bool) -> Callable[[], Tensor]:
        def once() -> Tensor:
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
                return model(encoders(batch) if online else batch, ids, mask)["lm"]

        return once

    found = measure({"cached": run(False), "online": run(True)})
    rows = ratios(found, {"online : cached": ("online", "cached")})
    where = "whole" if SHARE == 1 else f"1/{SHARE} of OPT-2.7b's and the paper's"
    return show(f"stage-2 step, {32 + TEXT2} tokens, depth {where}, batch {BATCH}, {DEVICE}", found, rows)


STEPS, WARM, RUNS = 24, 4, 3


def overhead() -> dict[str, Any]:
    """Seconds from one forward pass to the next: in `xformer train` on a real store, with log, tracker, monitor, reader and
    clipping, and in a bare forward, backward and optimiser step on the very tensors that this run read."""
    from pipeline.corpora import open_corpus
    from pipeline.extract import extract
    from pipeline.shapes import write_shapes
    from xformer.model import build_stage1
    from xformer.text import TextTokenizer
    from xformer.train import train_stage1

    quiet = ["train.log_every=5", "train.validate_every=1000", "train.save_every=1000", "stage1.validate_batches=1"]
    settings = load_settings(overrides=[f"train.max_steps={STEPS}", *quiet])
    text = settings.qformer
    seen: list[tuple[Batch, bool]] = []
    at: list[tuple[float, float]] = []

    def entered(module: nn.Module, given: tuple) -> None:
        if isinstance(module, Stage1) and module.training:
            at.append((time.perf_counter(), time.process_time()))
            if len(seen) < STEPS:
                held = {
                    k: None if v is None else v.clone() for k, v in vars(given[0]).items()
                }  # its memory is used again
                seen.append((Batch(**held), given[1]))

    def per_step() -> tuple[float, float]:
        found = tuple((at[-1][i] - at[WARM][i]) / (len(at) - 1 - WARM) for i in (0, 1))
        at.clear()
        return found[0], found[1]

    def bare() -> None:
        tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
        model = build_stage1(settings, "xformer", tokenizer.vocabulary, tokenizer.begin).to(DEVICE)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for number, (batch, hard) in enumerate(seen):
            optimizer.zero_grad()
            found, _ = model(batch, hard, torch.Generator().manual_seed(number))
            torch.stack(list(found.values())).sum().backward()
            optimizer.step()

    found: dict[str, list[tuple[float, float]]] = {"xformer train": [], "bare loop": []}
    hook = torch.nn.modules.module.register_module_forward_pre_hook(entered)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_shapes(work / "shapes", 400, 60, seed=0)
        set_quiet(True)
        extract(open_corpus(work / "shapes"), work / "s.zarr", ["clip", "mae"], settings, in_process=True)
        for number in range(RUNS):
            train_stage1([work / "s.zarr"], work / f"run{number}", settings, "xformer", resume=False)
            found["xformer train"].append(per_step())
            bare()
            found["bare loop"].append(per_step())
        set_quiet(False)
    hook.remove()
    rows = [(name, *(statistics.median(v[i] for v in values) for i in (0, 1))) for name, values in found.items()]
    table(f"a tiny stage-1 step, batch {settings.stage1.batch}, {STEPS - 1 - WARM} steps, {RUNS} runs each",
          ("", "seconds", "processor s"), [(name, f"{a:.4f}", f"{b:.4f}") for name, a, b in rows])  # fmt: skip
    pairs = list(zip(*found.values(), strict=True))
    each = {kind: sorted(a[i] / b[i] - 1 for a, b in pairs) for i, kind in enumerate(("wall", "processor"))}
    shown = [(k, f"{statistics.median(v):+.1%}", f"{v[0]:+.1%}", f"{v[-1]:+.1%}") for k, v in each.items()]
    table("overhead of the loop, at most 5% is asked for", ("", "median", "lowest", "highest"), shown)
    return {"steps": found, "overhead": each}


PARTS = {"stage1": stage1, "stage2": stage2, "overhead": overhead}


def main() -> None:
    words = sys.argv[1:]
    file = Path(words[words.index("--json") + 1]) if "--json" in words else None
    report = {name: PARTS[name]() for name in [p for p in PARTS if p in words] or PARTS}
    if file:
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        say(f"figures in {file}")


if __name__ == "__main__":
    main()
