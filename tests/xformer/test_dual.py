"""The dual cross-attention starts as the identity, has the paper's size, and moves information both ways."""

import torch

from xformer.dual import DualCrossAttention


def test_it_starts_as_q_former_plus_mae() -> None:
    block = DualCrossAttention(16, 8, 2)
    queries, local = torch.randn(2, 3, 8), torch.randn(2, 5, 16)
    enhanced, rebuilt = block(queries, local)
    assert torch.equal(enhanced, queries) and torch.equal(rebuilt, local)


def test_it_has_the_papers_size() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in DualCrossAttention(1280, 768, 16).parameters()) == 21_517_056


def test_both_directions_and_block_2_reads_what_block_1_wrote() -> None:
    torch.manual_seed(0)
    block = DualCrossAttention(16, 8, 2).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    queries = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    local = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    enhanced, rebuilt = block(queries, local)
    assert torch.autograd.grad(rebuilt.sum(), queries, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(enhanced.sum(), local, retain_graph=True)[0].abs().sum() > 0
    write = block.layers[0]["local"].output.weight  # of block 1, reached only through M'
    assert torch.autograd.grad(enhanced.sum(), write)[0].abs().sum() > 0


def test_depth_and_second_ffn_are_settings() -> None:
    deep = DualCrossAttention(16, 8, 2, depth=2, ffn_ratio=0, ffn_block2=True)
    enhanced, rebuilt = deep(torch.randn(1, 3, 8), torch.randn(1, 5, 16))
    assert enhanced.shape == (1, 3, 8) and rebuilt.shape == (1, 5, 16) and len(deep.layers) == 2
