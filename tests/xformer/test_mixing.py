"""Two stores in one run: what its steps really read follows the weights, and a resumed run reads the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cli import main
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from pipeline.shapes import write_shapes
from xformer import checkpoint, loop
from xformer.monitor import read_log
from xformer.reading import stream
from xformer.settings import load_settings
from xformer.train import train_stage1

BATCH = 24
QUICK = [f"train.batch={BATCH}", "train.epochs=1", "train.max_steps=0", "train.warmup=2", "train.log_every=1",
         "train.save_every=4", "train.keep=9", "train.validate_every=1000", "stage1.validate_batches=1",
         "train.trackers=[]"]  # fmt: skip
Seen = list[tuple[int, np.ndarray, np.ndarray]]  # of each step: its number, its pairs, and the store of each


@pytest.fixture(scope="module")
def stores(corpus: Path, features: Path, settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A store of 96 training pictures and one of 32 others."""
    folder = tmp_path_factory.mktemp("second")
    write_shapes(folder / "shapes", 32, 8, seed=1)
    extract(open_corpus(folder / "shapes"), folder / "s.zarr", ["clip"], settings, in_process=True)
    return [features, folder / "s.zarr"]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the steps of every run are fed, in order."""
    found: Seen = []

    def watched(pairs, *arguments):
        for read in stream(pairs, *arguments):
            found.append((read.step, read.numbers.copy(), pairs.places(read.numbers)[0]))
            yield read

    monkeypatch.setattr(loop, "stream", watched)
    return found


def run(stores: list[Path], out: Path, more: list[str], resume: bool = False) -> list[int]:
    """Trains one epoch; returns the pairs of each store."""
    train_stage1(stores, out, load_settings(overrides=[*QUICK, *more]), "qformer", resume)
    return checkpoint.read_state(checkpoint.newest(out))["pairs"]


@pytest.mark.parametrize("weights", [(), (1.0, 1.0), (1.0, 3.0), (0.0, 1.0)])
def test_the_steps_of_an_epoch_hold_each_stores_share(
    stores: list[Path], seen: Seen, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    sizes = run(stores, tmp_path / "run", [f"data.weights={list(weights)}"])
    assert len(seen) == sum(sizes) // BATCH and sizes[0] > 2 * sizes[1]
    wanted = np.array(weights or sizes) / sum(weights or sizes) * sum(sizes)  # by default in proportion to the pairs
    read = np.bincount(np.concatenate([of for _, _, of in seen]), minlength=2)
    left_out = sum(sizes) % BATCH  # the epoch's last pairs make no whole batch
    assert all(abs(read - wanted) <= left_out + 1)
    if not weights:
        numbers = np.concatenate([numbers for _, numbers, _ in seen])
        assert len(np.unique(numbers)) == len(numbers) == sum(sizes) - left_out
    elif all(weights):  # mixed within the epoch, not one store after the other: five deviations of a fair draw
        share, halves = weights[1] / sum(weights), np.array_split(np.array([of for _, _, of in seen]), 2)
        for half in halves:
            assert abs(half.mean() - share) < 5 * np.sqrt(share * (1 - share) / half.size)


def test_a_resumed_mixture_reads_the_same_pairs(stores: list[Path], seen: Seen, tmp_path: Path) -> None:
    more = ["data.weights=[1,3]"]
    run(stores, tmp_path / "run", more)
    whole = [*seen]
    logged = [line["pairs"] for line in read_log(tmp_path / "run") if line["event"] == "train"]
    assert len(set(logged)) == len(whole)
    seen.clear()
    while checkpoint.read_state(checkpoint.newest(tmp_path / "run"))["step"] > 4:
        shutil.rmtree(checkpoint.newest(tmp_path / "run"))
    run(stores, tmp_path / "run", more, resume=True)
    assert [step for step, _, _ in seen] == [step for step, _, _ in whole][4:]
    for (_, ours, _), (_, theirs, _) in zip(seen, whole[4:], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [line["pairs"] for line in read_log(tmp_path / "run") if line["event"] == "train"] == logged


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("[1]", "data.weights: 1 given for 2 --features"),
        ("[1,2,3]", "data.weights: 3 given for 2 --features"),
        ("[-1,2]", "data.weights.0"),
        ("[0,0]", "data.weights must be finite, not negative, not all 0"),
        ("[1,.inf]", "data.weights.1"),
    ],
)
def test_weights_that_do_not_fit_are_one_sentence_and_leave_nothing(
    stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture, weights: str, says: str
) -> None:
    line = [
        "train",
        "--stage",
        "1",
        "--model",
        "qformer",
        "--out",
        str(tmp_path / "run"),
        "--set",
        f"data.weights={weights}",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*line, *(word for store in stores for word in ("--features", str(store)))])
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and says in told and not (tmp_path / "run").exists()
