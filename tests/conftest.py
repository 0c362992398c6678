"""One small world for all tests: a shapes corpus and its store, made once through the real commands."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # before torch: runs are compared bit for bit, whatever a test before has set
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def spoken() -> None:
    """What a test before this one silenced speaks again: --quiet is the state of a process."""
    from xformer.console import set_quiet

    set_quiet(False)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shapes corpus of 96 training and 32 validation pictures."""
    from pipeline.shapes import write_shapes

    out = tmp_path_factory.mktemp("corpus") / "shapes"
    write_shapes(out, 96, 32, seed=0)
    return out


@pytest.fixture(scope="session")
def settings():
    from xformer.settings import load_settings

    return load_settings(overrides=["store.shard_rows=32", "mae.draws=2"])


@pytest.fixture(scope="session")
def features(corpus: Path, settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus's store with CLIP features and two mask draws."""
    from pipeline.corpora import open_corpus
    from pipeline.extract import extract

    store = tmp_path_factory.mktemp("store") / "store.zarr"
    extract(open_corpus(corpus), store, ["clip", "mae"], settings, in_process=True)
    return store


SMALL = ["train.max_steps=4", "train.warmup=2", "train.batch=16", "train.validate_every=4", "train.save_every=2",
         "train.log_every=1", "stage1.validate_batches=1"]  # fmt: skip


@pytest.fixture(scope="session")
def small() -> list[str]:
    """Overrides that make a training run take seconds."""
    return list(SMALL)


@pytest.fixture(scope="session")
def stage1(features: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from xformer.settings import load_settings
    from xformer.train import train_stage1

    run = tmp_path_factory.mktemp("runs") / "stage1"
    train_stage1([features], run, load_settings(overrides=small), "xformer", resume=False)
    return run


@pytest.fixture(scope="session")
def stage2(features: Path, stage1: Path, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    from xformer.settings import load_settings
    from xformer.train import train_stage2

    run = tmp_path_factory.mktemp("runs") / "stage2"
    train_stage2([features], stage1, run, load_settings(overrides=small), None, resume=False)
    return run
