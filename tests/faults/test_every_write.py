"""Extractions that die or run out of space in the middle of a write: no bad commit, nothing redone, the same bytes.

Killed processes are forks of one that has imported everything, so that hundreds take minutes. Each kills itself with
SIGKILL just before or just after a random fsync, rename, link or removal; every publication goes through these.
"""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import audit, cluster, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract, plan_index
from pipeline.index import Index
from tests.faults.report import ROOT, line
from tests.pipeline.test_extract import shards
from xformer.errors import StoreError
from xformer.settings import load_settings

FORKS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from pipeline import commits, encode
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer.console import set_quiet
from xformer.settings import load_settings

set_quiet(True)
torch.set_num_threads(1)
corpus, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
settings = load_settings(overrides=["store.shard_rows=8", "mae.draws=2"])

for kind in ("clip", "mae"):
    encode.encoder(kind, settings.model_dump_json())  # every fork has them already

def die_at(count, after):
    left = [count]
    def wrap(name):
        original = getattr(os, name)
        def call(*given, **more):
            left[0] -= 1
            if not left[0] and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            done = original(*given, **more)
            if not left[0] and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return done
        setattr(os, name, call)
    for name in ("fsync", "replace", "link", "unlink"):
        wrap(name)

begun = folder / "begun"
original = encode.encode

def counted(*given):
    with begun.open("a") as file:
        file.write("x")  # a shard goes into the encoders
    return original(*given)

encode.encode = counted

def committed(path):
    return len(commits.committed(path, "pixels/view-0"))  # the last array of a shard

draw, done, build, most = random.Random(0), 0, 0, 0
while done < kills:
    path, build = folder / f"{build}.zarr", build + 1
    while True:
        begun.write_text("")
        before = committed(path)
        child = os.fork()
        if child == 0:
            if done < kills:
                die_at(draw.randrange(1, 60), bool(done % 2))
            extract(open_corpus(corpus), path, ["clip", "mae"], settings, limit=64, in_process=True)
            os._exit(0)
        draw.random()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            done += 1
            most = max(most, len(begun.read_text()) - committed(path) + before)
        elif status == 0:
            break
        else:
            sys.exit(f"build {build}: a child ended with {status}")
print("killed", done, "redone", most, flush=True)
"""


def kill_at_writes(corpus: Path, tmp_path: Path, kills: int) -> None:
    settings = load_settings(overrides=["store.shard_rows=8", "mae.draws=2"])
    (tmp_path / "forks.py").write_text(FORKS)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "forks.py", str(corpus), str(tmp_path), str(kills)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    builds, want = sorted(tmp_path.glob("*.zarr")), tmp_path / "want.zarr"
    extract(open_corpus(corpus), want, ["clip", "mae"], settings, limit=64, in_process=True)
    wanted = shards(want)
    bad = [build for build in builds if audit.verify(build) or shards(build) != wanted]
    killed, redone = (int(done.stdout.split()[place]) for place in (1, 3))
    assert killed == kills and not bad and redone <= cluster.IN_FLIGHT
    print(f"\n  a kill lost the encoding of at most {redone} shards; {cluster.IN_FLIGHT} are in flight at once")
    line(f"SIGKILL at a write, rename or commit, {len(builds)} builds", kills, kills)


def test_kills_at_writes(corpus: Path, tmp_path: Path) -> None:
    kill_at_writes(corpus, tmp_path, 6)


@pytest.mark.slow
def test_two_hundred_kills_at_writes(corpus: Path, tmp_path: Path) -> None:
    kill_at_writes(corpus, tmp_path, 200)


AGAIN = (
    FORKS[: FORKS.index("begun =")]
    + """
import shutil
import numpy as np
from pipeline import audit, redo, store
from tests.pipeline.test_extract import shards

given, want, opened = Path(sys.argv[4]), shards(Path(sys.argv[5])), store.FeatureStore(Path(sys.argv[5]))
dead = {name: store.FeatureStore(given).array(name).dead_rows for name in opened.names()}

