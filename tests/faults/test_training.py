"""Killed, starved and fed the wrong features: a training run goes on exactly, or stops in one sentence."""

import errno
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline import commits
from tests.faults.report import ROOT, line
from tests.pipeline.test_extract import withdraw
from xformer import checkpoint, losses, publish, train
from xformer.errors import CheckpointError, SettingsError, StoreError, TrainingError
from xformer.resume import refuse_other_run
from xformer.settings import load_settings
from xformer.train import train_stage1

TRAIN = """
import json, sys
from pathlib import Path
from xformer import console
from xformer.settings import load_settings
from xformer.train import train_stage1
console.set_quiet(True)
store, run, overrides, resume = sys.argv[1:]
train_stage1([Path(store)], Path(run), load_settings(overrides=json.loads(overrides)), "xformer", resume == "yes")
"""


def lines(run: Path, event: str) -> list[dict]:
    found = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    return [entry for entry in found if entry["event"] == event]


def fed(run: Path) -> list[tuple[int, str, float]]:
    """What every step read and lost."""
    return [(entry["step"], entry["pairs"], entry["loss"]) for entry in lines(run, "train")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.newest(run)
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def killed_runs(store: Path, kills: int, steps: int, small: list[str], tmp_path: Path) -> int:
    """One run killed again and again at random moments after it has gone further, and one left alone."""
    overrides = [*small, f"train.max_steps={steps}", "train.save_every=2", "train.validate_every=1000", "train.keep=1",
                 "qformer.dropout=0.1", "stage1.hard_negatives_after=3", "train.trackers=[]"]  # fmt: skip
    run, draw, done = tmp_path / "killed", random.Random(0), 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    while not (run / "summary.json").exists():
        before = len(fed(run)) if (run / "log.jsonl").exists() else 0
        resume = "yes" if checkpoint.checkpoints(run) else "no"
        words = [sys.executable, "-c", TRAIN, str(store), str(run), json.dumps(overrides), resume]
        child = subprocess.Popen(words, env=environment, cwd=tmp_path)
        deadline = time.monotonic() + 600
        if done < kills:
            further = before + draw.randrange(1, max(2, steps // (kills + 1)))
            while child.poll() is None and time.monotonic() < deadline:
                if (run / "log.jsonl").exists() and (run / "log.jsonl").read_text().count('"train"') > further:
                    break
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1))
            assert child.poll() in (None, 0), "the run failed by itself"
            done += child.poll() is None
            child.kill()
            child.wait()
        else:
            assert child.wait(600) == 0
    alone = tmp_path / "alone"
    words = [sys.executable, "-c", TRAIN, str(store), str(alone), json.dumps(overrides), "no"]
    subprocess.run(words, env=environment, cwd=tmp_path, check=True)  # with as many threads as the others
    assert fed(run) == fed(alone) and len(fed(run)) == steps
    one, other = weights(run), weights(alone)
    assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one)
    return done


def test_two_kills_end_in_the_same_weights(features: Path, small: list[str], tmp_path: Path) -> None:
    line("SIGKILL of a training run, weights and samples equal", 2, killed_runs(features, 2, 9, small, tmp_path))


@pytest.mark.slow
def test_twenty_kills_end_in_the_same_weights(features: Path, small: list[str], tmp_path: Path) -> None:
    line("SIGKILL of a training run, weights and samples equal", 20, killed_runs(features, 20, 90, small, tmp_path))


