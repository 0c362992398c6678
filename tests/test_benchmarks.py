"""The benchmarks measure what they say: all readers deliver the same rows, and every part still runs, at a small size."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import fed, reader
from xformer.model import build_stage1
from xformer.settings import load_settings
from xformer.text import TextTokenizer


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_all_readers_deliver_the_same_rows(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SHAPE": (3, 1408), "ROWS": 16, "SHARD_ROWS": 8, "BATCH": 4}.items():
        monkeypatch.setattr(reader, name, value)
    with ThreadPoolExecutor(2) as pool:
        ways = reader.readers(tmp_path, dtype, pool)
        plain, chosen = np.load(tmp_path / "m.npy"), np.array([9, 2, 15, 0])
        for name, read in ways.items():
            want = plain[:4] if name.startswith("webdataset") else plain[chosen]  # a tar comes in its own order
            found = read(chosen)
            assert (found == want).all(), name
            found[...] = 0  # the next one finds nothing that is right already


def test_a_fed_step_is_compared_with_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fed, "COUNTED", 1)
    settings = load_settings(overrides=["data.ahead=1"])
    words = TextTokenizer("embedded:text", settings.qformer.max_text, settings.qformer.max_words)
    model = build_stage1(settings, "xformer", words.vocabulary, words.begin)
    found = fed.compare(settings, model, 4, 1, torch.device("cpu"))
    assert found["lowest"] == found["ratio"] == found["highest"] > 0
    assert found["ratio"] == pytest.approx(found["seconds"]["fed"] / found["seconds"]["in memory"])


def test_an_unknown_benchmark_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "raeder"])
    with pytest.raises(SystemExit, match="no benchmark 'raeder'"):
        benchmarks.main()
