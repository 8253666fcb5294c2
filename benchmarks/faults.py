"""What a run survives: kill -9, broken checkpoints, a full disk, SIGTERM.

After each, the same command must end with the same bits as a run that nothing ever stopped.

    python benchmarks/faults.py --kills 200
    python benchmarks/faults.py --kills 20 --fresh      # a new process and a new import for every attempt

Trains a small language model on generated text (float32, one thread). Half of the kills fall at a random moment of the
run, from the first row read to the last weight written; the other half are aimed inside a save: the killer waits until
the temporary folder of a checkpoint appears, and counts the kill as inside only where that folder is still there when
the process is dead. Each attempt is a child forked from a parent that has imported the package and nothing more, which
then runs the command line's own `main`; with --fresh it is a process of its own.
"""

from __future__ import annotations

import os

os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", MULTIHEAD_LANG="en")

import itertools
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import multihead.cli
import multihead.tasks.language.text_generation
import multihead.train
from multihead.runtime import checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from _common import Aim, arguments, finish

RECIPE = """
task: text-generation
name: faults
data: {train: text.txt}
options: {tokenizer: char, context: 32}
model: {d_model: 16, num_layers: 1, num_heads: 2, max_length: 32, dropout: 0.1}
train:
  steps: 90
  batch_size: 8
  optimizer: muon
  ema: 0.95
  save_every: 3
  eval_every: 30
  log_every: 1
  precision: float32
  threads: 1
"""


def write_data(folder: Path) -> None:
    """A recipe and 20,000 characters of text made of a few hundred words that never were."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abcdefgh天地人山水") for _ in range(draw.randint(1, 6))) for _ in range(300)]
    lines = [" ".join(draw.choice(words) for _ in range(10)) for _ in range(420)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")


@dataclass
class Machine:
    """Starts attempts: each is the command `multihead train recipe.yaml --run RUN`, in a child."""

    folder: Path
    fresh: bool = False

    def start(self, run: Path, limit: int | None = None) -> int:
        """The PID of a new attempt; what it prints is appended to ``RUN.out``. `limit`: largest file in bytes."""
        command = ["train", str(self.folder / "recipe.yaml"), "--run", str(run)]
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(f"{self.folder / run.name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(out, 1)
            os.dup2(out, 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if self.fresh:
                os.execv(sys.executable, [sys.executable, "-m", "multihead", *command])
            sys.argv = ["multihead", *command]
            multihead.cli.main(command)
            code = 0
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, run: Path, limit: int | None = None) -> tuple[int, str]:
        """An attempt nobody disturbs: its exit status and all that RUN's attempts printed since the last look."""
        status = os.waitpid(self.start(run, limit), 0)[1]
        return os.waitstatus_to_exitcode(status), self.said(run)

    def said(self, run: Path) -> str:
        path = self.folder / f"{run.name}.out"
        text = path.read_text("utf-8", errors="replace") if path.exists() else ""
        path.unlink(missing_ok=True)
        return text


def outcome(run: Path) -> str:
    """One hash of all a finished run leaves in numbers: the weights kept, and the last checkpoint's three groups."""
    last, _ = checkpoint.latest(run)
    if last is None:
        return "no checkpoint"
    groups = [checkpoint.tensors_hash(last.tensors(group)) for group in sorted(last.groups)]
    weights = checkpoint.tensors_hash(checkpoint.load_weights(run / "model.safetensors"))
    return " ".join([str(last.step), weights, *groups])


# ---- kill -9 -------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    made: int = 0
    inside: int = 0
    resumed: int = 0
    runs: int = 0
    equal: int = 0
    places: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def saving(run: Path) -> bool:
    """Whether a checkpoint's temporary folder is there."""
    try:
        return any(".tmp-" in name for name in os.listdir(run / "checkpoints"))
    except FileNotFoundError:
        return False


def place(run: Path) -> str:
    """Where in the run a dead process stood, by what it left."""
    if saving(run):
        return "inside a checkpoint"
    if any(".tmp-" in path.name for path in run.rglob("*")):
        return "inside another write"
    if not (run / "data" / "report.json").exists():
        return "in prepare"
    return "in training" if (run / "log.jsonl").exists() else "before the first step"


