"""One stage-1 step: ours against the same losses as LAVIS computes them, built from the same blocks.

LAVIS (blip2_qformer.py) pads every text to 32 tokens and computes the image's cross-attention keys and values once for
the queries and three more times inside the ITM triples. Ours computes them once and pads to the batch's longest.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from xformer import losses
from xformer.console import table
from xformer.model import Batch, Stage1, build_xformer
from xformer.reconstruction import FrozenDecoder
from xformer.settings import load_settings
from xformer.text import generation_labels

VOCABULARY, BEGIN, PADDED, BATCH, ROUNDS = 10_000, 9_999, 32, 4, 5
# A third of the paper's depth and vocabulary, so that two cores do; the widths are the paper's.
LAYERS, DECODER_LAYERS = 4, 3
MAX_DIFFERENCE = 1e-5  # of any gradient
# Captions by words + [CLS] + [SEP] among 375 of COCO's validation captions (rare words split, so true lengths are longer).
LENGTHS = {
    9: 2, 10: 51, 11: 79, 12: 75, 13: 59, 14: 47, 15: 22, 16: 10, 17: 11, 18: 5, 19: 5, 20: 2, 21: 2, 23: 2, 24: 1, 28: 1,
    32: 1,
}  # fmt: skip


def build() -> Stage1:
    """X-Former with random weights, no dropout, and a random decoder of ViT-H's widths."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from xformer.params import VIT_MAE_HUGE

    torch.manual_seed(0)
    settings = load_settings("paper", overrides=["qformer.dropout=0", f"qformer.layers={LAYERS}"])
    with tempfile.TemporaryDirectory() as folder:
        sizes = VIT_MAE_HUGE | {"num_hidden_layers": 0, "decoder_num_hidden_layers": DECODER_LAYERS}
        ViTMAEForPreTraining(ViTMAEConfig.from_dict(sizes)).save_pretrained(folder)
        decoder = FrozenDecoder(folder)
    for parameter in decoder.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    bridge = build_xformer(settings, "xformer", VOCABULARY)
    assert bridge.dual is not None
    for parameter in bridge.dual.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return Stage1(bridge, decoder, 768, 256, BEGIN, "enhanced", 0.1)


