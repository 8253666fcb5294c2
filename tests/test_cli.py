"""The command line: help, exit codes, what goes to which stream, both languages, and that help needs no torch."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from multihead import __version__, cli
from multihead.errors import UserError

VERBS = ("tasks", "init", "prepare", "build", "train", "evaluate", "predict", "serve", "export", "doctor", "demo")
RECIPE = """task: text-classification
data: {train: reviews.csv}
options: {max_tokens: 16}
model: {d_model: 8, num_layers: 1, num_heads: 1, ngrams: []}
train: {steps: 2, batch_size: 8, threads: 1, precision: float32}
evaluate: {bootstrap: 0}
"""


def call(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code, out.getvalue()


def process(*arguments: str, language: str = "en", **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "MULTIHEAD_LANG": language, "PYTHONIOENCODING": "utf-8", "COLUMNS": "100", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, encoding="utf-8", env=env,
                          timeout=120)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with data, a recipe and a trained run; the current folder while these tests run."""
    folder = tmp_path_factory.mktemp("project")
    rows = "".join(f"这是第{i}条评论,{'好' if i % 2 else '坏'}\n" for i in range(60))
    (folder / "reviews.csv").write_text("text,label\n" + rows)
    (folder / "r.yaml").write_text(RECIPE)
    with contextlib.chdir(folder):
        code, out = call("train", "r.yaml")
        assert code == 0 and out == "trained runs/r. Next: multihead evaluate runs/r\n"
        yield folder


# -- help, versions, languages -----------------------------------------------------------------------------------------


def test_help_of_every_verb() -> None:
    code, out = call("--help")
    assert code == 0
    for verb in VERBS:
        assert f"\n  {verb} " in out
        code, about = call(verb, "-h")
        assert code == 0 and about.startswith(f"Usage: multihead {verb}")
    assert "..." not in out.replace("[ARGS]...", ""), "every line says what it has to say"


def test_the_five_steps_are_named_in_order() -> None:
    out = call("--help")[1]
    assert [out.index(f"step {n}") for n in (1, 2, 4, 5)] == sorted(out.index(f"step {n}") for n in (1, 2, 4, 5))


@pytest.mark.parametrize("module", ["torch", "numpy", "yaml", "rich", "fastapi", "multihead.recipe"])
def test_help_loads_nothing_heavy(module: str) -> None:
    script = (f"import sys, multihead.cli\ntry: multihead.cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
              f"sys.exit({module!r} in sys.modules)")
    assert process("-c", script).returncode == 0


def test_as_a_module_in_both_languages() -> None:
    assert process("-m", "multihead", "--version").stdout == f"multihead {__version__}\n"
    english, chinese = (process("-m", "multihead", "--help", language=language) for language in ("en", "zh"))
    assert english.returncode == chinese.returncode == 0 and english.stderr == chinese.stderr == ""
    assert "what can be learned" in english.stdout and "能学习哪些任务" in chinese.stdout
    lines = [line for line in chinese.stdout.splitlines() if line.startswith("  ") and line.split()[0] in VERBS]
    assert len(lines) == len(VERBS) and all(any("\u4e00" <= c <= "\u9fff" for c in line) for line in lines)