def exact(name):
    array = store.FeatureStore(path).array(name)
    rows = np.setdiff1d(np.arange(64), array.dead_rows)
    right = array.read(rows).tobytes() == opened.array(name).read(rows).tobytes()
    return right and set(array.dead_rows) <= set(dead[name])

place, killed, step = 1, 0, int(sys.argv[3])
while True:
    path = Path(shutil.copytree(given, folder / f"{place}.zarr"))
    child = os.fork()
    if child == 0:
        die_at(place, bool(place % 2))
        redo.retry(path, in_process=True)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0, status
        break
    killed += 1
    assert all(map(exact, opened.names())), place
    for _ in range(2):  # a kill between the bytes and the record is damage, the rest dead letters as before
        redo.repair(path, in_process=True)
        redo.retry(path, in_process=True)
    assert audit.verify(path) == [] and shards(path) == want and not store.describe(path)["dead"], place
    shutil.rmtree(path)
    place += step
print("killed", killed, flush=True)
"""
)


@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_kills_at_writes_of_a_retry_lose_nothing(corpus: Path, tmp_path: Path, step: int) -> None:
    """Two pictures of two shards were unreadable for a while; the retry is killed at one write after the other."""
    settings, source = load_settings(overrides=["store.shard_rows=8", "mae.draws=2"]), open_corpus(corpus)
    path, want, away = tmp_path / "given.zarr", tmp_path / "want.zarr", tmp_path / "away"
    extract(source, want, ["clip", "mae"], settings, limit=64, in_process=True)
    plan_index(path, source, settings, 64)
    gone = [corpus / Index(path / "index").shard(shard)[3]["location"] for shard in (1, 4)]
    away.mkdir()
    for file in gone:
        os.rename(file, away / file.name)
    try:
        extract(source, path, ["clip", "mae"], settings, limit=64, in_process=True)
    finally:
        for file in gone:
            os.rename(away / file.name, file)
    (tmp_path / "again.py").write_text(AGAIN)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "again.py", str(corpus), str(tmp_path), str(step), str(path), str(want)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = int(done.stdout.split()[-1])
    assert killed >= 20 / step
    line("SIGKILL at a write of a retry", killed, killed)


def test_no_space_at_any_write_stops_and_goes_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC at a random write of one extraction after the other: each stops with it, commits stay exact."""
    settings = load_settings(overrides=["store.shard_rows=8", "mae.draws=1"])
    source, path, draw, stopped = open_corpus(corpus), tmp_path / "s.zarr", random.Random(1), 0
    original = os.replace
    for left in (*(draw.randrange(1, 20) for _ in range(6)), 0):
        count = [left]

        def replace(*given, count: list[int] = count, **more) -> None:
            count[0] -= 1
            if count[0] == 0:
                raise OSError(28, os.strerror(28), str(given[1]))
            original(*given, **more)

        monkeypatch.setattr(os, "replace", replace)
        try:
            extract(source, path, ["clip", "mae"], settings, limit=40, in_process=True)
        except OSError as error:
            assert error.errno == 28
            stopped += 1
        if path.is_dir() and (path / "index/index.json").is_file():
            assert audit.verify(path) == []
    monkeypatch.undo()
    extract(source, tmp_path / "want.zarr", ["clip", "mae"], settings, limit=40, in_process=True)
    assert shards(path) == shards(tmp_path / "want.zarr") and stopped >= 3
    line("no space left at a random write", stopped, stopped)


FULL = """
import sys
from cli import main
if __name__ == "__main__":
    main(["extract", "--encoder", "clip", "--corpus", sys.argv[1], "--store", sys.argv[2], "--shard-rows", "500", "--quiet",
          "--layers", "5,4,3,2,1"])
"""


