"""Tables of which a batch looks up few rows: the optimizer against torch's SparseAdam, n-gram inputs against both."""

from __future__ import annotations

import torch
from torch import nn

from multihead.runtime import optim
from multihead.transformer.config import TransformerConfig
from multihead.transformer.inputs import TokenInput


def test_rows_move_as_in_torch_sparse_adam_whether_the_gradient_is_sparse_or_dense() -> None:
    torch.manual_seed(0)
    start = torch.randn(50, 4)
    sparse, dense, theirs = (nn.Parameter(start.clone()) for _ in range(3))
    ours = optim.MuonAdamW([{"params": [sparse, dense], "rowwise": True, "lr": 0.1, "betas": (0.9, 0.99)}])
    other = torch.optim.SparseAdam([theirs], lr=0.1, betas=(0.9, 0.99))
    for step in range(4):
        ids = torch.randint(20, (30,), generator=torch.Generator().manual_seed(step))
        weight = torch.randn(30, 4)
        for table, is_sparse in ((sparse, True), (dense, False), (theirs, True)):
            table.grad = None
            (nn.functional.embedding(ids, table, sparse=is_sparse) * weight).sum().backward()
        ours.step()
        other.step()
        assert torch.allclose(sparse, theirs, atol=1e-6) and torch.allclose(dense, theirs, atol=1e-6)
    assert torch.equal(sparse[20:], start[20:])


def test_clip_counts_a_row_looked_up_twice_by_its_sum() -> None:
    table = nn.Parameter(torch.zeros(5, 2))
    other = nn.Parameter(torch.zeros(5, 2))
    ids = torch.tensor([1, 1, 3])
    for parameter, is_sparse in ((table, True), (other, False)):
        nn.functional.embedding(ids, parameter, sparse=is_sparse).sum().backward()
    assert torch.isclose(optim.clip([table], 1.0, 0.5), optim.clip([other], 1.0, 0.5))
    assert table.grad is not None and other.grad is not None
    assert torch.allclose(table.grad.to_dense(), other.grad)


def test_first_bad_looks_into_sparse_gradients() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    (model(torch.tensor([2])) * float("nan")).sum().backward()
    assert optim.first_bad(model) == "weight"


def test_an_ngram_never_seen_adds_nothing_and_its_table_is_rowwise() -> None:
    config = TransformerConfig(d_model=8, num_heads=2, ngrams=(2, 3), ngram_buckets=64)
    with_table = TokenInput(config, 11)
    ids = torch.randint(11, (2, 7))
    assert torch.equal(with_table(ids), with_table.token(ids))
    with_table(ids).sum().backward()
    groups = optim.build(with_table).param_groups
    assert [g["params"][0] is with_table.ngram.weight for g in groups if g["rowwise"]] == [True]  # type: ignore[union-attr]
