"""Who of a crew is missed, and what its others are told; without processes: one store, several watches."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from multihead.errors import UserError
from multihead.runtime import crew
from multihead.runtime.crew import BEAT, GRACE, SILENT, Lost, Watch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return now


def test_a_process_without_a_sign_of_life_is_missed_within_a_minute(clock: list[float]) -> None:
    store = dist.HashStore()
    three = [Watch(store, rank, 3) for rank in range(3)]
    gone_at = clock[0] + 20
    while not any(watch._cause() for watch in three):
        clock[0] += BEAT
        for watch in three:
            if watch.rank != 1 or clock[0] <= gone_at:
                store.set(f"alive/{watch.rank}", str(clock[0]))
                watch._listen()
        assert clock[0] + BEAT + GRACE < gone_at + 60  # all hear of it a beat later, and have their grace
    assert clock[0] >= gone_at + SILENT
    for rank in (0, 2):
        assert "process 1 failed: no sign of life" in str(three[rank]._cause())


def test_a_process_that_has_done_its_part_is_not_missed(clock: list[float]) -> None:
    store = dist.HashStore()
    here, done = Watch(store, 0, 2), Watch(store, 1, 2)
    store.set("alive/1", "7")
    here._listen()
    done.stop()
    clock[0] += 10 * SILENT
    here._listen()
    clock[0] += 10 * SILENT
    here._listen()
    assert here._cause() is None


def test_the_first_to_fail_is_named_by_all_others(clock: list[float]) -> None:
    store = dist.HashStore()
    first, second, third = (Watch(store, rank, 3) for rank in range(3))
    second.failed(UserError("there are no rows", "poem.txt:3"))
    for watch in (first, third):
        with pytest.raises(Lost, match=rf"process {watch.rank} ends with it: process 1 failed: poem\.txt:3: there are"):
            watch.failed(RuntimeError("[gloo] Connection closed by peer"))


def test_alone_a_crew_agrees_with_itself() -> None:
    alone = crew.Crew()
    assert alone.first and alone.sums([1, 2.5]) == [1, 2.5] and alone.tell({"a": 1}) == {"a": 1}
    assert alone.gather("x") == ["x"]
