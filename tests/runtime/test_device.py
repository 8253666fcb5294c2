"""What is chosen for this machine, and that random streams are pure functions of their place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from multihead.errors import UserError
from multihead.runtime import device


@pytest.fixture(autouse=True)
def one_thread() -> object:
    yield
    torch.set_num_threads(1)


def test_device_is_there_or_said_not_to_be() -> None:
    assert device.choose_device("cpu") == torch.device("cpu")
    assert device.choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="none of auto"):
        device.choose_device("gpu")
    with pytest.raises(UserError, match=r"cuda:99 was asked for, but .*train.device=cpu"):
        device.choose_device("cuda:99")


def test_precision_and_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for flags, expected in ((set(), torch.float32), ({"avx512_bf16"}, torch.bfloat16), ({"amx_bf16"}, torch.bfloat16)):
        monkeypatch.setattr(device, "cpu_flags", lambda flags=flags: frozenset(flags))
        device.fast_bf16.cache_clear()
        assert device.choose_precision("auto", cpu) == expected
    device.fast_bf16.cache_clear()
    assert device.choose_precision("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="none of auto, float32, bf16"):
        device.choose_precision("fp16", cpu)
    one = torch.ones(2, 2)
    for precision in (torch.float32, torch.bfloat16):
        with device.autocast(cpu, precision):
            assert (one @ one).dtype == precision


def test_random_stream_is_a_pure_function_of_its_place() -> None:
    def draw(*place: int) -> tuple[float, ...]:
        device.seed_step(*place)
        return tuple(torch.rand(4).tolist())

    places = [(s, k, m, r) for s in range(3) for k in range(20) for m in range(3) for r in range(3)]
    first = {place: draw(*place) for place in places}
    assert len(set(first.values())) == len(places)
    assert all(draw(*place) == first[place] for place in reversed(places))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5), ("nonsense", None)],
)
def test_cpu_quota_of_control_groups(tmp_path: Path, content: str, expected: float | None) -> None:
    own = tmp_path / "cgroup"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text(content)  # the limit of a parent binds its children
    assert device._quota(tmp_path, own) == expected
    own.write_text("4:cpu,cpuacct:/c\n3:memory:/c\n")
    (tmp_path / "cpu" / "c").mkdir(parents=True)
    (tmp_path / "cpu" / "c" / "cpu.cfs_quota_us").write_text("300000\n")
    (tmp_path / "cpu" / "c" / "cpu.cfs_period_us").write_text("100000\n")
    assert device._quota(tmp_path, own) == 3.0
    assert device._quota(tmp_path, tmp_path / "none") is None


def test_candidates_and_choice_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.candidates(1) == [1] and device.candidates(6) == [1, 2, 4, 6] and device.candidates(8) == [1, 2, 4, 8]
    assert device.fastest({1: [1.04, 1.04, 9.0], 2: [1.0, 1.0, 1.0]}) == 1
    assert device.fastest({1: [1.06], 2: [1.0], 4: [0.99]}) == 2
    assert device.fastest({3: []}) == 3
    cost = {1: 0.004, 2: 0.001, 4: 0.02}
    best = device.choose_threads(lambda: time.sleep(cost[torch.get_num_threads()]), [4, 2, 1], budget=0.2)
    assert best == 2 == torch.get_num_threads()
    assert device.choose_threads(lambda: 1 / 0, [1]) == 1  # nothing to choose, nothing to measure


def test_doctor_looks_at_everything_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = device.importlib.util.find_spec
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name))
    monkeypatch.setenv("MULTIHEAD_DATA", "/no/such/folder")
    found = {finding.name: finding for finding in device.doctor()}
    assert {"Python", "torch", "device", "cores", "threads", "bf16", "memory", "disk", "[serve]"} <= found.keys()
    assert found["[data]"] == device.Finding("[data]", "missing: pyarrow", "pip install 'multihead[data]'")
    assert found["MULTIHEAD_DATA"].advice == "no such folder"
