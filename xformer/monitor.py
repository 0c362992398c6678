"""What a run tells while it trains: RUN/log.jsonl, the trackers, the live table, pictures, and the alarms."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from PIL import Image

from xformer import publish
from xformer.alarms import Plan, sounding
from xformer.console import RunView
from xformer.trackers import Trackers

T = TypeVar("T")


class Monitor:
    """Of several processes only the main one has it speak; the others measure and stay silent.

    A resumed run keeps the lines up to its checkpoint and drops the later ones, so that every step stands there once.
    """

    def __init__(
        self, folder: Path, described: dict[str, Any], plan: Plan, start: int, trackers: Sequence[str], main: bool
    ) -> None:
        self.folder, self.plan, self.main, self.start = folder, plan, main, start
        self.file = folder / "log.jsonl"
        lines = read_log(folder) if start and self.file.exists() else []
        kept = [line for line in lines if line["step"] < start or (line["step"] == start and line["event"] != "epoch")]
        self.lines = [line for line in kept if line["event"] in ("train", "validate")]
        self.alarms = [line for line in kept if line["event"] == "alarm"]
        self.active = set(sounding(self.lines, plan))
        self.waited = self.worked = 0.0  # seconds since the last line
        self.samples, self.began = 0, time.monotonic()
        if not main:
            return
        publish.write_bytes(self.file, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.log = self.file.open("a", encoding="utf-8")
        self.trackers = Trackers(trackers, folder, _flat(described["settings"]) | {"model": described["model"]})
        self.view = RunView(f"stage {described['stage']} {described['model']}", plan.steps)

    def __enter__(self) -> "Monitor":
        if self.main:
            self.view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.main:
            self.view.stop()
            self.trackers.finish()
            with suppress(OSError):  # what could not be written has been said when it was
                self.log.close()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; measures how long each is waited for. What happens until `stepped` counts as computing."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self._step_began = time.perf_counter()
            self.waited += self._step_began - began
            yield batch

    def stepped(self, done: int, samples: int, loss: float) -> None:
        """One step of `samples` pairs, of all processes together, is over."""
        self.worked += time.perf_counter() - self._step_began
        self.samples += samples
        if self.main:
            self.view.step(done, loss)

    def epoch(self, step: int, known: dict[str, Any]) -> None:
        self._write({"step": step, "event": "epoch", **known})

    def skipped(self, done: int, losses: dict[str, float]) -> None:
        """A step that changed nothing, because one of these is not finite."""
        told = {name: value if math.isfinite(value) else str(value) for name, value in losses.items()}
        self._write({"step": done, "event": "skipped", **told})

    def train(self, done: int, epoch: int, draw: int, rate: float, losses: dict[str, float], pairs: str) -> None:
        """A line of training: the losses' means since the last line, a hash of this step's pairs, and how fast it goes."""
        seconds = max(self.waited + self.worked, 1e-9)
        elapsed = time.monotonic() - self.began
        line = {"step": done, "event": "train", "epoch": epoch, "draw": draw, "pairs": pairs, **losses} | {
            "lr": rate,
            "samples_per_second": round(self.samples / seconds, 2),
            "data_wait": round(self.waited / seconds, 4),
            "memory_mib": round(_memory() / 2**20, 1),
            "seconds_left": round(elapsed / (done - self.start) * (self.plan.steps - done), 1),
        }
        self.waited = self.worked = 0.0
        self.samples = 0
        self._tell(line)

    def validated(self, done: int, measured: dict[str, float], picture: np.ndarray | None) -> None:
        """Figures of the validation split, and a picture uint8 [H, W, 3] where there is one."""
        self._tell({"step": done, "event": "validate", **measured})
        if self.main and picture is not None:
            file = self.folder / "pictures" / f"step-{done:08d}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(file)
            self.trackers.picture(file, picture, done)

    def sync(self) -> None:
        """The log is on the disk before a checkpoint is, so that no power cut leaves one without its lines."""
        os.fsync(self.log.fileno())

    def _tell(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._write(line)
        now = sounding(self.lines, self.plan)
        for name in now.keys() - self.active:
            alarm = {"step": line["step"], "event": "alarm", "alarm": name, "says": now[name]}
            self.alarms.append(alarm)
            self._write(alarm)
        self.active = set(now)

    def _write(self, line: dict[str, Any]) -> None:
        if not self.main:
            return
        try:
            self.log.write(json.dumps(line) + "\n")
            self.log.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None
        self.view.line(line)
        if line["event"] in ("train", "validate"):
            prefix = "" if line["event"] == "train" else "validation/"
            values: dict[str, float] = {
                prefix + k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"
            }
            self.trackers.log(values, line["step"])


def read_log(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/log.jsonl; a last line that a kill cut short is left out."""
    lines = []
    for text in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _memory() -> int:
    """Bytes: the GPU's peak where there is one, else what the process holds now."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in settings.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return found
