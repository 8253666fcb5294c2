"""The log never holds a step twice; the progress line says speed, time left and how to go on."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from multihead.errors import UserError
from multihead.runtime.log import Log, Progress, duration, number, read_log, resume_command


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Log(path) as log:
        for step in range(1, 6):
            log.write(step, loss=1 / step, note="中文")
    with open(path, "ab") as file:
        file.write('{"step": 3, "loss": 0.1, "note": "中'.encode()[:-1])
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 3, 4, 5]
    with Log(path, step=3) as log:
        log.write(4, loss=float("nan"), bad=float("inf"), flag=True)
        log.write(5)
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 3, 4, 5]
    assert path.read_text("utf-8").splitlines()[2:4] == [
        '{"step": 3, "loss": 0.3333333333333333, "note": "中文"}',
        '{"step": 4, "loss": null, "bad": null, "flag": true}',
    ]
    with Log(path):
        assert path.read_bytes() == b""  # from the start again


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="no space left on the disk while writing"), Log("/dev/full") as log:
        log.write(1, loss=0.5)


def test_log_of_garbage_and_of_nothing(tmp_path: Path) -> None:
    assert list(read_log(tmp_path / "none")) == []
    (tmp_path / "log").write_bytes(b'\x00\x00\x00\n[1]\n{"step": 1}\n{"step": 2}')
    assert list(read_log(tmp_path / "log")) == [{"step": 1}]


def test_tensorboard_holds_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path / "log.jsonl", tensorboard=tmp_path / "tb") as log:
        for step in (1, 2, 3):
            log.write(step, loss=step / 2, name="x", done=False)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 1.0), (3, 1.5)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"multihead\[log\]"):
        Log(tmp_path / "log.jsonl", tensorboard=tmp_path / "tb")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_away_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(400, start=100, unit="tokens", every=10, stream=stream, clock=clock) as progress:
        for step in range(101, 127):
            clock.now += 1.0
            progress.advance(step, items=2048, loss=torch.tensor(2.5))
        progress.say("saved")
        progress.interrupted("multihead train a.yaml")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 110/400 · loss 2.5000 · 2,048 tokens/s · 4 min 50 s left"
    assert lines[1].startswith("step 120/400") and lines[2] == "saved" and lines[3].startswith("step 126/400")
    assert lines[4].startswith("Stopped after step 126 of 400") and lines[5] == "  multihead train a.yaml"
    assert len(lines) == 6
    monkeypatch.setenv("MULTIHEAD_LANG", "zh")
    assert progress.text() == "第 126/400 步 · loss 2.5000 · 2,048 tokens/秒 · 还需 4 分 34 秒"


def test_bar_on_a_terminal_ends_at_the_last_step() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(20, stream=stream) as progress:
        for step in range(1, 21):
            progress.advance(step, loss=1.0 / step)
        progress.say("best [so far]")
    assert "step 20/20" in stream.getvalue() and "best [so far]\n" in stream.getvalue()


def test_words_for_numbers_and_commands() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7620)] == ["0 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]
    assert [number(v) for v in (1.87643, 1234.5, 0.0, 3.2e-5)] == ["1.8764", "1234.5", "0.0000", "3.2e-05"]
    run = ["train", "我的 数据.yaml", "train.steps=5"]
    assert resume_command(["/x/bin/multihead", *run]) == "multihead train '我的 数据.yaml' train.steps=5"
    assert resume_command(["/x/multihead/__main__.py", "train"]) == "python -m multihead train"
    assert resume_command(["mine.py"]) == "python mine.py"


def test_torchrun_is_part_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    main = "/x/multihead/__main__.py"
    assert resume_command([main, "train", "a.yaml"]) == "torchrun --nproc-per-node=8 -m multihead train a.yaml"
    options = resume_command([main, "train", "a.yaml", "--run", "b"])
    assert options == "torchrun --nproc-per-node=8 -m -- multihead train a.yaml --run b"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "4")
    assert "--nnodes=4 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 " in resume_command([main, "train", "a.yaml"])
