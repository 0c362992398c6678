"""Stage 1 and stage 2 as wholes: where gradients go, what stays frozen, which labels count."""

import numpy as np
import pytest
import torch

from xformer import validate
from xformer.data import Cache, Pairs
from xformer.model import build_stage1
from xformer.settings import load_settings
from xformer.stage2 import build_stage2
from xformer.text import TextTokenizer, clean, generation_labels


@pytest.fixture
def pairs(features):
    settings = load_settings()
    tokenizer = TextTokenizer(settings.qformer.text, 40, 50)
    return Pairs([Cache(features, settings, "xformer", pixels=True)], "train", tokenizer, settings)


def test_what_is_frozen_stays_in_evaluation_mode_when_the_model_trains() -> None:
    settings = load_settings()
    frozen = [build_stage1(settings, "xformer", 20, 1).train().decoder, build_stage2(settings, "xformer").train().llm]
    assert all(part is not None and not any(m.training for m in part.modules()) for part in frozen)


def test_every_loss_reaches_the_dual_block_and_none_the_decoder(pairs) -> None:
    settings = load_settings()
    torch.manual_seed(0)
    stage1 = build_stage1(settings, "xformer", pairs.tokenizer.vocabulary, pairs.tokenizer.begin)
    assert stage1.xformer.dual is not None
    for parameter in stage1.xformer.dual.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    batch, _ = pairs.batch(np.arange(0, 60, 5), 0)
    losses, measured = stage1(batch, True, torch.Generator().manual_seed(0))
    assert set(losses) == {"itc", "itm", "itg", "reconstruction"}
    block1, block2 = (stage1.xformer.dual.layers[0][n].output.weight for n in ("local", "queries"))
    for name, value in losses.items():
        wanted = block1 if name == "reconstruction" else block2
        (gradient,) = torch.autograd.grad(value, wanted, retain_graph=True)
        assert gradient.abs().sum() > 0, name
    assert not any(p.requires_grad for p in stage1.decoder.parameters())
    assert 0 <= float(measured["itm_accuracy"]) <= 1


@pytest.mark.parametrize(("outside", "bound"), [(1e-5, 0.001), (0.7, 0.5)])
def test_a_temperature_that_left_its_range_is_put_back_and_learns_on(pairs, outside: float, bound: float) -> None:
    settings = load_settings()
    stage1 = build_stage1(settings, "qformer", pairs.tokenizer.vocabulary, pairs.tokenizer.begin)
    stage1.temperature.data.fill_(outside)
    batch, _ = pairs.batch(np.arange(0, 30, 3), 0)
    losses, measured = stage1(batch, False, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(losses["itc"], stage1.temperature)
    assert float(measured["temperature"]) == pytest.approx(bound) and float(
        stage1.temperature.detach()
    ) == pytest.approx(bound)
    assert gradient.isfinite() and gradient != 0


def test_captions_that_the_model_reads_alike_are_not_each_others_negatives(pairs) -> None:
    said = ["A red square.", "a red square", "a blue square"]
    pairs._captions[0] = said + [pairs._captions[0][i] for i in range(3, 60)]
    batch, captions = pairs.batch(np.array([0, 1, 2]), 0)
    assert captions == said and batch.texts[0] == batch.texts[1] != batch.texts[2]


def test_validation_reads_all_stores_in_passes_that_fit(pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Pairs([pairs.caches[0]] * 2, "train", pairs.tokenizer, pairs.settings)
    images = both.images
    monkeypatch.setattr(validate, "AT_ONCE", 8)
    recipe = pairs.settings.stage1.model_copy(update={"batch": 20, "validate_batches": 1})
    chosen = validate.validation_batches(both, recipe)
    assert [len(part) for part in chosen] == [8, 8] and images > 16
    stores, rows, _ = both.places(np.concatenate(chosen))
    assert (np.bincount(stores) == 8).all() and len(set(zip(stores.tolist(), rows.tolist(), strict=True))) == 16
    every = recipe.model_copy(update={"validate_batches": 1000})
    assert len(np.unique(np.concatenate(validate.validation_batches(both, every)))) == images // 8 * 8


def test_reconstruction_sees_no_text(pairs) -> None:
    settings = load_settings()
    stage1 = build_stage1(settings, "xformer", pairs.tokenizer.vocabulary, pairs.tokenizer.begin).eval()
    batch, _ = pairs.batch(np.arange(0, 30, 3), 1)
    first, _ = stage1(batch, False, torch.Generator().manual_seed(0))
    batch.ids = batch.ids.roll(1, 0)
    batch.mask = batch.mask.roll(1, 0)
    second, _ = stage1(batch, False, torch.Generator().manual_seed(0))
    assert torch.equal(first["reconstruction"], second["reconstruction"]) and not torch.equal(
        first["itg"], second["itg"]
    )


def test_generation_labels_end_with_sep_and_skip_pads() -> None:
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    inputs, labels = generation_labels(ids, mask, begin=99)
    assert inputs.tolist() == [[99, 7, 8, 3], [99, 9, 3, 0]]
    assert labels.tolist() == [[7, 8, 3, -100], [9, 3, -100, -100]]


def test_captions_are_cleaned_as_in_lavis() -> None:
    assert clean('A "Red" dog; runs (fast).  Now!', 50) == "a red dog runs fast now"
    assert clean("one two three", 2) == "one two"


def test_stage_2_labels_and_frozen_llm(pairs, stage2) -> None:
    from xformer.evaluation.load import load_stage2

    model, _, settings = load_stage2(stage2, [])
    assert not any(p.requires_grad for p in model.llm.parameters())
    assert not model.train().llm.model.training
    texts = ["two red circles", "one blue square on the left and four green triangles"]
    ids, mask = model.llm.encode(texts, 8, newline=True, left=False)
    ends = [int(row[m][-1]) for row, m in zip(ids, mask, strict=True)]
    assert ends == [model.llm.newline] * 2 and ids.shape[1] == 8 and (ids[:, 0] == 2).all()
    batch, _ = pairs.batch(np.array([0, 30]), 0)
    soft, _ = model.prefix(batch.clip, batch.mae)
    logits = model.llm.model(
        inputs_embeds=torch.cat([soft, model.llm.embed(ids)], 1),
        attention_mask=torch.cat([mask.new_ones(2, 16), mask], 1).long(),
    ).logits
    picked = [
        -logits[b, 15 + t].log_softmax(-1)[ids[b, t]] for b in range(2) for t in range(ids.shape[1]) if mask[b, t]
    ]
    assert float(model(batch, ids, mask)["lm"]) == pytest.approx(float(torch.stack(picked).mean()), rel=1e-4)


def test_beam_answers_do_not_depend_on_what_they_are_padded_with(stage2) -> None:
    from xformer.evaluation.generate import complete
    from xformer.evaluation.load import load_stage2

    model, _, settings = load_stage2(stage2, ["eval.max_new_tokens=5"])
    prompts = ["Question: How many circles are there? Short Answer:", "Question: What? Short Answer:"]
    soft = torch.randn(2, 16, model.llm.width, generator=torch.Generator().manual_seed(0))
    together = complete(model.llm, soft, prompts, settings.eval)
    alone = [complete(model.llm, soft[i : i + 1], [p], settings.eval)[0] for i, p in enumerate(prompts)]
    assert together == alone
