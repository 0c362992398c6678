"""What the cache buys and what our loop costs, as ratios measured side by side in one run.

python -m benchmarks online [stage1] [stage2] [overhead] [--json FILE]

A step from the cache against the same step with both encoders run online on the same images: widths and token counts are
the paper's, weights random. On two CPU cores every depth is a third of the paper's (ViT-g 13 of 39 blocks, MAE encoder 11
of 32, Q-Former 4 of 12, MAE decoder 3 of 8, OPT-2.7b 11 of 32 layers) and so are the vocabularies, so that the parts
keep their proportions; with a GPU they are whole and the batch is 64. The compared steps take turns. Beside each measured
ratio stands the one from operation counts of the same models (torch.utils.flop_counter), and that of the whole depths.
Other work on the machine only adds time, so where there is any the fastest rounds are the fairer figure. `overhead` has
a real tiny run and a bare loop take turns on the very same tensors.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step as formulation
from xformer.console import say, set_quiet, table
from xformer.model import Batch, Stage1, build_xformer
from xformer.operations import PASSES, count, encoder_operations
from xformer.optimiser import make_optimizer
from xformer.params import VIT_MAE_HUGE, llm_config
from xformer.settings import load_settings
from xformer.stage2 import Stage2

ROUNDS = 5
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
        self.mae: Any = ViTMAEModel(ViTMAEConfig.from_dict(VIT_MAE_HUGE | {"num_hidden_layers": MAE}))
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


def measure(part: str, steps: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, Any]]:
    """Forward and backward of each step: FLOP once, which warms up, then rounds of wall and processor seconds."""
    found: dict[str, dict[str, Any]] = {}
    for name, run in steps.items():
        say(f"{part}: counting the operations of {name}")
        attention = torch.nn.attention.SDPBackend.MATH
        with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(attention):
            run().backward()
        found[name] = {"flop": counter.get_total_flops(), "seconds": [], "processor": []}
    for number in range(1, ROUNDS + 1):
        for name, run in steps.items():
            began, worked = time.perf_counter(), time.process_time()
            run().backward()
            if GPU:
                torch.cuda.synchronize()
            found[name]["seconds"].append(time.perf_counter() - began)
            found[name]["processor"].append(time.process_time() - worked)
        took = ", ".join(f"{name} {values['seconds'][-1]:.2f}" for name, values in found.items())
        say(f"{part}: round {number} of {ROUNDS}, seconds: {took}")
    return found


def ratios(
    found: dict[str, dict[str, Any]], pairs: dict[str, tuple[str, str]], whole: dict[str, float]
) -> list[dict[str, Any]]:
    """Of each pair (slow, fast): measured as the median over neighbouring rounds, its spread, and by operation counts."""
    rows = []
    for name, (slow, fast) in pairs.items():
        a, b = found[slow], found[fast]
        wall, processor = (sorted(x / y for x, y in zip(a[k], b[k], strict=True)) for k in ("seconds", "processor"))
        counted, median, fastest = a["flop"] / b["flop"], statistics.median(wall), min(a["seconds"]) / min(b["seconds"])
        rows.append(
            {"name": name, "wall": median, "lowest": wall[0], "highest": wall[-1], "fastest": fastest,
             "processor": statistics.median(processor), "operations": counted, "wall_of_operations": median / counted,
             "fastest_of_operations": fastest / counted, "operations_whole_depth": whole.get(name)}
        )  # fmt: skip
    return rows


def show(title: str, found: dict[str, dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    timed = [
        (name, statistics.median(f["seconds"]), min(f["seconds"]), statistics.median(f["processor"]),
         f["flop"] / BATCH / 1e9, f["flop"] / min(f["seconds"]) / 1e9)
        for name, f in found.items()
    ]  # fmt: skip
    heads = ("step", "median s", "fastest s", "processor s", "GFLOP per image", "GFLOP per second, fastest")
    table(title, heads, timed)
    heads = ("slow : fast", "wall", "lowest", "highest", "fastest", "processor", "by operations", "wall of that",
             "fastest of that", "by operations, whole depth")  # fmt: skip
    table(f"ratios; of that: measured over operations, at least {MEASURED} is asked for", heads,
          [tuple(row.values()) for row in rows])  # fmt: skip
    return {"batch": BATCH, "depth_share": f"1/{SHARE}", "device": str(DEVICE), "steps": found, "ratios": rows}


def whole_depth(text: int, stage: str) -> float:
    """Online : cached by operation counts at the paper's whole depths, with `text` tokens."""
    settings = load_settings("paper", overrides=["qformer.dropout=0"])
    encoders = encoder_operations(settings)
    with torch.device("meta"):
        _, run = PASSES[stage](settings, "xformer", encoders["clip_tokens"], 30523)
        cached = count(lambda: run(2, text), True) / 2
    return (cached + encoders["clip"] + encoders["mae"]) / cached


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
        "stage1",
        {
            "cached, 16 tokens": run(short, False),
            "online, 16 tokens": run(short, True),
            "cached, 32 tokens": run(long, False),
            "online, 32 tokens": run(long, True),
            "LAVIS's step online": run(long, True, as_lavis=True),
        },
    )
    whole = {f"ours online : ours cached, {text} tokens": whole_depth(text, "stage 1") for text in (16, 32)}
    rows = ratios(
        found,
        {
            "ours online : ours cached, 16 tokens": ("online, 16 tokens", "cached, 16 tokens"),
            "ours online : ours cached, 32 tokens": ("online, 32 tokens", "cached, 32 tokens"),
            "LAVIS online : ours cached, 32 tokens": ("LAVIS's step online", "cached, 32 tokens"),
            "LAVIS online : ours cached, 16 tokens": ("LAVIS's step online", "cached, 16 tokens"),
        },
        whole,
    )
    where = "whole" if SHARE == 1 else f"1/{SHARE} of the paper's"
    return show(f"stage-1 step, paper widths, depth {where}, batch {BATCH}, {DEVICE}", found, rows)


