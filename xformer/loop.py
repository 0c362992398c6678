"""The training loop: AdamW, warm-up and cosine per step, clipping, a finite guard, validation, checkpoints, trackers.

Every step's randomness is seeded by (seed, step, rank), and its samples by (seed, epoch, step): resuming in the middle
of an epoch is one integer, and gives the same weights as a run that was never interrupted.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor, nn

from xformer import checkpoint, publish
from xformer.alarms import Plan
from xformer.console import say
from xformer.data import Pairs
from xformer.errors import CheckpointError, SettingsError, Stopped
from xformer.gather import alone
from xformer.guard import Guard
from xformer.monitor import Monitor
from xformer.optimiser import learning_rate, make_optimizer
from xformer.order import Schedule, generator
from xformer.reading import Reading, stream
from xformer.resume import load_scaler, refuse_missing_state, scaler_state
from xformer.settings import Data, Stage1, Stage2
from xformer.stopping import asked_to_stop
from xformer.trackers import refuse_missing

Losses = Callable[[Any, list[str], int, torch.Generator], dict[str, Tensor]]
Validate = Callable[[], tuple[dict[str, float], np.ndarray | None]]  # figures, and a picture uint8 [H, W, 3]
TRACKED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PATIENCE = timedelta(hours=2)  # of the other ranks, while the first validates or saves


class Loop:
    """One run in its folder: settings.json, log.jsonl, tensorboard/, pictures/, checkpoints/, summary.json."""

    def __init__(
        self, folder: Path, model: nn.Module, pairs: Pairs, recipe: Stage1 | Stage2, data: Data, seed: int,
        described: dict, resume: bool,
    ) -> None:  # fmt: skip
        refuse_missing(recipe.trackers)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        try:
            self.accelerator = Accelerator(
                mixed_precision=TRACKED[recipe.precision],
                cpu=not torch.cuda.is_available(),
                kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
            )
        except ValueError as error:
            raise SettingsError(f"train.precision={recipe.precision} does not work on this machine: {error}") from None
        if self.accelerator.device.type == "cpu":  # else threads add the gradients of gathered rows in any order
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        world, parts = self.accelerator.num_processes, recipe.accumulate
        say(f"training on {self.accelerator.device.type} in {world} process{'' if world == 1 else 'es'}")
        if recipe.batch > len(pairs):
            raise SettingsError(f"train.batch is {recipe.batch:,} and there are {len(pairs):,} pairs; make it smaller.")
        if recipe.batch % (world * parts):
            raise SettingsError(f"train.batch {recipe.batch} must be a multiple of {world} processes x {parts} steps.")
        if parts > 1 and described["stage"] == 1:
            say(
                f"accumulating {parts} parts: ITC and the hard negatives see the {recipe.batch // parts - 1:,} other pairs "
                f"of a part, where a step without it sees {recipe.batch - 1:,}."
            )
        self.folder, self.pairs, self.recipe, self.data, self.described = folder, pairs, recipe, data, described
        self.seed, self.plain = seed, model
        self.weights: dict[str, float] = dict(recipe.weights)
        self.schedule = Schedule(
            len(pairs), recipe.batch, recipe.epochs, recipe.max_steps, seed, tuple(pairs.sizes), tuple(data.weights),
            data.block, data.window,
        )  # fmt: skip
        if self.accelerator.verify_device_map(model):  # a spread language model stays where its layers lie
            if world > 1:
                raise SettingsError("llm.spread puts one model on all GPUs; run it in one process, without a launcher.")
            for name, part in model.named_children():
                if name != "llm":
                    part.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, recipe))
        self.start, self.history, self.seconds = 0, [], 0.0
        self.validation: dict[str, float] = {}
        self.guard = Guard(folder, pairs, [])
        self._measured: dict[str, list[float]] = {}  # by step since the last line of the log, means over all processes
        self._now: dict[str, list[Tensor]] = {}  # in this step
        if resume:
            newest = checkpoint.newest(folder)
            state = checkpoint.read_state(newest)
            refuse_missing_state(newest, state, seed)
            checkpoint.load_model(newest, model)
            checkpoint.load_optimizer(newest, model, self.optimizer.optimizer)
            load_scaler(newest, state, self.accelerator.scaler)
            self.start, self.history, self.seconds = state["step"], state["epochs"], state["seconds"]
            self.validation, self.guard.bad = state["validation"], state["nonfinite"]
            self._measured = state["measured"]
            if self.accelerator.device.type == "cpu" and state["cpu_threads"] != torch.get_num_threads():
                say(
                    f"{state['cpu_threads']} threads until here, {torch.get_num_threads()} now: sums are rounded in another "
                    "order, so the weights are no longer bit for bit those of a run that was not interrupted"
                )
            say(f"resuming {folder} at step {self.start:,}")

    def measure(self, **values: Tensor) -> None:
        """Remembers what a part of this step found until the next line of the log, if the step counts."""
        for name, value in values.items():
            self._now.setdefault(name, []).append(value.detach().float())

    def _means(self) -> dict[str, float]:
        """What was measured since the last line of the log, over its steps."""
        found = {name: sum(values) / len(values) for name, values in self._measured.items()}
        self._measured.clear()
        return found

    def run(self, losses_of: Losses, validate: Validate) -> dict[str, Any]:
        """Trains to the end. Returns the summary.

        Raises: TrainingError after three steps in a row that are not finite; Stopped, once the step is saved, where a
        process was asked to stop; CheckpointError where another trainer is at work in the folder.
        """
        main = self.accelerator.is_main_process
        with publish.exclusive(self.folder / ".lock") if main else nullcontext(True) as mine:
            if not mine:
                raise CheckpointError(
                    f"{self.folder}: another trainer is at work in this run; wait for it, or give another --out."
                )
            return self._run(losses_of, validate)

    def _run(self, losses_of: Losses, validate: Validate) -> dict[str, Any]:
        accelerator, schedule, recipe, main = (
            self.accelerator,
            self.schedule,
            self.recipe,
            self.accelerator.is_main_process,
        )
        if main:
            publish.write_json(self.folder / "settings.json", self.described)
        began, measured, draws = time.perf_counter(), self.validation, self.described["draws"]
        plan = Plan(schedule.steps, recipe.warmup, self.described["settings"]["qformer"]["queries"])
        monitor = Monitor(self.folder, self.described, plan, self.start, recipe.trackers, main)
        batches = stream(
            self.pairs, schedule, self.start, accelerator.process_index, accelerator.num_processes, draws,
            recipe.accumulate, self.data.threads, self.data.ahead,
        )  # fmt: skip
        try:
            with monitor, asked_to_stop() as self.asked:
                if main and self.start == schedule.steps and not measured:  # it stopped in its last validation
                    with alone():
                        measured, picture = validate()
                    monitor.validated(self.start, measured, picture)
                for read in monitor.timed(batches):
                    if len(self.history) <= read.epoch:
                        self.history.append({"epoch": read.epoch, "draw": read.draw if draws else None})
                        monitor.epoch(read.step, self.history[-1])
                    rate = learning_rate(recipe, read.step, schedule.steps)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate
                    total = self._step(losses_of, read, monitor)
                    done = read.step + 1
                    monitor.stepped(done, schedule.batch, total)
                    last = done == schedule.steps
                    if done % recipe.log_every == 0 or last:
                        monitor.train(done, read.epoch, read.draw, rate, self._means(), read.digest)
                    if main and (done % recipe.validate_every == 0 or last):
                        try:
                            with alone():
                                measured, picture = validate()
                        except Exception:  # no memory, a damaged row: what was trained is not lost with it
                            self._save(done, read.epoch, began, {} if last else measured)
                            raise
                        monitor.validated(done, measured, picture)
                    stopping = self.stopping and not last
                    if main and (done % recipe.save_every == 0 or last or stopping):
                        monitor.sync()
                        self._save(done, read.epoch, began, measured)
                    if stopping:
                        accelerator.wait_for_everyone()  # a launcher ends all processes when the first one ends
                        raise Stopped(f"stopped; step {done:,} is saved in {self.folder}, go on with --resume.")
        finally:
            accelerator.end_training()
        summary = {
            "run": str(self.folder),
            "stage": self.described["stage"],
            "model": self.described["model"],
            "steps": schedule.steps,
            "processes": accelerator.num_processes,
            "negatives": recipe.batch // recipe.accumulate - 1,
            "seconds": round(self.seconds + time.perf_counter() - began, 1),
            "trainable": sum(p.numel() for p in self.plain.parameters() if p.requires_grad),
            "epochs": self.history,
            "validation": measured,
            "alarms": monitor.alarms,
        }
        if main:
            publish.write_json(self.folder / "summary.json", summary)
        return summary

    def _step(self, losses_of: Losses, read: Reading, monitor: Monitor) -> float:
        """Forward, backward, clip, update. A step whose loss or gradient is not finite on any process changes nothing."""
        accelerator, recipe = self.accelerator, self.recipe
        self.model.train()
        torch.manual_seed(int(generator(self.seed, "step", read.step, accelerator.process_index).integers(2**62)))
        draws = torch.Generator().manual_seed(int(generator(self.seed, "negatives", read.step).integers(2**62)))
        self.optimizer.zero_grad()
        self._now.clear()
        parts, found = split_batch(read.batch, read.captions, recipe.accumulate), {}
        for number, (part, texts) in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    losses = losses_of(part.to(accelerator.device), texts, read.step, draws)
                    loss = torch.stack([self.weights[k] * v for k, v in losses.items()]).sum() / len(parts)
                accelerator.backward(loss)
            for name, value in (losses | {"loss": loss * len(parts)}).items():
                found[name] = found.get(name, 0.0) + value.detach().float() / len(parts)
        norm: Any = accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        found["gradient_norm"] = norm.detach().float()
        asked = norm.new_tensor(self.asked(), dtype=torch.float32)  # all processes stop after the same step
        beside = {name: torch.stack(values).mean() for name, values in self._now.items()}
        told: Any = accelerator.reduce(torch.stack([*found.values(), *beside.values(), asked]), "mean")
        *values, stop = told.tolist()
        every, self.stopping = dict(zip([*found, *beside], values, strict=True)), stop > 0
        means = {name: every[name] for name in found}
        finite = all(map(math.isfinite, means.values()))  # a mean over processes is not, where one of them is not
        scaler = accelerator.scaler
        overflow = scaler is not None and math.isfinite(means["loss"]) and scaler.get_scale() > 1
        if finite:
            self.optimizer.step()
            for name, value in every.items():
                self._measured.setdefault(name, []).append(value)
        else:
            monitor.skipped(read.step + 1, means)
            if scaler is not None:  # fp16: a gradient that overflows under its scale is no fault of the run; it halves
                scaler.update()
        self.guard.stepped(read.step, finite or overflow, read.numbers, means, accelerator.is_main_process)
        return means["loss"]

    def _save(self, step: int, epoch: int, began: float, measured: dict) -> None:
        state = self.described | {
            "step": step,
            "epoch": epoch,
            "epochs": self.history,
            "seconds": round(self.seconds + time.perf_counter() - began, 1),
            "validation": measured,
            "nonfinite": self.guard.bad,
            "measured": self._measured,
            "cpu_threads": torch.get_num_threads(),
            "random": {"seed": self.seed, "step": step},
            "scaler": scaler_state(self.accelerator.scaler),
        }
        checkpoint.save(self.folder, self.plain, self.optimizer.optimizer, state, self.recipe.keep)


def split_batch(batch: Any, captions: list[str], parts: int) -> list[tuple[Any, list[str]]]:
    """A batch in `parts` equal pieces, for gradient accumulation."""
    size = len(captions) // parts
    pieces = [slice(start, start + size) for start in range(0, len(captions), size)]
    return [
        (type(batch)(**{k: None if v is None else v[part] for k, v in vars(batch).items()}), captions[part])
        for part in pieces
    ]
