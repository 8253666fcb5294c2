"""All benchmarks, or those named: one table, one JSON file.

    python benchmarks/run.py [NAME …] [--smoke] [--budget MINUTES] [--json FILE] [--keep] [--docs] [--list]

Each benchmark is a script of this folder and a process of its own, one after the other; peers are measured by turns
with ours inside each (A B A B), so that a machine that grows slower does so for both. A name may carry options after a
colon: ``image_classification:--part=cifar10``. Without names, all of them run in their usual form.

--smoke runs `SMOKE` with the smallest budget there is, in under three minutes altogether, and asserts no times: only
that each ran to its end. What needs data or packages that are not there says so and counts as left out.
--keep lays the figures of each benchmark in benchmarks/figures, instead of what was there of it: all of them take a
day, so they are kept as they come. --docs writes the table of what is kept there into docs/benchmarks.md and
docs/benchmarks.zh.md, between their two marks; with --docs alone nothing is run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import machine

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"
DOCS = {"benchmarks.md": ("benchmark", "what", "peer", "ours", "unit", "aim", "holds", "measured", "yes", "no"),
        "benchmarks.zh.md": ("基准", "内容", "对照", "本项目", "单位", "目标", "达到", "测量", "是", "否")}  # fmt: skip
MARKS = "<!-- table -->", "<!-- /table -->"
PARTS = {"image_classification": ("throughput", "fashion-mnist", "cifar10"),
         "speech_recognition": ("fsdd", "syllables", "hostile"),
         "training_speed": ("decoder", "encoder", "encoder-decoder")}  # fmt: skip
SMOKE = ("startup", "generate", "recommend_serving")
SMOKE_LIMIT = 170.0
SMOKE_MINUTES = 0.02
NOT_ALONE = {"run"}


def names() -> list[str]:
    """Every benchmark, each part of those that have several by itself."""
    found = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_ALONE and path.stem[0] != "_")
    return [f"{name}:--part={part}" if part else name for name in found for part in PARTS.get(name, ("",))]


def run(name: str, options: list[str], limit: float | None) -> dict[str, Any]:
    """One benchmark: its own JSON, its exit code, its time, and the last lines of what it said where it failed.

    An exit code of 0 says that every aim holds, of 1 that one does not, or that it broke before it wrote its JSON.
    """
    script, _, more = name.partition(":")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "figures.json"
        command = [sys.executable, str(HERE / f"{script}.py"), *more.split(), *options, "--json", str(place)]
        start = time.perf_counter()
        try:
            done = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  timeout=limit, check=False)
            code, said = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            code, said = 124, late.stdout.decode("utf-8", "replace") if isinstance(late.stdout, bytes) else ""
        found = json.loads(place.read_text("utf-8")) if place.is_file() else {}
    broke = (not found and "Traceback" in said) or code not in (0, 1, 2, 124)
    return {"name": name, "code": code, "seconds": round(time.perf_counter() - start, 1), "broke": broke,
            "said": [] if found else said.splitlines()[-8:], **found}  # fmt: skip


def table(results: list[dict[str, Any]], words: tuple[str, ...]) -> str:
    """Markdown, a row an aim."""
    *heads, yes, no = words
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for result in results:
        for aim in result.get("aims", []):
            cells = (f"`{result['name']}`", aim["name"], _text(aim["peer"]), _text(aim["ours"]), aim["unit"],
                     aim["aim"], yes if aim["holds"] else no, _how(result))  # fmt: skip
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _how(result: dict[str, Any]) -> str:
    """The day, and the time a side had; CPU where it is processor time on one core."""
    kind = " CPU" if result.get("processor_time") else ""
    return f"{result['machine']['date']}, {result['minutes']:g} min{kind}"


def keep(result: dict[str, Any]) -> None:
    """What the table needs of a benchmark's figures, into `FIGURES`."""
    FIGURES.mkdir(exist_ok=True)
    kept = {key: result[key] for key in ("name", "machine", "minutes", "processor_time", "aims") if key in result}
    path = FIGURES / f"{result['name'].replace(':--part=', '-').replace('--', '').replace(' ', '-')}.json"
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", "utf-8")


def kept() -> list[dict[str, Any]]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(FIGURES.glob("*.json"))]


def write_docs(folder: Path, results: list[dict[str, Any]]) -> None:
    """Put the table between the marks of both documents; the machines above it."""
    said = [", ".join(f"{k} {' '.join(v) if isinstance(v, list) else v}" for k, v in one["machine"].items()
                      if k != "date") for one in results]  # fmt: skip
    where = "\n".join(f"- {text}" for text in dict.fromkeys(said))
    for name, words in DOCS.items():
        path = folder / name
        text = path.read_text("utf-8")
        before, _, rest = text.partition(MARKS[0])
        _, _, behind = rest.partition(MARKS[1])
        path.write_text(f"{before}{MARKS[0]}\n\n{where}\n\n{table(results, words)}\n\n{MARKS[1]}{behind}", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--smoke", action="store_true", help="the short form: under three minutes, no times asserted")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="time budget of each; default: its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--keep", action="store_true", help="lay the figures in benchmarks/figures")
    parser.add_argument("--docs", action="store_true", help="write what is kept into docs/benchmarks.md and .zh.md")
    parser.add_argument("--list", action="store_true", help="only say which there are")
    args = parser.parse_args()
    if args.docs and not (args.names or args.smoke or args.keep):
        write_docs(HERE.parent / "docs", kept())
        return 0
    wanted = args.names or (list(SMOKE) if args.smoke else names())
    known = {name.partition(":")[0] for name in names()}
    if unknown := [name for name in wanted if name.partition(":")[0] not in known]:
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    if args.list:
        print("\n".join(wanted))
        return 0
    budget = SMOKE_MINUTES if args.smoke else args.budget
    options = [] if budget is None else ["--minutes", str(budget)]
    results, start = [], time.perf_counter()
    for name in wanted:
        left = SMOKE_LIMIT - (time.perf_counter() - start) if args.smoke else None
        if left is not None and left < 5:
            results.append({"name": name, "code": 124, "seconds": 0.0, "broke": False, "said": ["no time left"]})
            continue
        results.append(run(name, options, left))
        done = results[-1]
        state = "broke" if done["broke"] else "ran" if "aims" in done else (
            "cut off" if done["code"] == 124 else "left out")  # fmt: skip
        if args.keep and "aims" in done:
            keep(done)
        held = f", {sum(a['holds'] for a in done['aims'])} of {len(done['aims'])} aims hold" if "aims" in done else ""
        print(f"{name}: {state} in {done['seconds']:.0f} s{held}", flush=True)
        for line in done["said"]:
            print(f"    {line}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "benchmarks": results}, indent=1, ensure_ascii=False))
    if args.docs:
        write_docs(HERE.parent / "docs", kept())
    print("\n" + table(results, DOCS["benchmarks.md"]))
    broken = [result["name"] for result in results if result["broke"]]
    if args.smoke or broken:
        return 1 if broken else 0
    return 0 if all(result["code"] == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