class RandomLlm(nn.Module):
    """OPT-2.7b's shape with random weights, in the place of FrozenLlm."""

    def __init__(self) -> None:
        from transformers import OPTForCausalLM

        super().__init__()
        config = llm_config("opt-2.7b", "")
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

    found = measure("stage2", {"cached": run(False), "online": run(True)})
    rows = ratios(found, {"online : cached": ("online", "cached")}, {"online : cached": whole_depth(TEXT2, "stage 2")})
    where = "whole" if SHARE == 1 else f"1/{SHARE} of OPT-2.7b's and the paper's"
    return show(f"stage-2 step, {32 + TEXT2} tokens, depth {where}, batch {BATCH}, {DEVICE}", found, rows)


BLOCK, BLOCKS, WARM = 5, 12, 2  # steps from one line of the log to the next; blocks that count; blocks before them


def overhead() -> dict[str, Any]:
    """A step of `xformer train` on a real store, with log, tracker, monitor, reader and clipping, against a bare forward,
    backward and optimiser step on the very tensors that it has just read.

    They take turns within one run: the bare step comes after the loop's update, when its reader is idle, and is left out
    of the loop's time. A block ends with a line of the log; checkpoints and validation are not counted.
    """
    from pipeline.corpora import open_corpus
    from pipeline.extract import extract
    from pipeline.shapes import write_shapes
    from xformer.model import build_stage1
    from xformer.text import TextTokenizer
    from xformer.train import train_stage1

    steps = BLOCK * (WARM + BLOCKS) + 1
    quiet = [f"train.log_every={BLOCK}", "train.validate_every=1000", "train.save_every=1000"]
    settings = load_settings(overrides=[f"train.max_steps={steps}", "stage1.validate_batches=1", *quiet])
    text = settings.qformer
    tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
    model = build_stage1(settings, "xformer", tokenizer.vocabulary, tokenizer.begin).to(DEVICE)
    optimizer = make_optimizer(model, settings.stage1)
    given: list[Any] = []  # the last arguments of the loop's model
    times: dict[str, list[tuple[float, float]]] = {"xformer train": [], "bare loop": []}
    at: list[tuple[float, float]] = []  # when the loop went on

    def now() -> tuple[float, float]:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def entered(module: nn.Module, arguments: tuple) -> None:
        if isinstance(module, Stage1) and module.training:
            given[:] = arguments

    def updated(other: torch.optim.Optimizer, *_: Any) -> None:
        if other is optimizer:
            return
        began = now()
        if at:
            times["xformer train"].append((began[0] - at[0][0], began[1] - at[0][1]))
        began = now()
        optimizer.zero_grad()
        found, _ = model(given[0], given[1], torch.Generator().manual_seed(len(times["bare loop"])))
        torch.stack(list(found.values())).sum().backward()
        optimizer.step()
        ended = now()
        if at:
            times["bare loop"].append((ended[0] - began[0], ended[1] - began[1]))
        at[:] = [now()]

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        say("overhead: extracting a small store")
        write_shapes(work / "shapes", 400, 60, seed=0)
        set_quiet(True)
        extract(open_corpus(work / "shapes"), work / "s.zarr", ["clip", "mae"], settings, in_process=True)
        set_quiet(False)
        say(f"overhead: {steps} steps of each")
        hooks = [
            torch.nn.modules.module.register_module_forward_pre_hook(entered),
            register_optimizer_step_post_hook(updated),
        ]
        set_quiet(True)
        train_stage1([work / "s.zarr"], work / "run", settings, "xformer", resume=False)
        set_quiet(False)
        for hook in hooks:
            hook.remove()

    def blocks(name: str, kind: int) -> list[float]:
        found = [sum(v[kind] for v in times[name][i : i + BLOCK]) for i in range(0, steps - 1, BLOCK)]
        return found[WARM:]

    rows = [(name, *(statistics.median(blocks(name, kind)) / BLOCK for kind in (0, 1))) for name in times]
    table(f"a tiny stage-1 step, batch {settings.stage1.batch}, {BLOCKS} blocks of {BLOCK} steps",
          ("", "seconds", "processor s"), [(name, f"{a:.4f}", f"{b:.4f}") for name, a, b in rows])  # fmt: skip
    each = {
        kind: sorted(a / b - 1 for a, b in zip(blocks("xformer train", i), blocks("bare loop", i), strict=True))
        for i, kind in enumerate(("wall", "processor"))
    }
    shown = [(k, f"{statistics.median(v):+.1%}", f"{v[0]:+.1%}", f"{v[-1]:+.1%}") for k, v in each.items()]
    table("overhead of the loop, at most 5% is asked for", ("", "median", "lowest", "highest"), shown)
    return {"steps": times, "overhead": each}


PARTS = {"stage1": stage1, "stage2": stage2, "overhead": overhead}