@pytest.mark.slow
def test_a_full_disk_of_24_mb(tmp_path: Path) -> None:
    """A real file system of 24 MB fills up; what is committed verifies, and with more space the same command finishes."""
    from pipeline.shapes import write_shapes

    corpus, disk = tmp_path / "shapes", tmp_path / "disk"
    write_shapes(corpus, 1990, 10, seed=0)
    disk.mkdir()
    (tmp_path / "full.py").write_text(FULL)
    python, command = sys.executable, f"full.py {corpus} {disk}/s.zarr"
    steps = [
        f"mount -t tmpfs -o size=24m tmpfs {disk}",
        f"{python} {command}; echo first $?",
        f'{python} -c "from pathlib import Path; from pipeline.audit import verify; '
        f"print('damaged', len(verify(Path('{disk}/s.zarr'))))\"",
        f"mount -o remount,size=80m {disk}",
        f"{python} {command}; echo second $?",
        f"cp -r {disk}/s.zarr {tmp_path}/full.zarr",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if subprocess.run(["unshare", "-rm", "sh", "-c", steps[0]], capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs in a namespace")
    words = ["unshare", "-rm", "sh", "-c", " && ".join(steps)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    said = dict(
        text.split(maxsplit=1) for text in done.stdout.splitlines() if text.startswith(("first", "damaged", "second"))
    )
    assert said["first"] == "3" and said["second"] == "0", done.stdout + done.stderr
    assert said["damaged"] == "0", said
    assert "No space left" in done.stderr and "Traceback" not in done.stderr, done.stderr
    settings = load_settings(overrides=["store.shard_rows=500", "clip.layers=[5,4,3,2,1]"])
    extract(open_corpus(corpus), tmp_path / "want.zarr", ["clip"], settings, in_process=True)
    assert shards(tmp_path / "full.zarr") == shards(tmp_path / "want.zarr")
    line("a disk of 24 MB is full", 1, 1)


RACE = """
import os, sys, time
from pathlib import Path
from pipeline.store import owner
from xformer.errors import StoreError
path = Path(sys.argv[1])
for race in range(int(sys.argv[2])):
    start, lost = time.time() + 0.02, path.with_name(f"lost-{race}")
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            while time.time() < start:
                pass
            began = time.time()
            try:
                with owner(path):
                    while not lost.exists() and time.time() < began + 30:
                        time.sleep(0.001)
                os._exit(0)
            except StoreError:
                lost.touch()
                os._exit(2 if time.time() - began < 10 else 3)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    print(*codes, flush=True)
"""


@pytest.mark.parametrize("races", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_of_two_extractions_one_owns_the_store(tmp_path: Path, races: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", RACE, str(tmp_path / "s.zarr"), str(races)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    line("two extractions into one store", races, done.stdout.split("\n").count("0 2"))


def test_an_owned_store_is_left_alone(corpus: Path, features: Path) -> None:
    with store.owner(features), pytest.raises(StoreError, match="another extraction"):
        extract(open_corpus(corpus), features, ["clip"], load_settings(), in_process=True)


READ_ONLY = """
import sys
from pathlib import Path
from cli import main
store, out, corpus = sys.argv[1:4]
try:
    main(["extract", "--encoder", "mae", "--draws", "3", "--corpus", corpus, "--store", store, "--quiet"])
    print("extracted")
except SystemExit as stop:
    print("refused", stop.code)
main(["train", "--stage", "1", "--features", store, "--out", out, "--quiet", *sys.argv[4:]])
print("trained", Path(out, "summary.json").is_file())
"""


def test_a_read_only_store_is_trained_from_and_not_written(
    features: Path, corpus: Path, small: list[str], tmp_path: Path
) -> None:
    train = [word for override in small for word in ("--set", override)]
    words = [sys.executable, "read_only.py", str(features), str(tmp_path / "run"), str(corpus), *train]
    (tmp_path / "read_only.py").write_text(READ_ONLY)
    here = features.parent
    mount = f"mount --bind {here} {here} && mount -o remount,bind,ro {here} && "
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("this system mounts nothing in a namespace")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    before = shards(features)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + 'exec "$@"', "sh", *words], cwd=tmp_path, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "refused 2" in done.stdout and "trained True" in done.stdout, done.stdout + done.stderr
    assert "Read-only" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert shards(features) == before
    line("a read-only store", 1, 1)
