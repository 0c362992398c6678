"""The plan: bytes are those of a real store, operations those of the real models, and sentences for what it cannot do."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cli import main
from pipeline import plan, reader, store
from pipeline.corpora import open_corpus
from pipeline.extract import extract
from xformer import operations
from xformer.data import Cache, Pairs
from xformer.model import build_stage1
from xformer.settings import load_settings
from xformer.text import TextTokenizer


@pytest.mark.parametrize("more", [["store.views=2"], ["store.dtype=int8", "clip.layers=[5,3]"], ["mae.mask_ratio=0"]])
def test_bytes_are_exactly_those_of_a_real_store(corpus: Path, tmp_path: Path, more: list[str]) -> None:
    settings = load_settings(overrides=["store.shard_rows=16", "mae.draws=2", *more])
    extract(open_corpus(corpus), tmp_path / "s.zarr", ["clip", "mae"], settings, limit=40, in_process=True)
    made = store.describe(tmp_path / "s.zarr")["arrays"]
    planned = plan.array_costs(settings, 40, operations.encoder_operations(settings)["clip_tokens"])
    assert {n: a["bytes"] for n, a in planned.items()} == {n: a["bytes"] for n, a in made.items()}
    assert all(planned[n]["shape"] == a["shape"] and planned[n]["dtype"] == a["dtype"] for n, a in made.items())


@pytest.mark.parametrize("more", [["store.views=3"], ["store.views=4", "store.dtype=int8"]])
def test_a_pair_reads_as_much_from_a_real_store_with_several_views(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    settings = load_settings(overrides=["store.shard_rows=4", "mae.draws=12", *more])
    extract(open_corpus(corpus), tmp_path / "s.zarr", ["clip", "mae"], settings, limit=4, in_process=True, force=True)
    arrays = plan.array_costs(settings, 4, operations.encoder_operations(settings)["clip_tokens"])
    counted, real = [], reader.Shard.read
    monkeypatch.setattr(reader.Shard, "read", lambda s, out, at: counted.append(len(out)) or real(s, out, at))
    for stage in ("stage 1", "stage 2"):
        opened = Cache(tmp_path / "s.zarr", settings, "xformer", pixels=stage == "stage 1")
        for draw in (0, 5):
            counted.clear()
            opened.read(np.array([2]), draw)
            assert sum(counted) == plan.read_per_pair(arrays, settings, stage)


def test_operations_are_those_of_the_real_encoders_and_of_a_real_step(features: Path, settings) -> None:
    from pipeline.encode import encoder

    found = operations.encoder_operations(settings)
    for kind in ("clip", "mae"):
        model = encoder(kind, settings.model_dump_json())
        given = torch.zeros(1, 3, 64, 64)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            if kind == "clip":
                model.model.forward_intermediates(given, indices=[4], stop_early=True, intermediates_only=True)
            else:
                model.model.config.mask_ratio = 0.75
                model.model.vit(given)
        assert found[kind] == counter.get_total_flops(), kind
    text = settings.qformer
    tokenizer = TextTokenizer(text.text, text.max_text, text.max_words)
    pairs = Pairs([Cache(features, settings, "xformer", pixels=True)], "train", tokenizer, settings)
    batch, captions = pairs.batch(torch.arange(0, 96, 3).numpy(), 0)
    stage1 = build_stage1(settings, "xformer", tokenizer.vocabulary, tokenizer.begin)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses, _ = stage1(batch, False, torch.Generator().manual_seed(0))
        torch.stack(list(losses.values())).sum().backward()
    with torch.device("meta"):
        _, run = operations.stage1_pass(settings, "xformer", found["clip_tokens"], tokenizer.vocabulary)
        planned = operations.count(lambda: run(len(captions), batch.ids.shape[1]), True)
    assert planned == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_papers_encoders_have_the_papers_operations() -> None:
    found = operations.encoder_operations(load_settings("paper"))
    assert found["clip"] / 1e9 == pytest.approx(520.7, abs=0.1) and found["clip_tokens"][39] == 257
    assert found["mae"] / 1e9 == pytest.approx(82.9, abs=0.1)


def test_when_the_cache_pays() -> None:
    """Encoding costs 10 + 20 s for 10 images; online a pair costs 1 + 1 s more, so 2 epochs of 10 pairs are 40 s."""
    names = ("seconds", "compute")

    def phase(samples: int, seconds: float, compute: float) -> dict:
        return {"samples": samples} | dict(zip(names, (seconds, compute), strict=True))

    phases = [phase(10, 0, 0), phase(10, 10, 10), phase(10, 20, 20), phase(90, 90, 90), phase(10, 10, 10)]
    found = plan._when_it_pays(phases, 10, 1, 2, *names)
    assert found["from_epoch"] == 2 and found["from_run"] == 1
    assert found["runs_in_seconds"][1] == {"runs": 2, "cached": 230, "online": 600}
    late = [phase(10, 100, 0), *phases[1:]]  # reading every image once costs, too
    assert plan._when_it_pays(late, 10, 1, 2, *names)["runs_in_seconds"][1]["cached"] == 330
    slow = [*phases[:3], phase(90, 900, 90), phase(10, 100, 10)]
    assert plan._when_it_pays(slow, 10, 1, 2, *names)["from_run"] is None


def test_a_plan_of_a_corpus_and_one_without(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(operations, "PROBE_FLOP", 1e9)
    monkeypatch.setattr(operations, "PROBE_SECONDS", 0.1)
    main(["plan", "--corpus", str(corpus), "--json", "a.json"])
    main(["plan", "--images", "1000000", "--json", "b.json", "--set", "clip.weights=hub:nobody/nothing@main"])
    one, many = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (one["images"], one["captions"], one["training_pairs"]) == (128, 384, 288)
    assert many["images"] == many["captions"] == 1_000_000 and many["corpus"] is None
    assert many["bytes"] > 7000 * one["bytes"] and many["phases"][1]["here"].startswith("operations")
    assert all(p["here_seconds"] > 0 and p["gpu_seconds"] > 0 for report in (one, many) for p in report["phases"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert "in all" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["plan"])
    assert "--images N" in capsys.readouterr().err
