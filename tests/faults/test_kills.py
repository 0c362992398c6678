"""Killed extractions, dead workers, lost schedulers: the rerun ends with the bytes of an uninterrupted build."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from pipeline import audit, commits, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from tests.conftest import SHARED
from tests.faults.report import ROOT, line
from tests.pipeline.test_extract import shards
from xformer.errors import StoreError
from xformer.settings import load_settings

MINI = SHARED / "coco_mini"


def command(*words: str, cwd: Path, code: str = "") -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = code or "import cli\nif __name__ == '__main__': cli.main()"
    (cwd / "run_it.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, "run_it.py", *words], cwd=cwd, env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def end(child: subprocess.Popen) -> None:
    """SIGKILL for the command and for everything that it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.communicate()


def commit_count(path: Path) -> int:
    total = 0
    for name in store.array_names(path) if path.exists() else ():
        try:
            total += len(commits.committed(path, name))
        except StoreError:
            raise AssertionError("a commit record is half written") from None
    return total


IN_PROCESS = """
import sys
from pathlib import Path
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer.settings import load_settings
if __name__ == "__main__":
    settings = load_settings(overrides=["store.shard_rows=8", "mae.draws=2"])
    source = open_corpus(Path(sys.argv[1]), Path(sys.argv[2]) if sys.argv[2] else None)
    extract(source, Path(sys.argv[3]), ["clip", "mae"], settings, in_process=True)
"""