def poison(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
    honest, calls = losses.itg, []

    def poisoned(*arguments):
        calls.append(1)
        return honest(*arguments) * (float("nan") if when(len(calls) - 1) else 1.0)

    monkeypatch.setattr(losses, "itg", poisoned)


def test_one_step_that_is_not_finite_changes_nothing(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [*small, "train.max_steps=8", "train.validate_every=1000", "train.save_every=1", "train.keep=9"]
    poison(monkeypatch, lambda step: step == 7)  # the eighth and last
    monkeypatch.setattr("xformer.validate.validation_batches", lambda *_: [])
    train_stage1([features], tmp_path / "run", load_settings(overrides=wanted), "qformer", resume=False)
    (skipped,) = lines(tmp_path / "run", "skipped")
    assert skipped["step"] == 8 and skipped["itg"] == "nan"
    last, before = ({n: v for n, v in load_file(c / "model.safetensors").items()} for c in
                    checkpoint.checkpoints(tmp_path / "run")[:-3:-1])  # fmt: skip
    assert all(torch.equal(last[k], before[k]) and last[k].isfinite().all() for k in last)
    assert not (tmp_path / "run" / "nonfinite.json").exists()
    line("a loss that is not finite at step 7", 1, 1)


def test_three_steps_in_a_row_end_the_run_with_their_samples(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step >= 2)
    with pytest.raises(TrainingError, match=r"itg was not finite in 3 steps in a row \(step 4\).*nonfinite.json"):
        train_stage1([features], tmp_path / "run", load_settings(overrides=[*small, "train.max_steps=9"]), "qformer",
                     resume=False)  # fmt: skip
    found = json.loads((tmp_path / "run/nonfinite.json").read_text())
    assert [step["step"] for step in found] == [2, 3, 4] and found[0]["losses"]["itg"] == "nan"
    sample = found[0]["samples"][0]
    assert len(found[0]["samples"]) == 16 and sample["store"] == str(features) and sample["id"] and sample["caption"]


def test_a_full_disk_while_saving_keeps_the_old_checkpoint(
    features: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    import cli

    honest = checkpoint.save_file
    saves: list[Path] = []

    def full(tensors: dict, file: Path, metadata: dict) -> None:
        saves.append(file)
        if len(saves) == 4:  # what safetensors says on a real full tmpfs
            file.write_bytes(b"half")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        honest(tensors, file, metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    words = ["train", "--stage", "1", "--features", str(features), "--out", str(tmp_path / "run")]
    words += [word for override in small for word in ("--set", override)]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--quiet"])
    assert stopped.value.code == 3
    told = capsys.readouterr().err.splitlines()[-1]
    assert os.strerror(errno.ENOSPC) in told and "optimizer.safetensors" in told
    assert [c.name for c in checkpoint.checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert [f.name for f in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    line("the disk is full while saving", 1, 1)


def test_of_two_processes_the_one_that_cannot_save_says_so_and_the_other_leaves_quietly(
    features: Path, small: list[str], tmp_path: Path
) -> None:
    """A real EFBIG on rank 0; rank 1, without a launcher that ends it, finds the group broken."""
    words = ["train", "--stage", "1", "--features", str(features), "--out", str(tmp_path / "run"), "--model", "qformer"]
    words += [word for override in small for word in ("--set", override)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
             "OMP_NUM_THREADS": "1"}  # fmt: skip
    ranks = []
    for rank in ("0", "1"):
        command = [sys.executable, "-m", "cli", *words]
        if rank == "0":
            command = [
                "bash",
                "-c",
                'ulimit -f 500; exec "$@"',
                "bash",
                *command,
            ]  # KiB; a checkpoint has some thousand
        environment = os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [3, 3], told
    assert "xformer: File too large at" in told[0] and "--resume" in told[0]
    assert not any("Traceback" in text for text in told) and "xformer:" not in told[1], told
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EFBIG, errno.EDQUOT])
def test_a_disk_that_fails_while_saving_is_one_sentence(number: int, monkeypatch, capsys) -> None:
    import cli

    def fails(_: list[str]) -> None:
        raise OSError(number, os.strerror(number), "model.safetensors")

    monkeypatch.setattr(cli, "run_command", fails)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--stage", "1"])
    (told,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 3 and os.strerror(number) in told and told.endswith("run again with --resume.")


def test_a_full_disk_while_logging_names_the_file(tmp_path: Path) -> None:
    from xformer.alarms import Plan
    from xformer.monitor import Monitor

    run = tmp_path / "run"
    run.mkdir()
    monitor = Monitor(run, {"settings": {}, "stage": 1, "model": "qformer"}, Plan(9, 1, 16), 0, [], main=True)
    monitor.log.close()
    monitor.log = Path("/dev/full").open("a")
    with pytest.raises(OSError, match="No space left on device.*log.jsonl"), monitor:
        monitor.epoch(0, {"epoch": 0})


def test_a_store_that_grows_is_read_as_it_was(features: Path, stage1: Path, small: list[str], tmp_path: Path) -> None:
    store, run = Path(shutil.copytree(features, tmp_path / "s.zarr")), tmp_path / "run"
    shutil.copytree(stage1, run)
    shutil.rmtree(checkpoint.newest(run))
    for name in ("tokens", "kept"):
        shutil.copytree(store / "mae/draw-1" / name, store / "mae/draw-2" / name)
        meta = store / "mae/draw-2" / name / "zarr.json"
        content = json.loads(meta.read_text())
        content["attributes"]["usage"]["draw"] = 2
        meta.write_text(json.dumps(content))
    train_stage1([store], run, load_settings(overrides=small), "xformer", resume=True)
    assert checkpoint.read_state(checkpoint.newest(run))["draws"] == 2
    ours, theirs = weights(run), weights(stage1)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    shutil.rmtree(checkpoint.newest(run))
    withdraw(store, "mae/draw-2/tokens", {1})  # as if that draw were being extracted still
    with pytest.raises(StoreError, match="3 of 4 shards.*local.draws=2"):
        train_stage1([store], tmp_path / "new", load_settings(overrides=small), "xformer", resume=False)
    records = commits.committed(store, "mae/draw-2/kept")
    lost = {"row": 0, "id": "0", "source": "s", "reason": "lost since"}
    commits.publish(store, "mae/draw-2/kept", records[0] | {"dead": [lost]}, exclusive=False)
    train_stage1([store], run, load_settings(overrides=small), "xformer", resume=True)
    ours = weights(run)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    shutil.rmtree(checkpoint.newest(run))
    shutil.rmtree(store / "mae/draw-2")
    shutil.rmtree(store / "mae/draw-1")
    with pytest.raises(StoreError, match="reads 2 mask draws.*holds 1"):
        train_stage1([store], run, load_settings(overrides=small), "xformer", resume=True)


def test_a_store_whose_dead_rows_came_back_is_told(stage1: Path, small: list[str], tmp_path: Path) -> None:
    state = checkpoint.read_state(checkpoint.newest(stage1))
    with pytest.raises(StoreError, match=r"was started with \[1\] pairs.*start a new run with --init"):
        refuse_other_run(stage1, state | {"pairs": [1]}, state)


def test_what_fails_in_validation_loses_no_step(
    features: Path, stage1: Path, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, run = train.validate_stage1, tmp_path / "run"

    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(train, "validate_stage1", fails)
    wanted = [*small, "train.save_every=1000", "train.validate_every=3"]
    for step in (3, 4):
        with pytest.raises(torch.OutOfMemoryError):
            train_stage1([features], run, load_settings(overrides=wanted), "xformer", resume=step > 3)
        assert checkpoint.read_state(checkpoint.newest(run))["step"] == step
    monkeypatch.setattr(train, "validate_stage1", honest)
    summary = train_stage1([features], run, load_settings(overrides=wanted), "xformer", resume=True)
    assert summary["validation"] == json.loads((stage1 / "summary.json").read_text())["validation"]


def test_a_second_trainer_in_the_same_folder_is_refused(features: Path, small: list[str], tmp_path: Path) -> None:
    with publish.exclusive(tmp_path / "run/.lock"), pytest.raises(CheckpointError, match="another trainer"):
        train_stage1([features], tmp_path / "run", load_settings(overrides=small), "qformer", resume=False)
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_what_would_change_the_samples_is_refused(
    features: Path, stage1: Path, small: list[str], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(features, tmp_path / "other.zarr"))
    with pytest.raises(SettingsError, match="pairs|stores"):
        train_stage1([features, other], stage1, load_settings(overrides=small), "xformer", resume=True)
    for wrong, match in ((["train.batch=100000"], "there are .* pairs"), (["data.weights=[1,2]"], "2 given for 1")):
        with pytest.raises(SettingsError, match=match):
            changed = load_settings(overrides=[*small, *wrong])
            train_stage1([features], tmp_path / "run", changed, "xformer", resume=False)
    state = checkpoint.read_state(checkpoint.newest(stage1))
    from xformer.resume import refuse_missing_state

    refuse_missing_state(stage1, state, state["settings"]["seed"])
    for key in ("random", "scaler", "epochs"):
        with pytest.raises(CheckpointError, match="lacks"):
            refuse_missing_state(stage1, {k: v for k, v in state.items() if k != key}, state["settings"]["seed"])


def test_a_run_goes_on_with_other_settings_only_where_they_change_no_weight(tmp_path: Path) -> None:
    from xformer.resume import refuse_other_run

    def described(*overrides: str, **more) -> dict:
        return {
            "stage": 2,
            "settings": load_settings(overrides=overrides).dump(),
            "task": "vqa",
            "llm": {"sha256": "a"},
        } | more

    harmless = ["train.trackers=[]", "data.threads=7", "train.threads=1", "train.log_every=3", "store.cache_dir=/tmp/x"]
    refuse_other_run(tmp_path, described(), described(*harmless))
    others = {
        r"stage2\.lr": described("train.lr=2e-4"),
        "task = 'vqa', not 'caption'": described(task="caption"),
        "llm.sha256": described(llm={"sha256": "b"}),
        "questions": described(questions="0" * 64),
    }
    for says, other in others.items():
        with pytest.raises(SettingsError, match=says):
            refuse_other_run(tmp_path, described(), other)
