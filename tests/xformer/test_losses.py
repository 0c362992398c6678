"""Each loss against its definition, and where it can against a reference implementation."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from xformer import losses
from xformer.reconstruction import restore_order


def test_itc_against_a_naive_loop() -> None:
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(4, 3, 8, dtype=torch.float64), dim=-1)
    texts = F.normalize(torch.randn(4, 8, dtype=torch.float64), dim=-1)
    same = torch.eye(4, dtype=torch.bool)
    same[0, 2] = same[2, 0] = True
    temperature, smoothing = torch.tensor(0.07, dtype=torch.float64), 0.1
    total = 0.0
    for i in range(4):
        positives = [j for j in range(4) if same[i, j]]
        target = [smoothing / 4 + (1 - smoothing) * (j in positives) / len(positives) for j in range(4)]
        for logits in (
            [max(float(queries[i, q] @ texts[j]) for q in range(3)) / 0.07 for j in range(4)],
            [max(float(queries[j, q] @ texts[i]) for q in range(3)) / 0.07 for j in range(4)],
        ):
            norm = math.log(sum(math.exp(v) for v in logits))
            total -= sum(t * (v - norm) for t, v in zip(target, logits, strict=True)) / 8
    found = losses.itc(queries, texts, queries, texts, temperature, same, smoothing)
    assert float(found) == pytest.approx(total, rel=1e-10)


def test_hard_negatives_follow_the_similarity_and_never_repeat_the_image() -> None:
    same = torch.eye(5, dtype=torch.bool)
    same[0, 1] = True
    similarities = torch.zeros(5, 5)
    similarities[:, 3] = 4.0
    similarities[0, 1] = 100.0
    drawn = torch.zeros(5, 5)
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        columns, eligible = losses.hard_negatives(similarities, same, torch.rand(5, generator=generator))
        assert eligible.all()
        drawn[torch.arange(5), columns] += 1
    assert not (drawn[same] > 0).any()
    expected = math.exp(4) / (math.exp(4) + 3)
    assert abs(drawn[1, 3] / 500 - expected) < 0.05


def test_a_row_without_an_eligible_negative_is_told_and_not_nan() -> None:
    same = torch.ones(2, 2, dtype=torch.bool)
    columns, eligible = losses.hard_negatives(torch.zeros(2, 2), same, torch.rand(2))
    assert not eligible.any() and columns.shape == (2,)


def test_extreme_similarities_still_draw_an_eligible_column() -> None:
    similarities = torch.tensor([[0.0, -1e5, -1e5], [-1e5, 0.0, 300.0], [0.0, 0.0, 0.0]])
    columns, _ = losses.hard_negatives(similarities, torch.eye(3, dtype=torch.bool), torch.rand(3))
    assert columns[0] in (1, 2) and columns[1] == 2 and columns[2] in (0, 1)


def test_the_constant_predictor_of_itm() -> None:
    logits = torch.log(torch.tensor([2 / 3, 1 / 3])).expand(3, 4, 2)
    assert float(losses.itm(logits, torch.tensor([1, 0, 0]))) == pytest.approx(losses.ITM_CONSTANT, abs=1e-6)


def test_itg_ignores_what_has_no_label() -> None:
    logits = torch.randn(2, 3, 7)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])
    want = -(logits[0].log_softmax(-1)[[0, 1], [1, 2]].sum() + logits[1].log_softmax(-1)[0, 3]) / 3
    assert float(losses.itg(logits, labels, 0.0)) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruction_is_the_mae_loss_of_transformers(norm_pix: bool) -> None:
    config = ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=16,
        norm_pix_loss=norm_pix,
    )  # fmt: skip
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    pixels, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        output = model(pixels, noise=noise)
        torch.testing.assert_close(losses.patchify(pixels, 4), model.patchify(pixels))
        kept = output.mask == 0
        found = losses.reconstruction(output.logits, pixels, kept, 4, norm_pix)
        torch.testing.assert_close(found, output.loss, rtol=1e-5, atol=1e-6)
        # kept tokens in raster order decode to the same pixels as in the order of their noise
        hidden = model.vit(pixels, noise=noise).last_hidden_state
        order = noise.argsort(1)[:, :4].argsort(1)
        raster = torch.cat([hidden[:, :1], hidden[:, 1:].gather(1, order[..., None].expand(-1, -1, 8))], 1)
        again = model.decoder(raster, restore_order(kept)).logits
        torch.testing.assert_close(again, output.logits, rtol=1e-4, atol=1e-5)
