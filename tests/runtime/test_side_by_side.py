"""Threads side by side keep to the cores that each was given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from multihead.runtime.side_by_side import SideBySide


def test_each_thread_has_its_own_cores_and_the_caller_keeps_his() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = SideBySide(2)

        def work(jobs: Sequence[int]) -> tuple[int, int]:
            torch.ones(1 << 20).sum()  # long enough to be shared by all cores there are
            return sum(jobs), torch.get_num_threads()

        for _ in range(2):
            assert threads.each(work, [1, 2, 3]) == [(4, 1), (2, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
