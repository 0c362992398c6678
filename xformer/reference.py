"""`xformer reference`: a short recorded run of the tiny preset over several seeds, for others to hold their own against."""

import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xformer import publish
from xformer.compare import curves_of, read_record
from xformer.console import say
from xformer.errors import SettingsError
from xformer.monitor import read_log
from xformer.pictures import compared_curves
from xformer.settings import Settings


def record(
    out: Path, settings: Settings, seeds: int, steps: int, config: Path | None, overrides: list[str],
    command: Callable[[list[str]], None],
) -> None:  # fmt: skip
    """Corpus and features once, then both stages with seeds 0, 1, ...; writes OUT/stage1.json, stage2.json and pictures.

    Args:
        steps: of each stage; validation happens three times.
        command: runs one command line of `xformer` in this process.

    Raises: SettingsError for less than two seeds, which have no band.
    """
    if seeds < 2:
        raise SettingsError("--seeds: a band needs at least two seeds.")
    given = [
        *overrides,
        f"train.max_steps={steps}",
        f"train.validate_every={-(-steps // 3)}",
        f"train.save_every={steps}",
    ]
    file = ["--config", str(config)] if config else []
    common = ["--preset", settings.preset, *file, *(word for text in given for word in ("--set", text))]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = work / "store.zarr"
        command(["corpus", "shapes", "--out", str(work / "shapes"), *common])
        encoders = ["--encoder", "clip", "--encoder", "mae"]
        command(["extract", *encoders, "--corpus", str(work / "shapes"), "--store", str(store), *common])
        runs: dict[int, list[Path]] = {1: [], 2: []}
        for seed in range(seeds):
            for stage in (1, 2):
                run = work / f"seed{seed}-stage{stage}"
                start = ["--init", str(work / f"seed{seed}-stage1")] if stage == 2 else []
                line = ["train", "--stage", str(stage), "--features", str(store), "--out", str(run), *start]
                command([*line, *common, "--seed", str(seed)])
                runs[stage].append(run)
        out.mkdir(parents=True, exist_ok=True)
        for stage, folders in runs.items():
            file = out / f"stage{stage}.json"
            publish.write_json(file, _recorded(stage, folders, given))
            compared_curves([read_record(file)], file.with_suffix(".png"))
    say(f"in {out}: stage1.json, stage1.png, stage2.json, stage2.png")


def _recorded(stage: int, runs: list[Path], given: list[str]) -> dict[str, Any]:
    one = read_record(runs[0])
    curves = curves_of([read_log(run) for run in runs])
    more = " ".join(f"--set {text}" for text in given)
    start = " --init runs/stage1" if stage == 2 else ""
    return {
        "stage": stage,
        "model": one.model,
        "command": f"xformer train --stage {stage} --features store.zarr{start} {more}",
        "seeds": list(range(len(runs))),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")},
        "final": [json.loads((run / "summary.json").read_text(encoding="utf-8"))["validation"] for run in runs],
        "curves": {
            event: {
                name: {"steps": list(c), "values": [[float(f"{v:.6g}") for v in values] for values in c.values()]}
                for name, c in by_name.items()
            }
            for event, by_name in curves.items()
        },
        "settings": {k: v for k, v in one.settings.items() if k != "seed"},
    }
