"""Two processes against one on the same global batch: every loss, its gradient, and the bytes that go over."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.xformer.test_parity import BEGIN, WORDS, shake
from tests.xformer.test_parity import stage1 as small_stage1
from xformer import gather
from xformer.data import Cache, Pairs
from xformer.loop import split_batch
from xformer.model import Batch, build_stage1
from xformer.settings import load_settings
from xformer.stage2 import build_stage2, caption_text
from xformer.text import TextTokenizer

WORLD, SIZE = 2, 16
WIDE = ("xformer", "qformer", "concat", "early")  # in float64, with made-up tokens
sent: dict[str, int] = {}


def made_up() -> Batch:
    """Twelve pairs of unequal texts; one image lies on both processes, and the last pair has no negative on its own."""
    torch.manual_seed(3)
    rows = torch.tensor([0, 1, 2, 3, 4, 5, 0, 6, 7, 8, 9, 10])
    ids = torch.randint(3, WORDS - 2, (12, 6))
    mask = torch.arange(6)[None] < torch.tensor([6, 6, 6, 6, 5, 6, 2, 3, 2, 2, 3, 2])[:, None]
    wide = {"dtype": torch.float64}
    clip, local = torch.randn(11, 5, 12, **wide)[rows], torch.randn(11, 4, 20, **wide)[rows]
    return Batch(rows, torch.arange(12), clip, local, None, None, ids, mask)


def from_cache(store: Path) -> tuple[Any, Batch, Any, list[str]]:
    """Both trainers of the tiny preset with every block awake, and a batch of the cache with images that stand twice."""
    settings = load_settings(overrides=["stage1.weights.reconstruction=1"])
    tokenizer = TextTokenizer(settings.qformer.text, settings.qformer.max_text, settings.qformer.max_words)
    pairs = Pairs([Cache(store, settings, "xformer", pixels=True)], "train", tokenizer, settings)
    torch.manual_seed(0)
    stage1 = build_stage1(settings, "xformer", tokenizer.vocabulary, tokenizer.begin)
    stage2 = build_stage2(settings, "xformer")
    for model in (stage1, stage2):
        for name, parameter in model.named_parameters():
            if "dual" in name and "output" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    batch, captions = pairs.batch(torch.tensor([0, 1, 5, 9, 12, 15, 20, 24, 2, 30, 31, 40, 44, 50, 1, 61]).numpy(), 1)
    return stage1, batch, stage2, captions


def one_loss(model: torch.nn.Module, found: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, dict]:
    """A loss, and its gradient by parameter; the others count nothing, but every parameter takes part."""
    model.zero_grad()
    sum(value * float(key == name) for key, value in found.items()).backward()  # type: ignore[union-attr]
    plain = getattr(model, "module", model)
    return found[name].detach(), {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}


def measure(store: Path, rank: int, world: int) -> dict[str, tuple[torch.Tensor, dict]]:
    """Every loss of every case by name, on this rank's part of the batch."""
    torch.set_num_threads(1)
    result = {}

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        return model if world == 1 else DistributedDataParallel(model)

    def stage1(title: str, model: torch.nn.Module, batch: Batch) -> None:
        part, _ = split_batch(batch, [""] * len(batch.rows), world)[rank]
        wrapped = wrap(model)
        for name in wrapped(part, True, torch.Generator().manual_seed(5))[0]:
            found, _ = wrapped(part, True, torch.Generator().manual_seed(5))
            result[f"{title} {name}"] = one_loss(wrapped, found, name)

    for kind in WIDE:
        stage1(f"float64 {kind}", small_stage1(kind, 3), made_up())
    model, batch, stage2, captions = from_cache(store)
    sent.clear()
    stage1("stage 1", model, batch)
    part, texts = split_batch(batch, captions, world)[rank]
    settings, wrapped = load_settings(), wrap(stage2)
    result["stage 2 lm"] = one_loss(wrapped, wrapped(part, *caption_text(stage2.llm, texts, settings)), "lm")
    return result


def worker(rank: int, store: Path, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    all_to_all = dist.all_to_all_single

    def counted(out: torch.Tensor, given: torch.Tensor, *sizes) -> None:
        sent["chosen rows"] = sent.get("chosen rows", 0) + out.nbytes
        all_to_all(out, given, *sizes)

    dist.all_to_all_single = counted
    result = measure(store, rank, WORLD)
    means = {}
    for name, (loss, gradients) in result.items():
        dist.all_reduce(loss)
        means[name] = (loss / WORLD, gradients)
    torch.save((means, dict(sent)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_compute_the_losses_and_gradients_of_one(features: Path, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (features, tmp_path), nprocs=WORLD)
    threads = torch.get_num_threads()
    one = measure(features, 0, 1)
    torch.set_num_threads(threads)
    (two, bytes_in), (other, _) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(WORLD))
    print(f"\n{'loss':28}{'1 process':>12}{'2 processes':>13}{'difference':>12}{'gradients':>11}{'largest':>10}")
    for name, (loss, gradients) in one.items():
        found, theirs = two[name]
        assert set(gradients) == set(theirs) and all(torch.equal(theirs[k], other[name][1][k]) for k in theirs)
        apart = max(float((gradients[k] - theirs[k]).abs().max()) for k in gradients)
        largest = max(float(g.abs().max()) for g in gradients.values())
        print(
            f"{name:28}{float(loss):12.7f}{float(found):13.7f}{abs(float(loss - found)):12.1e}{apart:11.1e}{largest:10.1e}"
        )
        limit = 1e-12 if "float64" in name else 1e-5
        assert abs(float(loss - found)) < limit and apart < limit and largest > 1e-3, name
    settings, steps = load_settings(), 8  # four losses, each computed twice
    row = 2 * settings.clip.width * 17 + 2 * settings.mae.width * 17
    everything = steps * row * (WORLD - 1) * SIZE // WORLD
    print(
        f"image tokens received per process: {bytes_in['chosen rows']:,} bytes of chosen rows, {everything:,} if all came"
    )
    assert bytes_in["chosen rows"] <= everything


def test_alone_inside_a_run_is_one_process() -> None:
    with gather.alone():
        assert gather.rank_and_world() == (0, 1)
    x = torch.arange(6.0).reshape(3, 2)
    foreign, place = gather.exchange_rows([x], torch.tensor([2, 0, 1]))
    assert foreign[0].shape == (0, 2) and place.tolist() == [2, 0, 1]
    assert gather.gather(x) is x and float(gather.mean_over_ranks(torch.tensor(5))) == 5.0


@pytest.mark.parametrize("kind", WIDE)
def test_every_trained_parameter_has_a_gradient(kind: str) -> None:
    """Else several processes would wait for each other for ever."""
    model = small_stage1(kind, 3)
    shake(model)
    found, _ = model(made_up(), True, torch.Generator().manual_seed(0))
    torch.stack(list(found.values())).sum().backward()
    assert BEGIN and [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
