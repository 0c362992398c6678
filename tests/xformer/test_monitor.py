"""What a person sees of a run: log, live table, plain lines, pictures, trackers, and alarms once per episode."""

import importlib.util
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from xformer import alarms, trackers
from xformer.alarms import Plan
from xformer.console import RunView
from xformer.errors import SettingsError
from xformer.losses import ITM_CONSTANT
from xformer.model import Stage1, XFormer
from xformer.monitor import Monitor, read_log
from xformer.settings import load_settings
from xformer.train import train_stage1

PLAN = Plan(steps=1000, warmup=40, queries=16)


def train(step: int, itm: float = 0.5, wait: float = 0.1) -> dict:
    return {"step": step, "event": "train", "itm": itm, "data_wait": wait}


def validated(step: int, rank: float = 8.0, error: float = 0.2) -> dict:
    return {"step": step, "event": "validate", "effective_rank": rank, "reconstruction": error,
            "reconstruction_of_mean": 0.3}  # fmt: skip


GOOD = [line for n in range(1, 21) for line in (train(50 * n), validated(50 * n))]
BAD = {
    "itm_at_constant": [train(50 * n, itm=ITM_CONSTANT - 0.002) for n in range(1, 12)],
    "queries_collapsed": [validated(100, rank=1.2), validated(200, rank=1.1)],
    "reconstruction_at_mean": [validated(100, error=0.31), validated(200, error=0.30)],
    "reader_is_slow": [train(50 * n, wait=0.7) for n in range(1, 7)],
    "validation_not_finite": [
        validated(100, error=math.nan, rank=math.nan),
        validated(200, error=math.nan, rank=math.nan),
    ],
}
# what comes close and must be silent
NEARLY = {
    "one line of ITM below the constant": [train(50 * n, itm=0.60 if n == 5 else 0.636) for n in range(1, 12)],
    "ITM at the constant for less than half of the run": [train(50 * n, itm=0.636) for n in range(1, 10)],
    "ITM at the constant during the warm-up": [train(10 * n, itm=0.64) for n in range(1, 5)],
    "one collapsed validation": [validated(100, rank=8.0), validated(200, rank=1.1)],
    "one bad reconstruction": [validated(100, error=0.4), validated(200, error=0.29)],
    "one fast line": [train(50 * n, wait=0.2 if n == 4 else 0.9) for n in range(1, 7)],
    "too few lines": [train(900, itm=0.64, wait=0.9), validated(950, rank=1.0, error=0.5)],
    "no reconstruction": [{"step": n, "event": "validate", "itm": 0.5} for n in (1, 2, 3)],
}


def test_a_healthy_run_is_silent() -> None:
    assert all(not alarms.sounding(GOOD[:n], PLAN) for n in range(len(GOOD) + 1))


@pytest.mark.parametrize("name", BAD)
def test_each_alarm_sounds_alone_and_says_what_to_try(name: str) -> None:
    found = alarms.sounding(BAD[name], PLAN)
    assert list(found) == [name]
    assert found[name].count(". ") == 0 and found[name].endswith(".") and ":" in found[name]
    assert alarms.sounding(GOOD + [line | {"step": line["step"] + 1000} for line in BAD[name]], PLAN).keys() == {name}


@pytest.mark.parametrize("lines", NEARLY.values(), ids=NEARLY)
def test_what_comes_close_is_silent(lines: list[dict]) -> None:
    assert not alarms.sounding(lines, PLAN)


def curve(*values: float) -> list[dict]:
    return [train(25 * n, itm=value) for n, value in enumerate(values, 1)]


LEAVES = curve(0.651, 0.649, 0.639, 0.637, 0.637, 0.637, 0.636, 0.634, 0.630, 0.588, 0.503, 0.438)  # the slowest seen


@pytest.mark.parametrize("steps", [200, 250, 300, 540])
def test_a_short_run_that_is_learning_to_match_is_silent_all_the_way(steps: int) -> None:
    for n in range(len(LEAVES) + 1):
        ended = n * 25 >= steps and LEAVES[n - 1]["itm"] > ITM_CONSTANT - alarms.ITM_MARGIN
        assert ended or not alarms.sounding(LEAVES[:n], Plan(steps, 40, 16)), n