def make_batch(size: int) -> Batch:
    """Random tokens; text lengths drawn from real captions, padded as ours: to the longest, rounded up to 8."""
    draw = torch.Generator().manual_seed(1)
    lengths = torch.tensor([n for n, times in LENGTHS.items() for _ in range(times)])
    chosen = lengths[torch.randint(len(lengths), (size,), generator=draw)]
    longest = -(-int(chosen.max()) // 8) * 8
    mask = torch.arange(longest)[None] < chosen[:, None]
    ids = torch.randint(1000, 9000, (size, longest), generator=draw).masked_fill(~mask, 0)
    kept = torch.rand(size, 256, generator=draw).argsort(1).argsort(1) < 64
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    rows = torch.arange(size)
    return Batch(
        rows, rows, normal(size, 257, 1408), normal(size, 65, 1280), kept, normal(size, 3, 224, 224), ids, mask
    )


def ours(stage1: Stage1, batch: Batch) -> Tensor:
    found, _ = stage1(batch, False, torch.Generator().manual_seed(0))
    return torch.stack(list(found.values())).sum()


def as_lavis(stage1: Stage1, batch: Batch) -> Tensor:
    """The same losses from separate passes: every pass projects its own images' keys and values, texts padded to 32."""
    bridge, b = stage1.xformer, len(batch.rows)
    pad = (0, PADDED - batch.ids.shape[1])
    ids, mask = F.pad(batch.ids, pad), F.pad(batch.mask, pad)
    clip, local = batch.clip, batch.mae
    assert local is not None and batch.kept is not None and batch.pixels is not None and stage1.decoder is not None
    queries, _ = bridge.qformer.queries(bridge.image_keys_values(clip))
    enhanced, rebuilt = bridge.enhance(queries, local)
    image, text = stage1.embed(enhanced, bridge.qformer.words(ids), mask)
    same = torch.eye(b, dtype=torch.bool, device=clip.device)
    temperature = stage1.temperature.clamp(0.001, 0.5)
    total = losses.itc(image, text, image, text, temperature, same, stage1.smoothing)
    draw = torch.rand(2, b, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        zeros = losses.similarity(image, text) * 0
    negative_text, _ = losses.hard_negatives(zeros, same, draw[0])
    negative_image, _ = losses.hard_negatives(zeros, same, draw[1])
    images, locals_ = (torch.cat([x, x[negative_image], x]) for x in (clip, local))
    all_ids, all_mask = torch.cat([ids, ids, ids[negative_text]]), torch.cat([mask, mask, mask[negative_text]])
    matched = bridge.qformer.joint(bridge.image_keys_values(images), bridge.qformer.words(all_ids), all_mask)
    logits = stage1.itm_head(bridge.enhance(matched, locals_)[0])
    total = total + losses.itm(logits, torch.cat([torch.ones(b), torch.zeros(2 * b)]).long().to(clip.device))
    inputs, targets = generation_labels(ids, mask, stage1.begin)
    written = bridge.qformer.write(bridge.qformer.enhanced_prefix(enhanced), bridge.qformer.words(inputs), mask)
    total = total + losses.itg(written, targets, stage1.smoothing)
    predicted = stage1.decoder(rebuilt, batch.kept)
    return total + losses.reconstruction(predicted, batch.pixels, batch.kept, 14, stage1.decoder.norm_pix)


STEPS = {"ours": ours, "as LAVIS": as_lavis}


def peak(name: str) -> float:
    """MiB that one step adds to a process of its own at its peak; the high-water mark is reset after building (Linux)."""
    code = (
        "import re, sys; from pathlib import Path; from benchmarks import step\n"
        "s, b = step.build(), step.make_batch(step.BATCH)\n"
        "mib = lambda key: int(re.search(key + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = mib('VmRSS'); step.STEPS[sys.argv[1]](s, b).backward(); print(mib('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def step() -> dict:
    """Gradients equal, then alternating steps, operation counts, and peak memories."""
    stage1, batch = build(), make_batch(BATCH)
    gradients, operations = {}, {}
    for name, run in STEPS.items():
        stage1.zero_grad()
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            run(stage1, batch).backward()
        operations[name] = counter.get_total_flops()
        gradients[name] = {n: p.grad.clone() for n, p in stage1.named_parameters() if p.grad is not None}
    assert set(gradients["ours"]) == set(gradients["as LAVIS"]) and not any("decoder" in n for n in gradients["ours"])
    error = max(float((gradients["ours"][n] - g).abs().max()) for n, g in gradients["as LAVIS"].items())
    if error > MAX_DIFFERENCE:
        raise SystemExit(
            f"the gradients of the two steps differ by {error:.1e}; at most {MAX_DIFFERENCE:.0e} is rounding."
        )
    scale = max(float(g.abs().max()) for g in gradients["as LAVIS"].values())
    del gradients
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    processor: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(ROUNDS):
        for name, run in STEPS.items():
            stage1.zero_grad()
            began, worked = time.perf_counter(), time.process_time()
            run(stage1, batch).backward()
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - worked)
    medians = {name: statistics.median(v) for name, v in seconds.items()}
    memory = {name: peak(name) for name in STEPS}
    # of neighbouring steps, since other work on the machine comes and goes
    pairs = sorted(theirs / own for own, theirs in zip(seconds["ours"], seconds["as LAVIS"], strict=True))
    ratio, limit = statistics.median(pairs), operations["as LAVIS"] / operations["ours"]
    worked_ratio = statistics.median(processor["as LAVIS"]) / statistics.median(processor["ours"])
    rows = [(name, medians[name], operations[name] / BATCH / 1e9, memory[name]) for name in STEPS]
    table(
        f"stage-1 step, X-Former at the paper's widths, a third of its depth, batch {BATCH}, {batch.ids.shape[1]} tokens",
        ("", "seconds", "GFLOP per image", "peak MiB"), rows,
    )  # fmt: skip
    ratios = {
        "measured, median of pairs": ratio,
        "measured, lowest": pairs[0],
        "measured, highest": pairs[-1],
        "processor time": worked_ratio,
        "operation counts": limit,
        "measured : operation counts": ratio / limit,
    }
    table("as LAVIS : ours", ("", "ratio"), ratios.items())
    table("gradients", ("", "value"), [("largest difference", f"{error:.1e}"), ("largest gradient", f"{scale:.1e}")])
    return {
        "batch": BATCH,
        "text_tokens": batch.ids.shape[1],
        "seconds": seconds,
        "flop": operations,
        "peak_mib": memory,
        "ratios": ratios,
        "gradient_difference": error,
    }


if __name__ == "__main__":
    print(json.dumps(step()))
