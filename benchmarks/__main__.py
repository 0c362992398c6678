"""Ratios measured side by side in one run: start-up, memory of an extraction, and reading shuffled rows.

python -m benchmarks [start] [memory] [reader] [scale] [extraction] [plan] [step] [fed] [scoring] [queries]
    [online [stage1] [stage2] [overhead]] [--json FILE]
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.extraction import extraction, planned
from benchmarks.fed import fed
from benchmarks.reader import reader
from benchmarks.scale import scale
from benchmarks.scoring import queries, scoring
from xformer.console import say, table


def start() -> dict:
    """`xformer --help` against a bare interpreter, alternating, median of 9."""
    lines = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "xformer --help": [sys.executable, "-m", "cli", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for _ in range(9):
        for name, line in lines.items():
            began = time.perf_counter()
            subprocess.run(line, stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(v) for name, v in seconds.items()}
    medians["ratio"] = medians["xformer --help"] / medians["python -c pass"]
    table("start-up (seconds)", ("", "median"), [(k, f"{v:.3f}") for k, v in medians.items()])
    return medians


# VmHWM, not ru_maxrss: that one begins with the parent's
PEAK = r"""
import re, sys
from pathlib import Path
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer.console import set_quiet
from xformer.settings import load_settings
set_quiet(True)
corpus, store, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
extract(open_corpus(corpus), store, ["clip"], load_settings(), limit=limit, in_process=True)
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""
TRAIN = r"""
import re, sys
from pathlib import Path
from xformer.console import set_quiet
from xformer.settings import load_settings
from xformer.train import train_stage1
set_quiet(True)
train_stage1([Path(sys.argv[1])], Path(sys.argv[2]), load_settings(overrides=["train.max_steps=30"]), "qformer", False)
print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


def memory() -> dict:
    """Peak resident memory (MiB) of extraction and of training at 1,000 and at 10,000 images."""
    from pipeline.shapes import write_shapes

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_shapes(here / "shapes", 10_000, 1, seed=0)
        for count in (1_000, 10_000):
            for name, code, arguments in (
                ("extract", PEAK, (here / "shapes", here / f"{count}.zarr", count)),
                ("train", TRAIN, (here / f"{count}.zarr", here / f"run{count}")),
            ):
                line = [sys.executable, "-c", code, *map(str, arguments)]
                done = subprocess.run(line, capture_output=True, text=True, check=True)
                found[f"{name}, {count:,} images"] = float(done.stdout.split()[-1])
    for name in ("extract", "train"):
        found[f"{name}, ratio"] = found[f"{name}, 10,000 images"] / found[f"{name}, 1,000 images"]
    table("peak memory (MiB)", ("", "peak"), found.items())
    return found


def step() -> dict:
    """The fused stage-1 step against LAVIS's formulation."""
    from benchmarks.step import step as run

    return run()


def online() -> dict:
    """Training steps from the cache against both encoders online, and our loop against a bare one."""
    from benchmarks.online import PARTS as parts

    return {name: parts[name]() for name in [n for n in ONLINE if n in sys.argv] or ONLINE}


PARTS = {
    "start": start, "memory": memory, "reader": reader, "scale": scale, "extraction": extraction, "plan": planned,
    "step": step, "fed": fed, "scoring": scoring, "queries": queries, "online": online,
}  # fmt: skip
ONLINE = ("stage1", "stage2", "overhead")  # parts of `online`


def main() -> None:
    words, file = sys.argv[1:], None
    if "--json" in words:
        place = words.index("--json")
        file = Path(words[place + 1])
        del words[place : place + 2]
    if unknown := sorted(set(words) - {*PARTS, *ONLINE}):
        raise SystemExit(f"there is no benchmark {unknown[0]!r}; there are {', '.join(PARTS)}.")
    report = {}
    for name in [name for name in PARTS if name in words] or PARTS:
        report[name] = PARTS[name]()
        if file is not None:  # after each, so that what was measured stays if a later one is stopped
            file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if file is not None:
        say(f"figures in {file}")


if __name__ == "__main__":
    main()