def test_no_verb_shows_the_help_and_fails() -> None:
    done = process("-m", "multihead")
    assert done.returncode == 2 and "evaluate" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(("command", "english", "chinese"), [
    ("trian", "No such command 'trian'. Did you mean 'train'?; see `multihead -h`",
     "没有 'trian' 这个命令（是不是想写 'train'？）"),
    ("xyz", "No such command 'xyz'; see `multihead -h`", "没有 'xyz' 这个命令；用法见 `multihead -h`"),
    ("train", "Missing argument 'RECIPE'; see `multihead train -h`", "缺少 'RECIPE'；"),
    ("train --epochs 3", "No such option: --epochs; see", "没有 --epochs 这个选项；"),
    ("train --runs x", "--run", "没有 --runs 这个选项（是不是想写 --run？）"),
    ("train r.yaml --run", "Option '--run' requires an argument", "选项 --run 需要一个值"),
    ("tasks now", "Got unexpected extra argument", "多余的参数：now"),
    ("serve r --port x", "Invalid value for '--port'", "'--port' 的值不对"),
])  # fmt: skip
def test_a_wrong_command_line(
    command: str, english: str, chinese: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for language, words, label in (("en", english, "error: "), ("zh", chinese, "错误: ")):
        monkeypatch.setenv("MULTIHEAD_LANG", language)
        assert call(*command.split()) == (2, "")
        err = capsys.readouterr().err
        assert err.startswith(label) and words in err and len(err.splitlines()) == 1


# -- verbs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("language", "words"), [
    ("en", ["field", "text-classification", "language", "label a text"]),
    ("zh", ["领域", "text-generation", "续写文本"]),
])  # fmt: skip
def test_tasks(language: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", language)
    code, out = call("tasks")
    assert code == 0 and [word for word in words if word not in out] == []


@pytest.mark.parametrize(("language", "words"), [("en", ["torch", "device"]), ("zh", ["torch", "设备"])])
def test_doctor(language: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIHEAD_LANG", language)
    code, out = call("doctor")
    assert code == 0 and [word for word in words if word not in out] == []


def test_prepare_prints_the_data_report(project: Path) -> None:
    more = "这是第1条评论,坏\n这是第2条评论,坏\n,坏\n"
    (project / "odd.csv").write_text((project / "reviews.csv").read_text() + more)
    code, out = call("prepare", "r.yaml", "data.train=odd.csv", "data.max_rejected=0.1", "--run", "odd")
    assert code == 0 and out.endswith("prepared odd\n")
    for words in ("odd.csv: CSV, UTF-8; text = text (by name), label = label (by name)", "好 24",
                  "copies of another row: 2 (dropped)", "inputs that stand with different targets: 1 (2 rows)",
                  "odd.csv:3 (好) ≠ ", "odd.csv:62 (坏)", "rows that could not be used: 1",
                  "odd.csv:64: 'text' is empty"):
        assert words in out, words


def test_build_proves_one_batch(project: Path) -> None:
    code, out = call("build", "r.yaml", "--run", "built")
    assert code == 0 and "total" in out and "one batch (ids (8, " in out and "every parameter is reached" in out


def test_json_stands_alone_on_standard_output(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "runs/r", "--data", "reviews.csv", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert left.value.code == 0 and found["rows"] == 60 and "accuracy" in found["metrics"]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "runs/r", "--json"])
    out = capfd.readouterr().out
    assert json.loads(out)["part"] == "test" and len(out.splitlines()) == 1


def test_predict_prints_a_line_of_json_for_each_text(project: Path) -> None:
    code, out = call("predict", "runs/r", "房间很干净", "  #1: 'quoted'")
    assert code == 0 and [set(json.loads(line)) for line in out.splitlines()] == [{"label", "scores"}] * 2
    code, out = call("predict", "runs/r", "--file", "reviews.csv", "--out", "a.jsonl")
    assert (code, out) == (0, "60 answers in a.jsonl\n")
    lines = [json.loads(line) for line in (project / "a.jsonl").read_text().splitlines()]
    assert len(lines) == 60 and lines[0]["where"].endswith("reviews.csv:2")


def test_wishes_are_yaml_1_2() -> None:
    wishes = ["a=0.7", "b=no", "c=1e-3", "d=[x, 2]", "e=", "f='1'", "a=2"]
    assert cli._asked(wishes) == {"a": 2, "b": "no", "c": 1e-3, "d": ["x", 2], "e": None, "f": "1"}
    with pytest.raises(UserError) as caught:
        cli._asked(["warm", "=3", "x=[", "y=&a b"])
    assert [p.where for p in caught.value.problems] == ["--ask warm", "--ask =3", "--ask x=[", "--ask y=&a b"]


def test_paths_with_brackets_are_printed_as_they_are(project: Path) -> None:
    code, out = call("train", "r.yaml", "--run", "it's [bold]x[/bold]")
    assert code == 0
    assert out == "trained it's [bold]x[/bold]. Next: multihead evaluate 'it'\"'\"'s [bold]x[/bold]'\n"
    assert shlex.split(out.partition("Next: ")[2])[2] == "it's [bold]x[/bold]"


# -- endings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("raised", "code", "words"), [
    (UserError("no good", "a.csv:3"), 2, "error: a.csv:3: no good"),
    (UserError("two\nlines \x1b[31m"), 2, "error: two lines  [31m"),
    (PermissionError(13, "Permission denied", "/x/y"), 2, "error: /x/y: Permission denied; check"),
    (OSError(28, "No space left on device"), 2, "error: No space left on device"),
    (KeyboardInterrupt(), 130, ""), (BrokenPipeError(32, "Broken pipe"), None, ""),
])  # fmt: skip
def test_how_it_ends(raised: BaseException, code: int | None, words: str, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    def examine() -> None:
        raise raised

    monkeypatch.setattr("multihead.runtime.device.doctor", examine)
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert left.value.code == code if code is not None else left.value.code not in (0, 2)
    err = capsys.readouterr().err
    assert words in err and "Traceback" not in err and len(err.splitlines()) == bool(words)


def test_a_fault_of_the_program_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multihead.runtime.device.doctor", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_stopped_training_leaves_with_the_signal(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    from multihead.train import Stopped

    def stopped(*arguments: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr("multihead.train.train", stopped)
    assert call("train", "r.yaml")[0] == 128 + signal.SIGTERM


def test_a_terminal_that_cannot_show_chinese(project: Path) -> None:
    done = process("-m", "multihead", "tasks", language="zh", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0 and "text-classification" in done.stdout and "?" in done.stdout
