"""The Q-Former against a naive loop, against BERT, and against BLIP-2's parameter counts."""

import math

import pytest
import torch
from torch.nn import functional as F

from xformer.errors import WeightsError
from xformer.model import build_xformer
from xformer.qformer import QFormer, load_bert
from xformer.settings import load_settings


def small(dtype: torch.dtype = torch.float64) -> QFormer:
    torch.manual_seed(0)
    model = QFormer(16, 4, 2, 32, 3, 2, 12, 50).to(dtype).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def naive_attention(block, hidden, source, allowed):
    """One query position and one head at a time."""
    heads, width = block.heads, hidden.shape[-1]
    d = width // heads
    query, key, value = block.query(hidden), block.key(source), block.value(source)
    out = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            for t in range(hidden.shape[1]):
                scores = [
                    (query[b, t, part] @ key[b, n, part] / math.sqrt(d))
                    if allowed[b][t][n]
                    else torch.tensor(-math.inf).double()
                    for n in range(source.shape[1])
                ]
                out[b, t, part] = torch.stack(scores).softmax(0) @ value[b, :, part]
    return F.layer_norm(hidden + block.output(out), (width,), block.norm.weight, block.norm.bias, 1e-12)


def naive_ffn(block, hidden):
    inner = block.output(F.gelu(block.intermediate(hidden)))
    return F.layer_norm(hidden + inner, hidden.shape[-1:], block.norm.weight, block.norm.bias, 1e-12)


def embed(model, ids, with_queries, batch):
    parts = [model.query_tokens.expand(batch, -1, -1)] if with_queries else []
    if ids is not None:
        parts.append(model.words.weight[ids] + model.positions.weight[: ids.shape[1]])
    joined = torch.cat(parts, 1)
    return F.layer_norm(joined, joined.shape[-1:], model.norm.weight, model.norm.bias, 1e-12)


@torch.no_grad()
def test_queries_and_joint_pass_agree_with_a_naive_loop() -> None:
    model, image = small(), torch.randn(2, 5, 12, dtype=torch.float64)
    ids, mask = torch.randint(0, 50, (2, 4)), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    cached = model.image_keys_values(image)
    for with_text in (False, True):
        hidden = embed(model, ids if with_text else None, True, 2)
        total = hidden.shape[1]
        allowed = [[[n < 3 or bool(mask[b][n - 3]) for n in range(total)] for _ in range(total)] for b in range(2)]
        everything = [[[True] * 5] * 3] * 2
        for i, layer in enumerate(model.layers):
            hidden = naive_attention(layer.attention, hidden, hidden, allowed)
            queries, text = hidden[:, :3], hidden[:, 3:]
            if i % 2 == 0:
                queries = naive_attention(layer.crossattention, queries, image, everything)
            hidden = torch.cat([naive_ffn(layer.query_ffn, queries), naive_ffn(layer.text_ffn, text)], 1)
        found = model.joint(cached, model.words(ids), mask) if with_text else model.queries(cached)[0]
        torch.testing.assert_close(found, hidden[:, :3], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_written_text_sees_the_prefix_and_its_past_only() -> None:
    model, enhanced = small(), torch.randn(2, 3, 16, dtype=torch.float64)
    ids, mask = torch.randint(0, 50, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    prefix = model.enhanced_prefix(enhanced)
    logits = model.write(prefix, model.words(ids), mask)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 50
    torch.testing.assert_close(model.write(prefix, model.words(changed), mask)[:, :3], logits[:, :3])
    assert not torch.allclose(
        model.write(model.enhanced_prefix(enhanced + 1), model.words(ids), mask)[:, 0], logits[:, 0]
    )
    hidden = embed(model, ids, False, 2)
    allowed = [
        [[n < 3 or (n - 3 <= t and (bool(mask[b][n - 3]) or n - 3 == t)) for n in range(8)] for t in range(5)]
        for b in range(2)
    ]
    for layer in model.layers:
        source = torch.cat([enhanced, hidden], 1)  # each layer's own projection of Z' is the prefix
        hidden = naive_ffn(layer.text_ffn, naive_attention(layer.attention, hidden, source, allowed))
    expected = F.gelu(model.head_dense(hidden))
    expected = F.layer_norm(expected, (16,), model.head_norm.weight, model.head_norm.bias, 1e-12)
    torch.testing.assert_close(logits, expected @ model.words.weight.T + model.head_bias, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_text_is_bert_after_its_weights_are_loaded() -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=49, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, type_vocab_size=1,
    )  # fmt: skip
    bert = BertForMaskedLM(config).double().eval()
    bert.bert.embeddings.token_type_embeddings.weight.zero_()
    model = small()
    load_bert(model, bert.state_dict())
    model.double()
    ids, mask = torch.randint(0, 49, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]).bool()
    want = bert.bert(ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(model.text(model.words(ids), mask)[mask], want[mask], rtol=1e-5, atol=1e-5)
    layer, theirs = model.layers[1], bert.bert.encoder.layer[1]
    torch.testing.assert_close(layer.query_ffn.intermediate.weight, theirs.intermediate.dense.weight, check_dtype=False)


def test_a_bert_that_does_not_fit_is_named() -> None:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 49, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    wide = BertForMaskedLM(BertConfig(hidden_size=32, **sizes))
    with pytest.raises(WeightsError, match=r"LayerNorm.weight has shape \(32,\), the settings ask for \(16,\)"):
        load_bert(small(), wide.state_dict())
    right = BertForMaskedLM(BertConfig(hidden_size=16, **sizes))
    with pytest.raises(WeightsError, match=r"cls.predictions.transform.dense.weight is missing"):
        load_bert(small(), right.bert.state_dict())
    short = BertForMaskedLM(BertConfig(hidden_size=16, max_position_embeddings=8, **sizes))
    with pytest.raises(WeightsError, match=r"position_embeddings.weight has shape \(8, 16\)"):
        load_bert(small(), short.state_dict())


def test_parameter_counts_are_those_of_blip2_and_of_the_paper() -> None:
    settings = load_settings("paper")
    linear = {width: 768 * width + width for width in (2560, 4096)}
    for model, with_27b, with_67b in (("qformer", 107_133_696, 108_314_880), ("xformer", 128_650_752, 129_831_936)):
        with torch.device("meta"):
            bridge = sum(p.numel() for p in build_xformer(settings, model, 0).parameters())
        assert (bridge + linear[2560], bridge + linear[4096]) == (with_27b, with_67b)


def test_an_image_without_layers_of_cross_attention_is_not_possible() -> None:
    model = small()
    assert [kv is not None for kv in model.image_keys_values(torch.zeros(1, 5, 12).double())] == [True, False] * 2
    with pytest.raises(StopIteration):
        model.queries([None] * 4)
