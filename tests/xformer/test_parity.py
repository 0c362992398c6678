"""Weights copied into reference implementations give the same numbers; the largest errors are printed as a table."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)  # fmt: skip

from xformer import losses
from xformer.dual import DualCrossAttention
from xformer.model import Batch, Stage1, XFormer
from xformer.qformer import QFormer
from xformer.reconstruction import restore_order
from xformer.settings import load_settings
from xformer.text import generation_labels

F64 = torch.float64
BEGIN, WORDS = 49, 50


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[str, Tensor, Tensor, float], None]]:
    """Compares and remembers the largest error of each line; the table is printed when the module is done."""
    largest: dict[str, tuple[float, float]] = {}

    def compare(name: str, ours: Tensor, theirs: Tensor, limit: float) -> None:
        assert ours.shape == theirs.shape and ours.isfinite().all()
        error = float((ours.detach() - theirs.detach()).abs().max())
        largest[name] = (max(error, largest.get(name, (0.0, limit))[0]), limit)
        assert error <= limit, (name, error)

    yield compare
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print()
        for name, (error, limit) in sorted(largest.items()):
            print(f"{name:<58} {error:9.1e}  (limit {limit:.0e})")


def shake(module: torch.nn.Module, std: float = 0.2) -> None:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def both_qformers(queries: int, text: bool) -> tuple[QFormer, Blip2ForImageTextRetrieval]:
    """Ours and transformers' with the same weights, float64."""
    torch.manual_seed(0)
    settings = Blip2QFormerConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=512, encoder_hidden_size=12, cross_attention_frequency=2, use_qformer_text_input=text,
    )  # fmt: skip
    vision = {"hidden_size": 12, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = Blip2Config(
        vision_config=vision, qformer_config=settings.to_dict(), num_query_tokens=queries, image_text_hidden_size=8
    )
    theirs = Blip2ForImageTextRetrieval(config).to(F64).eval()
    theirs.qformer.to(F64)
    shake(theirs)
    ours = QFormer(16, 4, 2, 32, queries, 2, 12, WORDS if text else 0).to(F64).eval()
    state = theirs.state_dict()
    with torch.no_grad():
        ours.query_tokens.copy_(state["query_tokens"])
        for name, parameter in ours.named_parameters():
            key = name
            for a, b in (
                ("norm.", "qformer.layernorm."), ("words", "embeddings.word_embeddings"),
                ("positions", "embeddings.position_embeddings"),
            ):  # fmt: skip
                key = b + key.removeprefix(a) if key.startswith(a) else key
            if name.startswith("layers."):
                key = name.replace("layers.", "qformer.encoder.layer.")
                for block in ("attention", "crossattention"):
                    for part in ("query", "key", "value"):
                        key = key.replace(f".{block}.{part}.", f".{block}.attention.{part}.")
                    key = key.replace(f".{block}.output.", f".{block}.output.dense.")
                    key = key.replace(f".{block}.norm.", f".{block}.output.LayerNorm.")
                for ffn, tail in (("query_ffn", "_query"), ("text_ffn", "")):
                    key = key.replace(f"{ffn}.intermediate", f"intermediate{tail}.dense")
                    key = key.replace(f"{ffn}.output", f"output{tail}.dense")
                    key = key.replace(f"{ffn}.norm", f"output{tail}.LayerNorm")
            if not name.startswith("head"):
                parameter.copy_(state[key])
    return ours, theirs


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_q_former_is_that_of_transformers(queries: int, batch: int, record) -> None:
    image = torch.randn(batch, 5, 12, dtype=F64)
    ours, theirs = both_qformers(queries, text=False)
    want = theirs.qformer(query_embeds=theirs.query_tokens.expand(batch, -1, -1), encoder_hidden_states=image)
    found, _ = ours.queries(ours.image_keys_values(image))
    record("Q-Former, queries only: Blip2QFormerModel", found, want.last_hidden_state, 1e-12)

    ours, theirs = both_qformers(queries, text=True)
    for length in (1, 6):  # one text token is a case
        ids = torch.randint(0, WORDS, (batch, length))
        mask = torch.ones(batch, length, dtype=torch.bool)
        mask[-1, max(1, length // 2) :] = False
        embedded = theirs.embeddings(input_ids=ids, query_embeds=theirs.query_tokens.expand(batch, -1, -1))
        seen = torch.cat([mask.new_ones(batch, queries), mask], 1).long()
        want = theirs.qformer(
            query_embeds=embedded, query_length=queries, attention_mask=seen, encoder_hidden_states=image
        ).last_hidden_state
        found = ours.joint(ours.image_keys_values(image), ours.words(ids), mask)
        record("Q-Former, queries + text: Blip2QFormerModel", found, want[:, :queries], 1e-12)
        words = theirs.qformer(
            query_embeds=theirs.embeddings(input_ids=ids), query_length=0, attention_mask=mask.long()
        )
        record(
            "Q-Former, text only: Blip2QFormerModel",
            ours.text(ours.words(ids), mask)[mask],
            words.last_hidden_state[mask],
            1e-12,
        )


def stage1(model: str, queries: int) -> Stage1:
    torch.manual_seed(1)
    qformer = QFormer(16, 2, 2, 32, queries, 2, 12, WORDS, local_width=20 if model == "early" else None)
    dual = DualCrossAttention(20, 16, 2) if model == "xformer" else None
    concat = torch.nn.Linear(20, 12) if model == "concat" else None
    whole = Stage1(XFormer(qformer, 12, dual, concat), None, 16, 8, BEGIN, "enhanced" if dual else "layerwise", 0.1)
    shake(whole, 0.3)
    torch.nn.init.constant_(whole.to(F64).temperature, 0.2)
    return whole.eval()


CASES = {  # images, texts (the same number = the same), queries, length of the longest text
    "three pairs": ((0, 1, 2), (0, 1, 2), 3, 6),
    "batch 1": ((0,), (0,), 3, 6),
    "one query": ((0, 1, 2), (0, 1, 2), 1, 6),
    "one text token": ((0, 1, 2), (0, 1, 2), 3, 1),
    "all texts equal": ((0, 1, 2), (0, 0, 0), 3, 6),
    "all images equal": ((0, 0, 0), (0, 1, 2), 3, 6),
    "an image twice": ((0, 1, 0), (0, 1, 2), 3, 6),
}


def make_batch(images: tuple, texts: tuple, length: int) -> Batch:
    torch.manual_seed(2)
    clip, local, ids = (
        torch.randn(3, 5, 12, dtype=F64),
        torch.randn(3, 4, 20, dtype=F64),
        torch.randint(3, 48, (3, length)),
    )
    mask = torch.ones(3, length, dtype=torch.bool)
    mask[1, max(1, length - 2) :] = False
    rows, words = torch.tensor(images), torch.tensor(texts)
    return Batch(rows, words, clip[rows], local[rows], None, None, ids[words], mask[words])


def alone(whole: Stage1, clip: Tensor, local: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Z' [Q, W] of one image, with a text or without, without a batch or pads."""
    bridge = whole.xformer
    image = bridge.image_keys_values(clip[None], local[None])
    if ids is None or mask is None:
        return bridge.enhance(bridge.qformer.queries(image)[0], local[None])[0][0]
    return bridge.enhance(
        bridge.qformer.joint(image, bridge.qformer.words(ids[mask][None]), mask[mask][None]), local[None]
    )[0][0]


@pytest.mark.parametrize("model", ["xformer", "qformer", "concat", "early"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_stage_1_losses_are_naive_loops(case: str, model: str, record, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, queries, length = CASES[case]
    whole, batch, b = stage1(model, queries), make_batch(images, texts, length), len(images)
    drawn: list[tuple[Tensor, Tensor]] = []
    honest = losses.hard_negatives
    monkeypatch.setattr(losses, "hard_negatives", lambda *a: drawn.append(honest(*a)) or drawn[-1])
    found, _ = whole(batch, True, torch.Generator().manual_seed(0))

    embed = [
        F.normalize(whole.vision_proj(alone(whole, batch.clip[i], batch.mae[i], None, None)), dim=-1) for i in range(b)
    ]
    words = []
    for i in range(b):
        m = batch.mask[i]
        words.append(
            F.normalize(
                whole.text_proj(
                    whole.xformer.qformer.text(whole.xformer.qformer.words(batch.ids[i][m][None]), m[m][None])[0, 0]
                ),
                dim=-1,
            )
        )
    similar = [[max(float(q @ words[j]) for q in embed[i]) / 0.2 for j in range(b)] for i in range(b)]
    itc = 0.0
    for i in range(b):
        same = [j for j in range(b) if images[i] == images[j] or texts[i] == texts[j]]
        for scores in (similar[i], [similar[j][i] for j in range(b)]):
            norm = math.log(sum(math.exp(s) for s in scores))
            itc -= sum(((0.9 / len(same)) * (j in same) + 0.1 / b) * (s - norm) for j, s in enumerate(scores)) / (2 * b)
    record("ITC: naive loop", found["itc"], torch.tensor(itc, dtype=F64), 1e-12)

    (to_text, text_ok), (to_image, image_ok) = drawn
    terms = []
    triples = [(i, i, 1) for i in range(b)]
    triples += [(int(to_image[i]), i, 0) for i in range(b) if image_ok[i]]
    triples += [(i, int(to_text[i]), 0) for i in range(b) if text_ok[i]]
    for i, j, label in triples:
        if label == 0:
            assert images[i] != images[j] and texts[i] != texts[j]
        logits = whole.itm_head(alone(whole, batch.clip[i], batch.mae[i], batch.ids[j], batch.mask[j])).mean(0)
        terms.append(-logits.log_softmax(0)[label])
    assert len(triples) == b + 2 * sum(
        any(images[i] != images[j] and texts[i] != texts[j] for j in range(b)) for i in range(b)
    )
    record("ITM: naive loop", found["itm"], torch.stack(terms).mean(), 1e-12)

    terms = []
    for i in range(b):
        ids = batch.ids[i][batch.mask[i]]
        image = whole.xformer.image_keys_values(batch.clip[i][None], batch.mae[i][None])
        z, own = whole.xformer.qformer.queries(image)
        if model == "xformer":
            own = whole.xformer.qformer.enhanced_prefix(whole.xformer.enhance(z, batch.mae[i][None])[0])
        for t in range(1, len(ids)):
            past = torch.cat([torch.tensor([BEGIN]), ids[1:t]])[None]
            scores = whole.xformer.qformer.write(
                own, whole.xformer.qformer.words(past), torch.ones_like(past, dtype=torch.bool)
            )[0, -1].log_softmax(0)
            terms.append(-(0.9 * scores[ids[t]] + 0.1 * scores.mean()))
    if terms:  # one token alone predicts nothing
        record("ITG: naive loop", found["itg"], torch.stack(terms).mean(), 1e-12)
    else:
        assert float(found["itg"]) == 0


@torch.no_grad()
def test_pads_change_no_loss(record) -> None:
    for model in ("xformer", "early"):
        whole, batch = stage1(model, 3), make_batch((0, 1, 2), (0, 1, 2), 6)
        whole.float()
        batch.clip, batch.mae = batch.clip.half(), batch.mae.half()
        short, _ = whole(batch, False, torch.Generator().manual_seed(0))
        batch.ids, batch.mask = F.pad(batch.ids, (0, 26)), F.pad(batch.mask, (0, 26))
        longer, _ = whole(batch, False, torch.Generator().manual_seed(0))
        for name, value in short.items():
            record("text padded to 32 instead of 6 (float32)", longer[name], value, 1e-5)


@pytest.mark.parametrize("norm_pix", [False, True])
@torch.no_grad()
def test_mae_is_that_of_transformers(norm_pix: bool, record) -> None:
    config = ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        decoder_hidden_size=8, decoder_num_hidden_layers=2, decoder_num_attention_heads=2, decoder_intermediate_size=16,
        norm_pix_loss=norm_pix,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).to(F64).eval()
    shake(model)
    pixels, noise = torch.randn(3, 3, 16, 16, dtype=F64), torch.rand(3, 16, dtype=F64)
    theirs = model(pixels, noise=noise)
    kept = torch.stack([torch.arange(16).unsqueeze(1).eq(row.argsort()[:4]).any(1) for row in noise])
    assert torch.equal(kept, theirs.mask == 0)  # our masks: the smallest noise stays
    raster = torch.stack([torch.where(k, torch.arange(16.0).to(F64), torch.full((16,), 99.0, dtype=F64)) for k in kept])
    hidden = model.vit(pixels, noise=raster).last_hidden_state  # kept patches in raster order, as they are stored
    shuffled = model.vit(pixels, noise=noise).last_hidden_state
    order = noise.argsort(1)[:, :4].argsort(1)
    again = torch.cat([shuffled[:, :1], shuffled[:, 1:].gather(1, order[..., None].expand(-1, -1, 8))], 1)
    record("MAE tokens, raster order: ViTMAE with the same noise", hidden, again, 1e-12)
    logits = model.decoder(hidden, restore_order(kept)).logits
    record("MAE decoder: ViTMAE with the same noise", logits, theirs.logits, 1e-11)
    target = losses.patchify(pixels, 4)
    record("MAE patches: ViTMAE.patchify", target, model.patchify(pixels), 0)
    expected = []
    for i in range(3):
        for p in range(16):
            if not kept[i, p]:
                want = target[i, p]
                want = (want - want.mean()) / (want.var() + 1e-6).sqrt() if norm_pix else want
                expected.append(((logits[i, p] - want) ** 2).mean())
    mean = torch.stack(expected).mean()
    record("MAE loss, patch by patch: ViTMAE", mean, theirs.loss, 1e-11)
    ours = losses.reconstruction(theirs.logits, pixels, kept, 4, norm_pix)
    record(f"MAE loss, {'normalised' if norm_pix else 'raw'} pixels: ViTMAE", ours, theirs.loss, 1e-11)


@torch.no_grad()
def test_our_masks_and_tokens_are_those_of_transformers_with_our_noise(record) -> None:
    """From the sample's id to M: our noise given to ViTMAE makes the mask, the tokens, and the loss that ours make."""
    from pipeline import images, masks
    from pipeline.encoders import MaeEncoder

    mae, ids = load_settings().mae, ["1", "image 2"]
    encoder = MaeEncoder(mae, 64)
    model = encoder.model
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
    chosen = np.stack([masks.kept_patches(0, 1, key, 64, 0.75) for key in ids])
    tokens = torch.from_numpy(encoder.encode(pixels, chosen))
    normal = torch.from_numpy(images.normalise(pixels, mae.mean, mae.std))
    noise = torch.from_numpy(np.stack([masks.noise(0, 1, key, 64) for key in ids])).float()
    model.config.mask_ratio = 0.75
    theirs = model(normal, noise=noise)
    kept = theirs.mask == 0
    assert kept.nonzero()[:, 1].reshape(2, -1).tolist() == chosen.tolist()
    shuffled, order = model.vit(normal, noise=noise).last_hidden_state, noise.argsort(1)[:, :16].argsort(1)
    raster = shuffled[:, 1:].gather(1, order[..., None].expand(-1, -1, shuffled.shape[-1]))
    record("M of the cache: ViTMAE with our noise (float32)", tokens, torch.cat([shuffled[:, :1], raster], 1), 2e-5)
    predicted = model.decoder(tokens, restore_order(kept)).logits
    ours = losses.reconstruction(predicted, normal, kept, mae.patch, model.config.norm_pix_loss)
    record("reconstruction loss from the cache: ViTMAE (float32)", ours, theirs.loss, 1e-5)


def test_clip_tokens_are_timms_forward_up_to_the_block(record) -> None:
    from pipeline import images
    from pipeline.encoders import ClipEncoder

    settings = load_settings()
    encoder = ClipEncoder(settings.clip, settings.image_size)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
    found = encoder.encode(pixels, [5, 2])
    model = encoder.model
    with torch.inference_mode():
        normal = torch.from_numpy(images.normalise(pixels, settings.clip.mean, settings.clip.std))
        hidden = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(normal))))
        for number, block in enumerate(model.blocks, 1):
            hidden = block(hidden)
            if number in found:
                own = hidden[:, : found[number].shape[1]]  # `tokens: global`: what stands in front of the patches
                record("CLIP tokens before the norm: timm, block by block", torch.from_numpy(found[number]), own, 0)
        record(
            "CLIP, all blocks and the norm: timm forward_features",
            model.norm(hidden),
            model.forward_features(normal),
            0,
        )


def test_opt_labels_are_the_hand_made_ones() -> None:
    """[CLS]/[DEC]/[SEP] of ITG, and of OPT: image tokens and pads carry no loss, </s> and the line break do."""
    ids, mask = torch.tensor([[2, 11, 12, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
    inputs, labels = generation_labels(ids, mask, BEGIN)
    assert inputs.tolist() == [[BEGIN, 11, 12, 3, 0, 0]] and labels.tolist() == [[11, 12, 3, -100, -100, -100]]

    from xformer.stage2 import FrozenLlm, Stage2

    llm = FrozenLlm("embedded:llm", "fp32")
    ids, mask = llm.encode(["a", "a red circle"], 8, newline=True, left=False)
    assert ids[0, 0] == llm.begin == 2 and int(ids[0][mask[0]][-1]) == llm.newline
    seen: dict[str, Tensor] = {}
    honest = llm.model.forward

    def spy(**kwargs):
        seen.update(kwargs)
        return honest(**kwargs)

    llm.model.forward = spy
    qformer = QFormer(16, 2, 2, 32, 3, 2, 12, 0)
    stage2 = Stage2(XFormer(qformer, 12), llm, 16)
    batch = make_batch((0, 1), (0, 1), 6)
    stage2(batch, ids, mask)
    n = int(mask[0].sum())
    want = [-100] * 3 + ids[0, :n].tolist() + [-100] * (ids.shape[1] - n)
    assert seen["labels"][0].tolist() == want
    assert seen["attention_mask"][0].tolist() == [1] * (3 + n) + [0] * (ids.shape[1] - n)
    assert seen["inputs_embeds"].shape == (2, 3 + ids.shape[1], llm.width)
