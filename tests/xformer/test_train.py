"""Training: exact resume, logged draws, refusal of what does not fit, and a guard against losses that are not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_identities import rewrite
from xformer import checkpoint, stopping
from xformer.errors import CheckpointError, SettingsError, Stopped, StoreError, TrainingError
from xformer.loop import Loop
from xformer.monitor import read_log
from xformer.optimiser import learning_rate
from xformer.order import Schedule
from xformer.settings import load_settings
from xformer.train import train_stage1, train_stage2


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.newest(run) / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_resumed_in_the_middle_of_an_epoch_is_bitwise_the_same(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    settings = load_settings(overrides=small)
    copy = Path(shutil.copytree(stage1, tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoints(copy)[-1])
    assert checkpoint.read_state(checkpoint.newest(copy))["step"] == 2
    train_stage1([features], copy, settings, "xformer", resume=True)
    assert same(copy, stage1)
    other = tmp_path / "other"
    train_stage1([features], other, load_settings(overrides=small, seed=1), "xformer", resume=False)
    assert not same(other, stage1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_bitwise_the_same(
    features: Path, stage1: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    settings, step = load_settings(overrides=small), Loop._step

    def interrupted(loop: Loop, losses_of, read, monitor) -> float:
        if read.step == 2:  # between the saves of steps 2 and 4
            os.kill(os.getpid(), number)
        return step(loop, losses_of, read, monitor)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_step", interrupted)
        with pytest.raises(Stopped, match="step 3 is saved in .*--resume"):
            train_stage1([features], tmp_path / "run", settings, "xformer", resume=False)
    assert checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["step"] == 3
    train_stage1([features], tmp_path / "run", settings, "xformer", resume=True)
    assert same(tmp_path / "run", stage1)


def test_a_request_to_stop_that_comes_twice_at_once_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with stopping.asked_to_stop() as asked:
        assert not asked()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert asked()
        now[0] += 3
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_log_of_a_resumed_run_says_what_an_uninterrupted_one_does(
    features: Path, small: list[str], tmp_path: Path
) -> None:
    settings = load_settings(overrides=[*small, "train.log_every=4"])  # and saved every 2 steps
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_stage1([features], whole, settings, "xformer", resume=False)
    shutil.copytree(whole, run)
    shutil.rmtree(checkpoint.checkpoints(run)[-1])
    train_stage1([features], run, settings, "xformer", resume=True)
    first, second = ([e for e in read_log(r) if e["event"] == "train"] for r in (whole, run))
    assert [e["step"] for e in first] == [4] == [e["step"] for e in second]
    for name in ("loss", "itc", "itm_accuracy", "temperature", "gradient_norm"):
        assert first[0][name] == second[0][name], name


def test_a_run_goes_on_with_other_settings_of_later_stages_and_says_that_threads_differ(
    features: Path, stage1: Path, small: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    copy = Path(shutil.copytree(stage1, tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoints(copy)[-1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    other = load_settings(overrides=[*small, "stage2.lr=2e-4", "eval.beams=1", "finetune.epochs=2"])
    train_stage1([features], copy, other, "xformer", resume=True)
    assert "99 now" in capsys.readouterr().out


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again_as_it_was_started(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    settings, run, again = load_settings(overrides=small), tmp_path / "run", tmp_path / "again"
    train_stage1([features], run, settings, "xformer", resume=False, init=stage1)
    again.mkdir()
    shutil.copy(run / "settings.json", again)
    with pytest.raises(CheckpointError, match="was started from .*stage1, not from"):
        train_stage1([features], again, settings, "xformer", resume=True, init=run)
    with pytest.raises(SettingsError, match="stage1.lr"):
        other = load_settings(overrides=[*small, "stage1.lr=0.5"])
        train_stage1([features], again, other, "xformer", resume=True)
    train_stage1([features], again, settings, "xformer", resume=True)
    assert same(again, run) and not same(again, stage1)
    with pytest.raises(CheckpointError, match="was started without --init, not from"):
        train_stage1([features], stage1, settings, "xformer", resume=True, init=run)


def test_stage_2_goes_on_from_its_own_start(
    features: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    settings, copy = load_settings(overrides=small), Path(shutil.copytree(stage2, tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoints(copy)[-1])
    with pytest.raises(CheckpointError, match="was started from .*stage1, not from"):
        train_stage2([features], stage2, copy, settings, None, resume=True)
    with pytest.raises(CheckpointError, match="holds a run of stage 1"):
        train_stage2([features], None, stage1, settings, None, resume=True)
    train_stage2([features], None, copy, settings, None, resume=True)
    assert same(copy, stage2)
    assert checkpoint.read_state(checkpoint.newest(copy))["init"] == str(stage1)


def test_two_processes_that_are_asked_to_stop_save_the_same_step(
    features: Path, small: list[str], tmp_path: Path
) -> None:
    line = ["train", "--stage", "1", "--features", str(features), "--out", str(tmp_path / "run"), "--model", "qformer"]
    wanted = [
        *small,
        "train.max_steps=5000",
        "train.save_every=5000",
        "train.validate_every=5000",
        "stage1.epochs=5000",
    ]
    line += [word for override in wanted for word in ("--set", override)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([*launch, *line], env=environment, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/log.jsonl"
    while child.poll() is None and not (log.is_file() and log.read_text().count('"train"') >= 2):
        time.sleep(0.1)
    child.terminate()  # the launcher hands it on to both
    _, error = child.communicate(timeout=300)
    step = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["step"]
    assert 2 <= step < 5000 and error.count(f"stopped; step {step:,} is saved") == 1, error


def test_the_same_store_twice_is_refused(features: Path, small: list[str], tmp_path: Path) -> None:
    twice = [features, features.parent / "." / features.name]
    with pytest.raises(SettingsError, match="twice"):
        train_stage1(twice, tmp_path / "run", load_settings(overrides=small), "qformer", resume=False)


def test_the_log_and_the_checkpoint_hold_the_draw_of_each_epoch(
    features: Path, small: list[str], tmp_path: Path
) -> None:
    wanted = [*small, "train.batch=96", "train.max_steps=9", "stage1.weights.reconstruction=0"]
    train_stage1([features], tmp_path / "run", load_settings(overrides=wanted), "xformer", resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    epochs = [(line["epoch"], line["draw"]) for line in lines if line["event"] == "epoch"]
    assert epochs == [(0, 0), (1, 1), (2, 0)]
    state = checkpoint.read_state(checkpoint.newest(tmp_path / "run"))
    assert [(e["epoch"], e["draw"]) for e in state["epochs"]] == epochs
    assert state["settings"]["stage1"]["batch"] == 96


def test_checkpoints_hold_trainables_only_and_validation_names_the_constant(stage1: Path, stage2: Path) -> None:
    assert not any("decoder" in name for name in weights(stage1))
    assert not any("llm.model" in name for name in weights(stage2)) and "llm_proj.weight" in weights(stage2)
    measured = checkpoint.read_state(checkpoint.newest(stage1))["validation"]
    assert {"itm", "itm_constant", "itm_accuracy", "recall1_image_to_text", "itg", "reconstruction"} <= set(measured)
    assert list((stage1 / "tensorboard").rglob("events.out.*"))


def test_sample_order_is_a_permutation_that_depends_on_seed_and_epoch_only() -> None:
    schedule = Schedule(pairs=50, batch=8, epochs=3, max_steps=0, seed=5)
    assert schedule.per_epoch == 6 and schedule.steps == 18
    orders = [schedule.order(e) for e in range(3)]
    assert all(sorted(o) == list(range(50)) for o in orders)
    assert not np.array_equal(orders[0], orders[1])
    np.testing.assert_array_equal(orders[1], Schedule(50, 8, 9, 0, 5).order(1))


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    recipe = load_settings("paper").stage1
    assert learning_rate(recipe, 0, 10_000) == pytest.approx(1e-6 + (1e-4 - 1e-6) / 2000)
    assert learning_rate(recipe, 1999, 10_000) == pytest.approx(1e-4)
    assert learning_rate(recipe, 10_000, 10_000) == pytest.approx(1e-5)
    rates = [learning_rate(recipe, s, 10_000) for s in range(2000, 10_000, 500)]
    assert rates == sorted(rates, reverse=True)


def test_a_loss_that_is_not_finite_stops_after_three_steps_and_is_never_saved(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xformer import losses

    honest, calls = losses.itg, []

    def poisoned(*args):
        calls.append(1)
        return honest(*args) * (float("nan") if len(calls) > 2 else 1.0)

    monkeypatch.setattr(losses, "itg", poisoned)
    wanted = [*small, "train.max_steps=9", "train.validate_every=9"]
    with pytest.raises(TrainingError, match="3 steps in a row"):
        train_stage1([features], tmp_path / "run", load_settings(overrides=wanted), "qformer", resume=False)
    saved = checkpoint.checkpoints(tmp_path / "run")
    assert [p.name for p in saved] == ["step-00000002", "step-00000004"]
    a, b = (load_file(p / "model.safetensors") for p in saved)
    assert all(torch.equal(a[k], b[k]) for k in a) and all(v.isfinite().all() for v in b.values())


def test_a_start_of_another_model_or_depth_names_both(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    for model, override, words in (
        ("qformer", "seed=0", "is of the model xformer, --model is qformer"),
        ("xformer", "dual.depth=2", "dual.depth is 2 here and 1 in"),
    ):
        settings = load_settings(overrides=[*small, override])
        with pytest.raises((CheckpointError, SettingsError), match=words):
            train_stage1([features], tmp_path / "run", settings, model, resume=False, init=stage1)


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_resume(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(stage1, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    train_stage1([features], run, load_settings(overrides=small), "xformer", resume=True)
    assert same(run, stage1)
    with pytest.raises(CheckpointError, match="holds no run to resume"):
        train_stage1([features], tmp_path / "none", load_settings(overrides=small), "xformer", resume=True)


def test_stage_2_may_start_from_one_checkpoint_of_a_run(
    features: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    one, settings = checkpoint.newest(stage1), load_settings(overrides=small)
    train_stage2([features], one, tmp_path / "run", settings, None, resume=False)
    assert same(tmp_path / "run", stage2)


def test_damaged_checkpoints_are_found(stage1: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stage1, tmp_path / "run"))
    file = checkpoint.newest(copy) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.read_tensors(file.parent, "model.safetensors")


def test_a_half_written_checkpoint_is_not_one(stage1: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(stage1, tmp_path / "run"))
    newest = checkpoint.newest(copy)
    (newest / "state.json").unlink()
    assert checkpoint.newest(copy) != newest


def test_what_does_not_fit_is_refused_before_the_first_step(
    features: Path, stage1: Path, stage2: Path, small: list[str], tmp_path: Path
) -> None:
    settings = load_settings(overrides=small)
    with pytest.raises(CheckpointError, match="stage-1 run"):
        train_stage2([features], tmp_path / "none", tmp_path / "out", settings, None, resume=False)
    with pytest.raises(CheckpointError, match="is a run of stage 2; stage 2 starts from one of stage 1"):
        train_stage2([features], stage2, tmp_path / "out", settings, None, resume=False)
    with pytest.raises(CheckpointError, match="--model says qformer"):
        train_stage2([features], stage1, tmp_path / "out", settings, "qformer", resume=False)
    with pytest.raises(CheckpointError, match="holds a run already"):
        train_stage1([features], stage1, settings, "xformer", resume=False)
    with pytest.raises(SettingsError, match="train.lr|stage1.lr = 0.001, not 0.0002"):
        train_stage1([features], stage1, load_settings(overrides=[*small, "train.lr=2e-4"]), "xformer", resume=True)
    with pytest.raises(SettingsError, match="dual.itg"):
        changed = load_settings(overrides=[*small, "dual.itg=layerwise"])
        train_stage2([features], stage1, tmp_path / "out", changed, None, resume=False)
    with pytest.raises(StoreError, match="mask_ratio"):
        changed = load_settings(overrides=[*small, "mae.mask_ratio=0.5"])
        train_stage1([features], tmp_path / "out", changed, "xformer", resume=False)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_features_of_another_encoder_are_refused_and_the_field_is_named(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(features, tmp_path / "store.zarr"))
    rewrite(other, "clip/5/tokens", "identity", "weights_sha256")
    with pytest.raises(StoreError, match="clip weights_sha256"):
        train_stage2([other], stage1, tmp_path / "out", load_settings(overrides=small), None, resume=False)


def test_several_stores_train_together(features: Path, small: list[str], tmp_path: Path) -> None:
    other = Path(shutil.copytree(features, tmp_path / "more.zarr"))
    summary = train_stage1([features, other], tmp_path / "run", load_settings(overrides=small), "qformer", resume=False)
    assert summary["steps"] == 4


def test_two_processes_go_on_with_a_run_of_one(features: Path, stage1: Path, small: list[str], tmp_path: Path) -> None:
    run = Path(shutil.copytree(stage1, tmp_path / "run"))
    shutil.rmtree(checkpoint.checkpoints(run)[-1])
    line = ["train", "--stage", "1", "--features", str(features), "--out", str(run), "--resume"]
    line += [word for override in small for word in ("--set", override)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cli"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, *line], check=True, capture_output=True, env=environment, timeout=600)
    one, two = ([entry for entry in read_log(r) if entry["event"] == "train"] for r in (stage1, run))
    assert [(e["step"], e["pairs"]) for e in two] == [(e["step"], e["pairs"]) for e in one] and len(one) == 4
    for ours, theirs in zip(two, one, strict=True):
        for name in ("itc", "itm", "itg", "reconstruction", "loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (ours["step"], name)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["negatives"] == 15
    assert checkpoint.read_state(checkpoint.newest(run))["step"] == 4