def ended(pid: int) -> int | None:
    """The exit status of a child that has ended, else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def strike(pid: int, run: Path, draw: random.Random, whole: float, save: float) -> int | None:
    """Kills the attempt at a moment of chance; its exit status where it ended by itself before that, else None."""
    start = time.perf_counter()
    aimed = draw.random() < 0.5
    moment = start + whole * draw.random() ** 2  # squared: more early ones, so that a run is killed several times
    delay = draw.random() * save if aimed else 0.0
    while time.perf_counter() < moment or (aimed and not saving(run)):
        if (code := ended(pid)) is not None:
            return code
        time.sleep(0.0001 if aimed else 0.001)
        if time.perf_counter() >= moment and aimed and saving(run):
            time.sleep(delay)
            delay /= 2  # where the save was over by then, the next one is hit earlier
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if code == -signal.SIGKILL else code


def kill_runs(machine: Machine, count: int, expected: str, whole: float, save: float, end: float) -> Kills:
    """Runs that are killed until they are done, until `count` kills are made or the time is over."""
    kills, draw = Kills(), random.Random(1)
    while kills.made < count and time.monotonic() < end:
        run = machine.folder / f"run-{kills.runs}"
        pending, code = 0, None
        while code is None:
            if kills.made + pending >= count or time.monotonic() > end:
                code = machine.finish(run)[0]
                break
            code = strike(machine.start(run), run, draw, whole, save)
            if code is None:
                pending += 1
                where = place(run)
                kills.inside += where == "inside a checkpoint"
                kills.places[where] = kills.places.get(where, 0) + 1
        kills.runs += 1
        kills.made += pending
        text = machine.said(run)
        if code == 0 and outcome(run) == expected:
            kills.equal += 1
            kills.resumed += pending
            shutil.rmtree(run)
        else:
            kills.faults.append(f"{run.name}: exit {code}, {text[-2000:]}")
        if kills.runs % 10 == 0:
            print(f"{kills.made} kills, {kills.inside} in a save, {kills.equal} of {kills.runs} runs equal", flush=True)
    return kills


# ---- broken checkpoints --------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 5] ^= 8
    path.write_bytes(content)


BREAK: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


def half_way(machine: Machine, name: str) -> Path:
    """A run killed between the first and the last step, with two whole checkpoints."""
    run = machine.folder / name
    for _ in range(50):
        pid = machine.start(run)
        while (code := ended(pid)) is None and len(list(run.glob("checkpoints/step-????????"))) < 2:
            time.sleep(0.001)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            machine.said(run)
            newest, messages = checkpoint.latest(run)
            if newest is not None and not messages and len(list(run.glob("checkpoints/step-????????"))) == 2:
                return run
        shutil.rmtree(run)
    raise SystemExit("could not stop a run half-way")


def break_files(machine: Machine, expected: str, cases: Sequence[tuple[str, str]]) -> list[str]:
    """What went wrong with checkpoints damaged by (fault, file): each must be named, skipped, and cost no bit."""
    source, faults = half_way(machine, "half"), []
    for number, (fault, name) in enumerate(cases):
        run = machine.folder / f"broken-{number}"
        shutil.copytree(source, run)
        newest = sorted(run.glob("checkpoints/step-????????"))[-1]
        BREAK[fault](newest / name)
        before, _ = checkpoint.latest(run)
        code, text = machine.finish(run)
        flat = "".join(text.split())
        if before is None or before.step >= int(newest.name[5:]) or f"resumedatstep{before.step}" not in flat:
            faults.append(f"{fault} {name}: the one before was not used: {text[-500:]}")
        elif newest.name not in flat or name not in flat:
            faults.append(f"{fault} {name}: not said: {text[-500:]}")
        elif code != 0 or outcome(run) != expected:
            faults.append(f"{fault} {name}: exit {code}, ended otherwise: {text[-500:]}")
        shutil.rmtree(run)
    shutil.rmtree(source)
    return faults


# ---- full disk -----------------------------------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of `size` bytes in memory at `folder`; yields whether this user may make one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def fill_disk(machine: Machine, expected: str) -> tuple[str, list[str]]:
    """The way the disk was made full, and what went wrong."""
    source = half_way(machine, "half")
    newest, _ = checkpoint.latest(source)
    assert newest is not None
    largest = max(path.stat().st_size for path in newest.path.iterdir())
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    with small_disk(machine.folder / "disk", 4 * size + (1 << 20)) as small:
        run = machine.folder / "disk" / "run" if small else machine.folder / "limited"
        shutil.copytree(source, run)
        shutil.rmtree(source)
        filler = run.parent / "filler"
        if small:
            left = shutil.disk_usage(run).free - largest
            filler.write_bytes(bytes(max(0, left)))
        code, text = machine.finish(run, None if small else largest - 1)
        faults = check_full(run, newest, code, text)
        filler.unlink(missing_ok=True)
        code, text = machine.finish(run)
        if code != 0 or outcome(run) != expected:
            faults.append(f"after space was made: exit {code}, or ended otherwise: {text[-500:]}")
        shutil.rmtree(run)
    way = f"tmpfs of {4 * size + (1 << 20)} bytes" if small else "largest file limited (not allowed to mount a tmpfs)"
    return way, faults


def check_full(run: Path, before: checkpoint.Checkpoint, code: int, text: str) -> list[str]:
    faults = []
    if code != 2 or "Traceback" in text:
        faults.append(f"full disk: exit {code}, {text[-500:]}")
    flat = " ".join(text.split())
    if "no space left on the disk while writing" not in flat or "is whole" not in flat or " free there" not in flat:
        faults.append(f"full disk: not said: {text[-500:]}")
    after, messages = checkpoint.latest(run)
    if after is None or messages or after.step < before.step:
        faults.append(f"full disk: the earlier checkpoint is not whole: {messages}")
    if any(".tmp-" in path.name for path in run.rglob("*")):
        faults.append("full disk: a temporary file was left behind")
    return faults


# ---- SIGTERM and SIGINT --------------------------------------------------------------------------------------------


def steps_saved(run: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-????????")), default=0)


def terminate(machine: Machine, expected: str, count: int) -> tuple[float, list[str]]:
    """The longest time from a signal to the end of the process, and what went wrong."""
    draw, longest, faults = random.Random(2), 0.0, []
    for number in range(count):
        run = machine.folder / f"signal-{number}"
        kind = (signal.SIGTERM, signal.SIGINT)[number % 2]
        pid = machine.start(run)
        moment = draw.randrange(3, 80)
        while steps_saved(run) < moment:
            time.sleep(0.001)
        start = time.perf_counter()
        os.kill(pid, kind)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        longest = max(longest, time.perf_counter() - start)
        text = machine.said(run)
        over = "\ntrained " in text  # the signal came when all was done and Python was putting itself away
        if not over and (code != 128 + kind or "To go on:" not in text):
            faults.append(f"{kind.name}: exit {code}, or no command to go on: {text[-500:]}")
        if machine.finish(run)[0] != 0 or outcome(run) != expected:
            faults.append(f"{kind.name}: ended otherwise after resuming")
        shutil.rmtree(run)
    return longest, faults


# ---- all of it -----------------------------------------------------------------------------------------------------


def reference(machine: Machine) -> tuple[str, float, float]:
    """An uninterrupted run: its outcome, its seconds, and the median seconds of one of its saves."""
    run, start, saves, since = machine.folder / "whole", time.perf_counter(), [], None
    pid = machine.start(run)
    while (code := ended(pid)) is None:
        if saving(run) and since is None:
            since = time.perf_counter()
        elif since is not None and not saving(run):
            saves.append(time.perf_counter() - since)
            since = None
        time.sleep(0.0001)
    seconds, text = time.perf_counter() - start, machine.said(run)
    if code != 0:
        raise SystemExit(f"the uninterrupted run failed with exit status {code}:\n{text}")
    found = outcome(run)
    again = machine.folder / "again"
    if machine.finish(again)[0] != 0 or outcome(again) != found:
        raise SystemExit("two uninterrupted runs differ")
    return found, seconds, statistics.median(saves) if saves else 0.01


def main() -> int:
    args = arguments(__doc__, minutes=20, extra=[
        ("--kills", {"type": int, "default": 200, "metavar": "N", "help": "kills to make; default 200"}),
        ("--fresh", {"action": "store_true", "help": "a new Python process for every attempt"}),
        ("--keep", {"type": Path, "metavar": "DIR", "help": "work there and leave it, to look at what went wrong"}),
    ])  # fmt: skip
    end = time.monotonic() + 60 * args.minutes
    if args.keep:
        args.keep.mkdir(parents=True)
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder).resolve(), args.fresh)
        write_data(machine.folder)
        expected, whole, save = reference(machine)
        print(f"uninterrupted: {whole:.2f} s, a save {1000 * save:.1f} ms, {expected}", flush=True)
        short = args.kills < 50
        files = ("model.safetensors", "optimizer.safetensors", "manifest.json", "state.json", "ema.safetensors")
        cases = list(zip(BREAK, files, strict=False)) if short else list(itertools.product(BREAK, files))
        broken_faults = break_files(machine, expected, cases)
        way, disk_faults = fill_disk(machine, expected)
        longest, signal_faults = terminate(machine, expected, 2 if short else 10)
        kills = kill_runs(machine, args.kills, expected, whole, save, end)
    for fault in [*kills.faults, *broken_faults, *disk_faults, *signal_faults]:
        print(f"FAULT {fault}", flush=True)
    asked = args.kills if args.full else kills.made
    if kills.made < args.kills:
        print(f"Out of time after {kills.made} of {args.kills} kills.", flush=True)
    print(f"killed: {kills.places}; disk: {way}")
    all_kills = kills.resumed == kills.made and not kills.faults and 0 < asked <= kills.made
    resumed, found = f"{kills.resumed}/{kills.made}", f"{len(cases) - len(broken_faults)}/{len(cases)}"
    aims = [
        Aim("kill -9: resumed, equal weights", None, resumed, "kills", f"{asked}/{asked}", all_kills),
        Aim("of them inside a save", None, kills.inside, "kills", f"≥ {asked // 4}", kills.inside >= asked // 4),
        Aim("their runs ended with equal bits", None, f"{kills.equal}/{kills.runs}", "runs", "all", not kills.faults),
        Aim("broken checkpoint: named, one before used", None, found, "files", "all", not broken_faults),
        Aim("full disk: said, earlier one whole", None, "no" if disk_faults else "yes", "", "yes", not disk_faults),
        Aim("SIGTERM, SIGINT: saved, exit", None, longest, "s", "≤ 10", longest <= 10 and not signal_faults),
    ]  # fmt: skip
    return finish(args, aims, {"kills": kills.__dict__, "disk": way, "seconds_whole": whole, "seconds_save": save})


if __name__ == "__main__":
    raise SystemExit(main())
