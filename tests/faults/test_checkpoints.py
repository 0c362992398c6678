"""Interrupted saves, damaged files, missing state: a run always has a checkpoint to go on from, and never a wrong one."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.faults.report import ROOT, line
from xformer import checkpoint
from xformer.errors import CheckpointError

STATE = {"stage": 1, "model": "qformer", "settings": {}, "identities": {}}


class Killed(BaseException):
    """The process died here: nothing after it reaches the disk, no clean-up either."""


class Faults:
    """Ends the process, as far as the disk can tell, at the n-th change of anything below a folder."""

    CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.link")

    def __init__(self) -> None:
        self.folder, self.left, self.seen = "", -1, 0
        sys.addaudithook(self._heard)  # cannot be taken back, hence one for the whole module

    def _heard(self, event: str, arguments: tuple) -> None:
        if self.left < 0 or not (event in self.CHANGES or event == "open"):
            return
        if event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if self.folder not in str(arguments[0]) and event not in ("os.remove", "os.rmdir"):  # these two name no folder
            return
        self.count()

    def count(self) -> None:
        self.seen += self.left >= 0
        if self.seen > self.left >= 0:
            raise Killed

    def fsync(self, handle: int) -> None:
        self.count()

    def save_file(self, tensors: dict, file: Path, metadata: dict) -> None:
        """Written outside Python, where no hook hears it: dies before it, or with half a file."""
        self.count()
        save_file(tensors, file, metadata)
        try:
            self.count()
        except Killed:
            content = file.read_bytes()
            self.left, left = -1, self.left
            file.write_bytes(content[: len(content) // 2])
            self.left = left
            raise

    def arm(self, folder: Path, after: int) -> None:
        self.folder, self.left, self.seen = str(folder), after, 0

    def disarm(self) -> None:
        self.left = -1


@pytest.fixture(scope="module")
def every_fault() -> Faults:
    return Faults()


@pytest.fixture
def faults(every_fault: Faults, monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr(os, "fsync", every_fault.fsync)
    monkeypatch.setattr(checkpoint, "save_file", every_fault.save_file)
    return every_fault


def trained(value: float) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A small model whose every weight is `value`, with optimiser state."""
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model, optimizer


def put(run: Path, step: int) -> None:
    checkpoint.save(run, *trained(float(step)), STATE | {"step": step}, keep=1)


def loadable(run: Path) -> int:
    """The step that a resume would start from; its weights are those of that step."""
    newest = checkpoint.newest(run)
    model, optimizer = trained(-1.0)
    checkpoint.load_model(newest, model)
    checkpoint.load_optimizer(newest, model, optimizer)
    step = checkpoint.read_state(newest)["step"]
    assert all((p == step).all() for p in model.parameters())
    return step


def scene(run: Path, name: str) -> None:
    """What a save may find: one older checkpoint, one of its own step, half-removed and half-written ones."""
    shutil.rmtree(run, ignore_errors=True)
    put(run, 1)
    if name == "own step":
        put(run, 2)
    if name == "two older":
        shutil.copytree(run / "checkpoints/step-00000001", run / "checkpoints/step-00000000")
    if name == "half a removal and half a save":
        older, temporary = run / "checkpoints/step-00000000", run / "checkpoints/.step-00000002.abc"
        shutil.copytree(run / "checkpoints/step-00000001", older)
        (older / checkpoint.MARKER).unlink()
        shutil.copytree(older, temporary)
        shutil.copytree(older, run / "checkpoints/step-00000002")


SCENES = ("one older", "two older", "own step", "half a removal and half a save")


def interrupted(tmp_path: Path, faults: Faults, every: int) -> tuple[int, int]:
    run, tried, survived = tmp_path / "run", 0, 0
    for name in SCENES:
        for after in range(0, 200, every):
            scene(run, name)
            before = loadable(run)
            faults.arm(tmp_path, after)
            try:
                put(run, 2)
                break  # fewer changes than that: the save went through
            except Killed:
                pass
            finally:
                faults.disarm()
            tried += 1
            survived += loadable(run) in (before, 2)
            put(run, 3)  # the next save goes through, and cleans up
            assert loadable(run) == 3
            assert [f.name for f in (run / "checkpoints").iterdir()] == ["step-00000003"]
        else:
            raise AssertionError("the save never ended")
    return tried, survived


def test_a_few_saves_interrupted_with_one_checkpoint_kept(tmp_path: Path, faults: Faults) -> None:
    tried, survived = interrupted(tmp_path, faults, every=9)
    assert tried >= 12
    line("a save with keep=1 interrupted at a write, rename or unlink", tried, survived)