def kill_and_compare(source: str, images: str, kills: int, partial: int, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.zarr", tmp_path / "killed.zarr"
    settings = load_settings(overrides=["store.shard_rows=8", "mae.draws=2"])
    corpus = open_corpus(Path(source), Path(images) if images else None)
    extract(corpus, whole, ["clip", "mae"], settings, in_process=True)
    every = sum(len(commits.committed(whole, n)) for n in store.array_names(whole))
    draw, done, in_between, rounds = random.Random(0), 0, 0, 0
    while done < kills:
        rounds += 1
        assert rounds < 20 * kills
        child = command(source, images, str(path), cwd=tmp_path, code=IN_PROCESS)
        have = commit_count(path)
        if done % 3:  # a moment after some more commits; else a moment after the start
            wanted = have + draw.randrange(1, 9)
            while child.poll() is None and commit_count(path) < wanted:
                time.sleep(0.001)
        else:
            time.sleep(draw.uniform(0.2, 8))
        if child.poll() is None:
            end(child)
            done += 1
            in_between += 0 < commit_count(path) < every
        else:
            child.communicate()
        if commit_count(path) == every:  # finished: start over, so that every kill hits a build at work
            if done < kills:
                assert shards(path) == shards(whole)
                shutil.rmtree(path)
        elif path.exists():
            try:
                assert audit.verify(path) == []
            except StoreError as error:
                assert "finished index" in str(error) or "no feature store" in str(error)
    extract(corpus, path, ["clip", "mae"], settings, in_process=True)
    assert audit.verify(path) == [] and shards(path) == shards(whole)
    print(f"\n  {in_between} of {kills} kills left some but not all of {every} shards committed")
    assert in_between >= partial
    line("SIGKILL of an extraction at a random moment", kills, done)


def test_three_kills(corpus: Path, tmp_path: Path) -> None:
    kill_and_compare(str(corpus), "", 3, 1, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not MINI.is_dir(), reason="../shared/data/coco_mini is not here")
def test_twenty_kills_on_real_photos(tmp_path: Path) -> None:
    kill_and_compare(str(MINI / "captions.json"), str(MINI / "images"), 20, 6, tmp_path)


@pytest.mark.slow
def test_dask_workers_die(corpus: Path, settings, tmp_path: Path) -> None:
    """Five workers are killed while 16 shards are made."""
    extract(
        open_corpus(corpus),
        tmp_path / "want.zarr",
        ["clip"],
        load_settings(overrides=["store.shard_rows=8"]),
        in_process=True,
    )
    path, killed = tmp_path / "s.zarr", 0
    words = [
        "extract",
        "--encoder",
        "clip",
        "--corpus",
        str(corpus),
        "--store",
        str(path),
        "--shard-rows",
        "8",
        "--workers",
        "2",
    ]
    child = command(*words, cwd=tmp_path)
    while child.poll() is None and killed < 5:
        time.sleep(0.05)
        if commit_count(path) <= 2 * killed:
            continue
        workers = [
            p for p in psutil.Process(child.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())
        ]
        if workers and commit_count(path) < 16:
            os.kill(workers[0].pid, signal.SIGKILL)
            killed += 1
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    assert audit.verify(path) == [] and shards(path) == shards(tmp_path / "want.zarr") and killed >= 3
    line("SIGKILL of a Dask worker", killed, killed)


COUNTING = """
import os
from pipeline.encoders import ClipEncoder
original = ClipEncoder.__init__
def counted(*given):
    with open("loads", "a") as file: file.write(f"{os.getpid()}\\n")
    original(*given)
ClipEncoder.__init__ = counted
import cli
if __name__ == "__main__": cli.main()
"""


def test_a_worker_loads_its_encoder_once_for_all_shards(corpus: Path, tmp_path: Path) -> None:
    words = ["extract", "--encoder", "clip", "--corpus", str(corpus), "--store", "s.zarr", "--shard-rows", "8"]
    child = command(*words, cwd=tmp_path, code=COUNTING)
    _, errors = child.communicate(timeout=300)
    assert child.returncode == 0, errors
    loads = (tmp_path / "loads").read_text().split()
    assert len(loads) == len(set(loads)) == 2 and store.describe(tmp_path / "s.zarr")["images"] == 128


CRASHING = """
import os, sys, pipeline.images as images
original = images.decode
def decode(content, most):
    if content.endswith(b"crash"): os.kill(os.getpid(), 11)
    return original(content, most)
images.decode = decode
import cli
if __name__ == "__main__": cli.main()
"""


@pytest.mark.slow
def test_an_image_that_crashes_its_process_becomes_a_dead_letter(tmp_path: Path) -> None:
    folder, path = tmp_path / "pictures", tmp_path / "s.zarr"
    folder.mkdir()
    for i in range(1000):
        Image.fromarray(np.full((8, 8, 3), i % 256, np.uint8)).save(folder / f"{i:03d}.png")
    with (folder / "033.png").open("ab") as file:
        file.write(b"crash")
    words = ["extract", "--encoder", "clip", "--corpus", str(folder), "--store", str(path), "--shard-rows", "128"]
    child = command(*words, cwd=tmp_path, code=CRASHING)
    _, errors = child.communicate(timeout=500)
    assert child.returncode == 0, errors[-3000:]
    dead = store.describe(path)["dead"]
    assert [d["id"] for d in dead] == ["033.png"] and "crashes" in dead[0]["reason"]
    assert store.FeatureStore(path).complete("clip/5/tokens").missing_shards == []
    line("an image that crashes the process, 1 in 1,000: rows", 999, 1000 - len(dead))


@pytest.mark.slow
def test_a_lost_scheduler_is_one_sentence_and_the_rerun_goes_on(corpus: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": environment, "cwd": tmp_path}
    scheduler = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--no-dashboard",
        ],
        **quiet,
    )
    assert scheduler.stderr is not None
    address = ""
    for text in scheduler.stderr:
        if found := re.search(r"Scheduler at:\s+(tcp://\S+)", text):
            address = found[1]
            break
    worker = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-dashboard", "--nthreads", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path, start_new_session=True,
    )  # fmt: skip
    path = tmp_path / "s.zarr"
    words = ["extract", "--encoder", "clip", "--corpus", str(corpus), "--store", str(path), "--shard-rows", "4"]
    try:
        child = command(*words, "--scheduler", address, cwd=tmp_path)
        while child.poll() is None and commit_count(path) < 3:
            time.sleep(0.002)
        scheduler.kill()
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 2 and "scheduler" in errors.splitlines()[-1] and "Traceback" not in errors, errors
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        scheduler.kill()
        worker.wait()
        scheduler.communicate()
    done = commits.committed(path, "clip/5/tokens")
    before = {s: store.shard_file(path, "clip/5/tokens", s, 3).stat().st_mtime_ns for s in done}
    again = command(*words, cwd=tmp_path)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    after = {s: store.shard_file(path, "clip/5/tokens", s, 3).stat().st_mtime_ns for s in before}
    assert len(before) >= 3 and audit.verify(path) == [] and after == before
    line("the scheduler is lost; committed shards left alone", len(before), sum(after[s] == before[s] for s in before))
