"""The training loop: AdamW, warm-up and cosine per step, clipping, a finite guard, validation, checkpoints, trackers.

Every step's randomness is seeded by (seed, step, rank), and its samples by (seed, epoch, step): resuming in the middle
of an epoch is one integer, and gives the same weights as a run that was never interrupted.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from xformer import checkpoint, publish
from xformer.alarms import Plan
from xformer.console import say
from xformer.data import Pairs, Schedule, generator, stream
from xformer.errors import SettingsError, TrainingError
from xformer.monitor import Monitor
from xformer.settings import Recipe, Stage1, Stage2
from xformer.trackers import refuse_missing

Losses = Callable[[Any, list[str], int, torch.Generator], dict[str, Tensor]]
Validate = Callable[[], tuple[dict[str, float], np.ndarray | None]]  # figures, and a picture uint8 [H, W, 3]
TRACKED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
MAX_BAD_STEPS = 3


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Linear warm-up from warmup_lr to lr, then a cosine to min_lr, per step (LAVIS moves it once per epoch)."""
    warmup = min(recipe.warmup, max(1, steps // 2)) if recipe.warmup else 0
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no weight decay on 0-D and 1-D parameters and on the queries."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim < 2 or name.endswith("query_tokens") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)


class Loop:
    """One run in its folder: settings.json, log.jsonl, tensorboard/, pictures/, checkpoints/, summary.json."""

    def __init__(
        self, folder: Path, model: nn.Module, pairs: Pairs, recipe: Stage1 | Stage2, seed: int, described: dict,
        resume: bool,
    ) -> None:  # fmt: skip
        refuse_missing(recipe.trackers)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        try:
            self.accelerator = Accelerator(
                mixed_precision=TRACKED[recipe.precision],
                gradient_accumulation_steps=recipe.accumulate,
                cpu=not torch.cuda.is_available(),
            )
        except ValueError as error:
            raise SettingsError(f"train.precision={recipe.precision} does not work on this machine: {error}") from None
        world = self.accelerator.num_processes
        batch = min(recipe.batch, len(pairs))
        if batch % (world * recipe.accumulate):
            raise SettingsError(
                f"train.batch {batch} must be a multiple of {world} processes x {recipe.accumulate} steps."
            )
        self.folder, self.pairs, self.recipe, self.described = folder, pairs, recipe, described
        self.seed, self.plain = seed, model
        self.weights: dict[str, float] = dict(recipe.weights)
        self.schedule = Schedule(len(pairs), batch, recipe.epochs, recipe.max_steps, seed)
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model, recipe))
        self.start, self.history, self.seconds = 0, [], 0.0
        self.validation: dict[str, float] = {}
        self._measured: dict[str, list[float]] = {}
        if resume:
            newest = checkpoint.newest(folder)
            state = checkpoint.read_state(newest)
            self._refuse_other_settings(state)
            checkpoint.load_model(newest, model)
            checkpoint.load_optimizer(newest, model, self.optimizer.optimizer)
            self.start, self.history, self.seconds = state["step"], state["epochs"], state["seconds"]
            self.validation = state["validation"]
            say(f"resuming {folder} at step {self.start:,}")

    def _refuse_other_settings(self, state: dict) -> None:
        for key in ("settings", "identities", "model", "draws"):
            if json.loads(json.dumps(self.described[key])) != state[key]:
                raise SettingsError(
                    f"{self.folder}: {key} differ from those the run was started with; use the same ones."
                )

    def measure(self, **values: Tensor) -> None:
        """Remembers a measurement until the next line of the log."""
        for name, value in values.items():
            self._measured.setdefault(name, []).append(float(value.detach()))

    def run(self, losses_of: Losses, validate: Validate, draws: int) -> dict[str, Any]:
        """Trains to the end. Returns the summary. Raises TrainingError after three losses in a row that are not finite."""
        accelerator, schedule, recipe = self.accelerator, self.schedule, self.recipe
        rank, world = accelerator.process_index, accelerator.num_processes
        if accelerator.is_main_process:
            publish.write_json(self.folder / "settings.json", self.described)
        began, bad, measured = time.perf_counter(), 0, self.validation
        plan = Plan(schedule.steps, recipe.warmup, self.described["settings"]["qformer"]["queries"])
        monitor = Monitor(self.folder, self.described, plan, self.start, recipe.trackers, accelerator.is_main_process)
        batches = stream(self.pairs, schedule, self.start, rank, world, draws)
        try:
            with monitor:
                for step, epoch, draw, batch, captions in monitor.timed(batches):
                    if len(self.history) <= epoch:
                        self.history.append({"epoch": epoch, "draw": draw if draws else None})
                        monitor.epoch(step, self.history[-1])
                    rate = learning_rate(recipe, step, schedule.steps)
                    for group in self.optimizer.param_groups:
                        group["lr"] = rate
                    total = self._step(losses_of, batch, captions, step)
                    bad = 0 if math.isfinite(total) else bad + 1
                    if bad == MAX_BAD_STEPS:
                        raise TrainingError(
                            f"the loss was not finite in {bad} steps in a row (step {step}); the last checkpoint is kept: "
                            "lower train.lr, or use train.precision=bf16."
                        )
                    done = step + 1
                    monitor.stepped(done, schedule.batch, total)
                    last = done == schedule.steps
                    if done % recipe.log_every == 0 or last:
                        line = {name: sum(v) / len(v) for name, v in self._measured.items() if v}
                        self._measured.clear()
                        monitor.train(done, epoch, draw, rate, line)
                    if done % recipe.validate_every == 0 or last:
                        measured, picture = validate()
                        monitor.validated(done, measured, picture)
                    if done % recipe.save_every == 0 or last:
                        self._save(done, epoch, began, measured)
        finally:
            accelerator.end_training()
        summary = {
            "run": str(self.folder),
            "stage": self.described["stage"],
            "model": self.described["model"],
            "steps": schedule.steps,
            "seconds": round(self.seconds + time.perf_counter() - began, 1),
            "trainable": sum(p.numel() for p in self.plain.parameters() if p.requires_grad),
            "epochs": self.history,
            "validation": measured,
            "alarms": monitor.alarms,
        }
        if accelerator.is_main_process:
            publish.write_json(self.folder / "summary.json", summary)
        return summary

    def _step(self, losses_of: Losses, batch: Any, captions: list[str], step: int) -> float:
        """Forward, backward, clip, update; a step whose loss or gradient is not finite changes nothing."""
        accelerator, recipe = self.accelerator, self.recipe
        self.model.train()
        torch.manual_seed(int(generator(self.seed, "step", step, accelerator.process_index).integers(2**62)))
        draws = torch.Generator().manual_seed(torch.initial_seed())
        parts = split_batch(batch, captions, recipe.accumulate)
        self.optimizer.zero_grad()
        total = 0.0
        for part, texts in parts:
            with accelerator.autocast():
                found = losses_of(part.to(accelerator.device), texts, step, draws)
                loss = torch.stack([self.weights[k] * v for k, v in found.items()]).sum() / len(parts)
            accelerator.backward(loss * recipe.accumulate)  # Accelerate divides by the accumulation steps itself
            total += float(loss.detach())
            for name, value in found.items():
                self._measured.setdefault(name, []).append(float(value.detach()))
        self._measured.setdefault("loss", []).append(total)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        if norm is not None:
            self._measured.setdefault("gradient_norm", []).append(float(norm))
        finite = math.isfinite(total) and (norm is None or math.isfinite(float(norm)))
        if accelerator.scaler is not None:  # fp16: the scaler skips a step that overflows and lowers its scale
            self.optimizer.step()
            return total
        if finite:
            self.optimizer.step()
        return total if finite else math.nan

    def _save(self, step: int, epoch: int, began: float, measured: dict) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state = self.described | {
                "step": step,
                "epoch": epoch,
                "epochs": self.history,
                "seconds": round(self.seconds + time.perf_counter() - began, 1),
                "validation": measured,
            }
            checkpoint.save(self.folder, self.plain, self.optimizer.optimizer, state, self.recipe.keep)
        self.accelerator.wait_for_everyone()


def split_batch(batch: Any, captions: list[str], parts: int) -> list[tuple[Any, list[str]]]:
    """A batch in `parts` equal pieces, for gradient accumulation."""
    if parts == 1:
        return [(batch, captions)]
    size = len(captions) // parts
    pieces = []
    for start in range(0, size * parts, size):
        part = slice(start, start + size)
        pieces.append(
            (type(batch)(**{k: None if v is None else v[part] for k, v in vars(batch).items()}), captions[part])
        )
    return pieces
