"""The machine's ceiling, the energy counters, and what of them stands in a run's log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from multihead.runtime import meter
from multihead.runtime.flops import forward_flops

CPU = torch.device("cpu")


def test_operations_of_a_product() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    before = torch.get_rng_state()
    assert forward_flops(lambda: (a @ b, torch.rand(4))) == 2 * 3 * 5 * 7
    assert torch.equal(before, torch.get_rng_state())


def test_the_ceiling_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(meter, "measure", lambda device, precision: measured.append(precision) or 5e9)
    store = tmp_path / "cache" / "ceiling.json"
    for precision in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        assert meter.ceiling(CPU, precision, store) == 5e9
    assert measured == [torch.float32, torch.bfloat16] and len(json.loads(store.read_text())) == 2
    assert meter.ceiling(CPU, torch.float32, store, least=4e9) == 5e9 and len(measured) == 2
    assert meter.ceiling(CPU, torch.float32, store, least=6e9) == 6e9 and len(measured) == 3  # it was disturbed
    assert meter.ceiling(CPU, torch.float32, store) == 6e9
    store.write_text("torn {")
    assert meter.ceiling(CPU, torch.float32, store) == 5e9
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert meter.ceiling(CPU, torch.float32, blocked / "ceiling.json") == 5e9, "a cache that cannot be written is none"


def test_a_ceiling_is_possible() -> None:
    found = meter.measure(CPU, torch.float32, budget=0.0)
    assert 1e8 < found < 1e15


def counters(folder: Path, values: list[int]) -> None:
    for i, value in enumerate(values):
        for name in (f"intel-rapl:{i}", f"intel-rapl:{i}:0"):  # the second is a part of the first
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "energy_uj").write_text(f"{value}\n")
            (folder / name / "max_energy_range_uj").write_text("1000000000\n")


def test_energy_is_read_from_the_packages_counters(tmp_path: Path) -> None:
    counters(tmp_path, [5_000_000, 999_000_000])
    energy = meter.Energy(CPU, tmp_path)
    assert energy.measured and energy.joules() == 0
    counters(tmp_path, [7_000_000, 1_000_000])  # the second began anew
    assert energy.joules() == pytest.approx(2 + 2)


def test_without_counters_it_is_an_estimate_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [10.0]
    monkeypatch.setattr(meter.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(meter, "RAPL", tmp_path)
    monkeypatch.setattr(meter, "ceiling", lambda *_, least=0: max(1e9, least))
    monkeypatch.setattr(meter.Energy.__init__, "__defaults__", (tmp_path,))
    found = meter.Meter(CPU, torch.float32, 2e6, [{"step": 3, "joules_estimated": 100.0},
                                                   {"step": 9, "joules_estimated": 900.0}], step=5)  # fmt: skip
    clock[0] = 12.5
    # 2 million operations, 100 times a second, of a thousand million; what was logged after step 5 is dropped.
    assert found.read(100) == {"share_of_ceiling": 0.2, "joules_estimated": 100 + 2.5 * meter.CORE_WATTS}
    assert found.read(1000)["share_of_ceiling"] == 1  # what is reached is possible
