"""Experiment trackers, through Accelerate: TensorBoard, Weights & Biases, MLflow. None of them may cost a run.

All write into the run folder unless the environment says otherwise (WANDB_MODE=online, MLFLOW_TRACKING_URI). One that
cannot be reached is left out with one line, at the start or in the middle of a run.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xformer.console import say
from xformer.errors import SettingsError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
WAIT = 30  # seconds for a server's answer


def refuse_missing(names: Sequence[str]) -> None:
    """Raises SettingsError for a tracker that is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise SettingsError(
                f"train.trackers: {name} is not installed; pip install 'xformer-mllm[trackers]', or leave {name} out."
            )


def _tensorboard(folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    def hook(told: threading.ExceptHookArgs) -> None:  # the writer's error, a full disk for example, is raised again by
        if type(told.thread).__name__ != "_AsyncWriterThread":  # the next call, which says it in a line
            threading.__excepthook__(told)

    threading.excepthook = hook
    return TensorBoardTracker("tensorboard", str(folder))


def _wandb(folder: Path) -> Any:
    from accelerate.tracking import WandBTracker

    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb  # pyright: ignore[reportMissingImports]  (an extra)

    mode: Any = os.environ.get("WANDB_MODE", "offline")
    settings = wandb.Settings(init_timeout=WAIT)
    return WandBTracker("xformer", mode=mode, dir=str(folder), name=folder.name, settings=settings)


def _mlflow(folder: Path) -> Any:
    from accelerate.tracking import MLflowTracker

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(WAIT))
    import mlflow  # pyright: ignore[reportMissingImports]  (an extra)

    if "MLFLOW_TRACKING_URI" not in os.environ:  # plain files in the run, as TensorBoard's; no database to run
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
    return MLflowTracker("xformer", run_name=folder.name)


START = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


class Trackers:
    """The trackers of one run; a call never raises."""

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any]) -> None:
        self.alive: dict[str, Any] = {}
        for name in names:
            tracker = self._try(name, partial(_started, name, folder, config))
            if tracker is not None:
                self.alive[name] = tracker

    def log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self.alive.items()):
            self._try(name, partial(tracker.log, values, step=step))

    def picture(self, file: Path, pixels: np.ndarray, step: int) -> None:
        """A picture uint8 [H, W, 3] that also lies in `file`."""
        for name, tracker in list(self.alive.items()):
            if name == "mlflow":
                self._try(name, partial(tracker.log_artifact, str(file), "pictures"))
            else:
                options = {"dataformats": "NHWC"} if name == "tensorboard" else {}
                call = partial(tracker.log_images, {"reconstruction": pixels[None]}, step=step, **options)
                self._try(name, call)

    def finish(self) -> None:
        for name, tracker in list(self.alive.items()):
            self._try(name, tracker.finish)

    def _try(self, name: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # whatever a tracker raises: the run goes on without it
            self.alive.pop(name, None)
            why = " ".join(str(error).split())[:200] or type(error).__name__
            say(f"{name} is left out from here on, and the run goes on; its figures are in log.jsonl too: {why}")
            return None


def _started(name: str, folder: Path, config: dict[str, Any]) -> Any:
    tracker = START[name](folder)
    tracker.start()
    if name != "tensorboard":  # its hyper-parameters are a table that needs a metric; settings.json holds them
        tracker.store_init_configuration(config)
    return tracker