@pytest.mark.parametrize("steps", [100, 150, 200, 250, 300, 540])
def test_a_short_run_that_ends_at_the_constant_says_so(steps: int) -> None:
    stuck, plan = curve(*[0.6365] * (steps // 25)), Plan(steps, 40, 16)
    if steps % 25:
        stuck.append(train(steps, itm=0.6365))  # the loop logs the last step
    assert not any(alarms.sounding(stuck[:n], plan) for n in range(13) if 25 * n < min(300, steps))
    says = alarms.sounding(stuck, plan)["itm_at_constant"]
    assert f"to {steps}" in says and (f"train longer than {steps} steps" in says) == (steps < 300)


def monitor(folder: Path, start: int = 0) -> Monitor:
    described = {"stage": 1, "model": "xformer", "settings": load_settings().dump()}
    return Monitor(folder, described, PLAN, start, [], main=True)


def told(found: Monitor, lines: list[dict]) -> None:
    with found:
        for line in lines:
            found._tell(line)


def test_an_alarm_sounds_once_per_episode_and_again_in_the_next(tmp_path: Path) -> None:
    slow = [train(10 * n, wait=0.9) for n in range(1, 11)]
    told(monitor(tmp_path), [*slow, train(110, wait=0.1), *[line | {"step": line["step"] + 110} for line in slow]])
    assert [(a["step"], a["alarm"]) for a in read_log(tmp_path) if a["event"] == "alarm"] == [
        (50, "reader_is_slow"), (160, "reader_is_slow"),
    ]  # fmt: skip


def test_a_resumed_run_keeps_each_step_once_and_its_alarm_stays_known(tmp_path: Path) -> None:
    slow = [train(10 * n, wait=0.9) for n in range(1, 11)]
    told(monitor(tmp_path), slow)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 101, "ev')  # cut short by a kill
    again = monitor(tmp_path, start=70)
    assert [a["step"] for a in again.alarms] == [50]
    told(again, slow[7:])
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines if line["event"] == "train"] == [10 * n for n in range(1, 11)]
    assert sum(line["event"] == "alarm" for line in lines) == 1


def test_a_run_logs_speed_and_draws_reconstructions(stage1: Path) -> None:
    lines = read_log(stage1)
    found = [line for line in lines if line["event"] == "train"]
    assert {"lr", "itc", "itm", "itg", "reconstruction", "samples_per_second", "data_wait", "memory_mib",
            "seconds_left"} <= set(found[0])  # fmt: skip
    assert all(0 <= line["data_wait"] <= 1 and line["samples_per_second"] > 0 for line in found)
    assert found[-1]["seconds_left"] == 0
    (last,) = [line for line in lines if line["event"] == "validate"]
    assert last["effective_rank"] > alarms.MIN_RANK and last["reconstruction"] < last["reconstruction_of_mean"]
    picture = np.asarray(Image.open(stage1 / "pictures/step-00000004.png"))
    assert picture.ndim == 3 and picture.std() > 10
    assert json.loads((stage1 / "summary.json").read_text())["alarms"] == []


def test_the_live_table_shows_losses_speed_and_alarms(monkeypatch: pytest.MonkeyPatch) -> None:
    view = RunView("stage 1 xformer", 1000)
    line = train(50) | {"lr": 1e-3, "loss": 7.5, "itc": 2.25, "samples_per_second": 241.0, "memory_mib": 812.0,
                        "seconds_left": 75.0}  # fmt: skip
    for one in (line, validated(50), {"step": 50, "event": "alarm", "alarm": "x", "says": "the reader is slow."}):
        view.live = object()  # a terminal
        view.line(one)
    view.step(60, 7.25)
    view.console = Console(file=io.StringIO(), width=120, record=True)
    view.console.print(view.render())
    text = view.console.export_text()
    for part in ("itc", "2.250", "1.0e-03", "241.0", "10%", "812", "60/1,000", "1:15 left", "query rank 8.000",
                 "ALARM step 50: the reader is slow."):  # fmt: skip
        assert part in text, part
    view.console = Console(file=io.StringIO(), width=60, record=True)
    view.console.print(view.render())
    assert "…" not in view.console.export_text()  # columns go before numbers are cut
    view.lines[0] |= {"itg": 5.125, "reconstruction": 0.25, "itm_accuracy": 0.7, "gradient_norm": 1.5}
    view.console = Console(file=io.StringIO(), width=80, record=True)
    view.console.print(view.render())
    (below,) = [line for line in view.console.export_text().splitlines() if "1:15 left" in line]
    assert "| MiB 812" in below and len(below.rstrip()) <= 80  # what has no column stands below


def test_a_validation_that_is_not_finite_sounds_its_own_alarm_and_ends_no_run(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Stage1.forward

    def broken(self: Stage1, *given):
        found, measured = honest(self, *given)
        return (found if self.training else {name: loss * math.nan for name, loss in found.items()}), measured

    def bridge(self: XFormer, clip, local):
        enhanced, rebuilt = forward(self, clip, local)
        return (enhanced if self.training else enhanced * math.nan), rebuilt

    forward = XFormer.forward
    monkeypatch.setattr(Stage1, "forward", broken)
    monkeypatch.setattr(XFormer, "forward", bridge)
    settings = load_settings(overrides=[*small, "train.validate_every=2"])
    found = train_stage1([features], tmp_path / "run", settings, "xformer", resume=False)
    assert [(a["step"], a["alarm"]) for a in found["alarms"]] == [(2, "validation_not_finite")]
    assert "validation is not finite (itc, itm, itg, reconstruction" in found["alarms"][0]["says"]
    assert "effective_rank" in found["alarms"][0]["says"]


def test_the_log_is_on_the_disk_before_a_checkpoint_is(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened = []
    monkeypatch.setattr(Monitor, "sync", lambda self: happened.append("log"))
    monkeypatch.setattr("xformer.checkpoint.save", lambda *_: happened.append("checkpoint"))
    train_stage1([features], tmp_path / "run", load_settings(overrides=small), "qformer", resume=False)
    assert happened == ["log", "checkpoint"] * (len(happened) // 2) and happened


def test_lines_are_plain_where_there_is_no_terminal(features: Path, small: list[str], tmp_path: Path, capfd) -> None:
    train_stage1([features], tmp_path / "run", load_settings(overrides=small), "qformer", resume=False)
    shown = capfd.readouterr().err
    assert "\x1b" not in shown
    assert "stage 1 qformer step 1/4 | loss" in shown and "samples/s" in shown
    assert "stage 1 qformer validation step 4/4 | itc" in shown


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    settings = load_settings(overrides=[*small, "train.trackers=[wandb]"])
    with pytest.raises(SettingsError, match="wandb is not installed; pip install"):
        train_stage1([features], tmp_path / "run", settings, "qformer", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_in_the_middle_never_costs_the_run(tmp_path: Path, monkeypatch, capsys) -> None:
    class Failing:
        def log(self, values: dict, step: int) -> None:
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(trackers.START, "tensorboard", lambda folder: Failing())
    monkeypatch.setattr(Failing, "start", lambda self: None, raising=False)
    found = trackers.Trackers(["tensorboard"], tmp_path, {})
    for step in (1, 2):
        found.log({"loss": 1.0}, step)
    found.finish()
    assert capsys.readouterr().out.count("tensorboard is left out") == 1 and not found.alive


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_writes_offline_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    found = trackers.Trackers(["wandb"], tmp_path, {"lr": "0.1"})
    found.log({"loss": 1.0}, 1)
    found.picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), 1)
    assert list(found.alive) == ["wandb"]
    found.finish()
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_writes_into_the_run_and_a_server_that_is_not_there_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    found = trackers.Trackers(["mlflow"], tmp_path, {"lr": "0.1"})
    found.log({"loss": 1.0}, 1)
    found.picture(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8), 1)
    found.finish()
    assert list(found.alive) == ["mlflow"], capsys.readouterr().out
    assert list((tmp_path / "mlflow").rglob("metrics/loss")) and list((tmp_path / "mlflow").rglob("a.png"))
    import mlflow

    mlflow.set_tracking_uri("http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    gone = trackers.Trackers(["mlflow"], tmp_path, {})
    assert not gone.alive and "mlflow is left out" in capsys.readouterr().out