SAVING = """
import sys
from pathlib import Path
from tests.faults.test_checkpoints import put
for step in range(int(sys.argv[2]), 10**6):
    put(Path(sys.argv[1]), step)
"""


def killed_saves(tmp_path: Path, kills: int) -> int:
    run, survived, draw, step = tmp_path / "killed", 0, random.Random(0), 0
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", SAVING, str(run), str(step + 1)], env=environment, cwd=tmp_path)
        deadline = time.monotonic() + 300
        newer = f"step-{step:08d}~"
        while not any(c.name > newer for c in checkpoint.checkpoints(run)) and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        found = loadable(run)
        survived += found > step
        step = found
    return survived


@pytest.mark.slow
def test_a_hundred_interrupted_saves(tmp_path: Path, faults: Faults) -> None:
    tried, survived = interrupted(tmp_path, faults, every=1)
    kills = killed_saves(tmp_path, 10)
    assert tried >= 90
    line("a save with keep=1 interrupted at a write, rename or unlink", tried, survived)
    line("SIGKILL of a process that saves with keep=1", 10, kills)


def flipped(tmp_path: Path, flips: int) -> int:
    """Single bits anywhere in a checkpoint: it is refused, and the older one is used."""
    run, draw, detected = tmp_path / "run", random.Random(1), 0
    put(run, 1)
    shutil.copytree(run / "checkpoints/step-00000001", tmp_path / "older")
    put(run, 2)
    shutil.copytree(tmp_path / "older", run / "checkpoints/step-00000001")
    files = sorted((run / "checkpoints/step-00000002").iterdir())
    for i in range(flips):
        file = files[i % len(files)]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        detected += checkpoint.damage(file.parent) is not None and loadable(run) == 1
        file.write_bytes(content)
    assert loadable(run) == 2
    return detected


def test_ten_bit_flips_are_detected(tmp_path: Path) -> None:
    line("a bit flip in a checkpoint", 10, flipped(tmp_path, 10))


@pytest.mark.slow
def test_two_hundred_bit_flips_are_detected(tmp_path: Path) -> None:
    line("a bit flip in a checkpoint", 200, flipped(tmp_path, 200))


def test_a_damaged_newest_checkpoint_is_said_and_none_left_is_an_error(tmp_path: Path, capsys) -> None:
    put(tmp_path / "run", 1)
    file = checkpoint.newest(tmp_path / "run") / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints.*optimizer\.safetensors is damaged"):
        checkpoint.newest(tmp_path / "run")
    assert "optimizer.safetensors is damaged" in capsys.readouterr().out


def test_a_save_after_a_resume_behind_a_damaged_checkpoint_stays(tmp_path: Path) -> None:
    for step in (2, 4):
        saved = checkpoint.save(tmp_path, *trained(float(step)), STATE | {"step": step}, keep=2)
    (saved / "model.safetensors").write_bytes(b"damaged")
    assert checkpoint.newest(tmp_path).name == "step-00000002"
    three = checkpoint.save(tmp_path, *trained(3.0), STATE | {"step": 3}, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [three] and checkpoint.newest(tmp_path) == three


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    put(tmp_path, 1)
    with pytest.raises(CheckpointError, match="weight holds values that are NaN"):
        checkpoint.save(tmp_path, *trained(float("nan")), STATE | {"step": 2}, keep=1)
    assert loadable(tmp_path) == 1


def test_missing_optimiser_state_is_detected(tmp_path: Path) -> None:
    model, optimizer = trained(1.0)
    whole = checkpoint.write(tmp_path, {"model": checkpoint.trainable_state(model)}, STATE | {"step": 1})
    with pytest.raises(CheckpointError, match="no optimiser state"):
        checkpoint.load_optimizer(whole, model, optimizer)
    del optimizer.state[model.bias]
    saved = checkpoint.save(tmp_path, model, optimizer, STATE | {"step": 2}, keep=1)
    assert checkpoint.read_state(saved)["without_moments"] == ["bias"]  # a parameter that never had a gradient
    checkpoint.load_optimizer(saved, model, optimizer)
    tensors = {"model": checkpoint.trainable_state(model), "optimizer": {"weight/step": torch.tensor(1.0)}}
    cut = checkpoint.write(tmp_path, tensors, STATE | {"step": 3})
    with pytest.raises(CheckpointError, match="lacks optimiser state of weight"):
        checkpoint.load_optimizer(cut, model, optimizer)
