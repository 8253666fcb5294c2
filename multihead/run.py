"""The run folder: what passes from one step to the next, written so that a power cut costs nothing.

Every write is a temporary file in the same folder, fsync, rename, fsync of the folder: a reader sees the old content or
the new, never half of one. One process at a time holds the folder's lock; the kernel gives it back when that process
dies, however it dies.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from .errors import UserError, nearest, tr

WEIGHTS = "model.safetensors"
RECIPE = "recipe.yaml"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


def size_text(count: float) -> str:
    """`count` bytes for a person: ``"1.5 GB"`` (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def free_space(path: Path) -> int:
    """Bytes a user may still write on the disk that holds `path`, which need not exist yet."""
    there = Path(path).absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


@contextmanager
def writing(path: Path, what: str = "", kept: str = "") -> Iterator[None]:
    """Turns a full disk or a denied write inside the block into a UserError.

    `what` names what was being written (default: the file's name); `kept` says what is still whole, for a full disk.
    """
    try:
        yield
    except OSError as error:
        what = what or path.name
        if error.errno in _FULL:
            left = size_text(free_space(path.parent))
            raise UserError(tr(
                f"no space left on the disk while writing {what} ({error.strerror}); {left} free there. {kept} "
                "Free some space, or choose another folder with --run, and run the same command again.",
                f"写入 {what} 时磁盘已满（{error.strerror}），该磁盘剩余 {left}。{kept}"
                "请腾出空间，或用 --run 换一个文件夹，然后再运行同一条命令。"), where=str(path)) from error
        if error.errno in _DENIED:
            raise UserError(tr(
                f"not allowed to write {what} ({error.strerror}); choose a folder you own with --run.",
                f"没有权限写入 {what}（{error.strerror}），请用 --run 选择自己有权限的文件夹。"),
                where=str(path)) from error
        raise


def fsync_folder(path: Path) -> None:
    """Makes the names inside `path` durable. Windows keeps no handle on folders and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """The name beside `path` under which its next content is written."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}")


@contextmanager
def replacing(path: Path, what: str = "", kept: str = "") -> Iterator[Path]:
    """Gives a temporary path to write; when the block ends well it becomes `path`, durably, else it is removed.

    Raises UserError where the disk is full (the earlier `path`, if any, is whole) or the write is not allowed.
    """
    part = temporary(path)
    if not kept and path.exists():
        kept = tr(f"The earlier {path.name} is whole.", f"原来的 {path.name} 完好无损。")
    with writing(path, what, kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield part
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            fsync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes `data` (str as UTF-8) to `path`, durably, all or nothing. Makes the parent folder."""
    with replacing(Path(path)) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: object) -> None:
    """Writes `value` as indented JSON, durably, all or nothing; Chinese stays readable."""
    write_atomic(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hexadecimal, read in pieces."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _try_lock(handle: int) -> bool:
    """An exclusive lock that the kernel releases when the process ends, or False where another holds it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the PID, so that others can still read it
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _same(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file: who held the lock may have removed it with the whole folder."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False


class RunFolder:
    """The folder of one run: ``recipe.yaml codec/ data/ checkpoints/ model.safetensors log.jsonl ...``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.made: list[Path] = []
        """Folders that ``create`` had to make, the deepest first."""

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Makes the folder, or takes an empty one or an earlier run. UserError where something else is there."""
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise UserError(tr("is a file; a run needs a folder of its own: choose another with --run.",
                               "是一个文件；训练需要一个单独的文件夹，请用 --run 另选。"), where=str(path))
        if folder.path.is_dir() and not folder.exists():
            foreign = sorted(p.name for p in folder.path.iterdir() if not p.name.startswith("."))
            if foreign:
                raise UserError(tr(
                    f"holds other files ({', '.join(foreign[:3])}) and no {RECIPE}; nothing is written among them. "
                    "Choose an empty or a new folder with --run.",
                    f"里面有其他文件（{'、'.join(foreign[:3])}）而没有 {RECIPE}，不会往里写任何东西。"
                    "请用 --run 选择空的或新的文件夹。"), where=str(path))
        with writing(folder.path, tr("the run folder", "训练文件夹")):
            folder.made = [p for p in (folder.path, *folder.path.parents) if not p.exists()]
            folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run. UserError where there is none."""
        folder = cls(path)
        if folder.exists():
            return folder
        if not folder.path.exists():
            parent = folder.path.absolute().parent
            names = [p.name for p in parent.iterdir() if (p / RECIPE).is_file()] if parent.is_dir() else []
            near = nearest(folder.path.name, names)
            raise UserError(tr(
                f"no such run folder{near}. `multihead train RECIPE --run {path}` makes one.",
                f"没有这个训练文件夹{near}。可用 `multihead train RECIPE --run {path}` 创建。"), where=str(path))
        raise UserError(tr(
            f"is not a run folder (no {RECIPE} inside). Name one that `multihead train` made, such as runs/reviews.",
            f"不是训练文件夹（里面没有 {RECIPE}）。请给出 `multihead train` 生成的文件夹，例如 runs/reviews。"),
            where=str(path))

    def exists(self) -> bool:
        """Whether a run lives here: its recipe is saved first and never removed."""
        return (self.path / RECIPE).is_file()

    def file(self, name: str) -> Path:
        return self.path / name

    def weights(self) -> Path:
        """The trained weights. UserError where training has not ended yet."""
        path = self.file(WEIGHTS)
        if not path.is_file():
            command = f"multihead train {self.file(RECIPE)} --run {self.path}"
            raise UserError(tr(f"has no trained weights yet ({WEIGHTS}). Finish training: `{command}`.",
                               f"还没有训练好的权重（{WEIGHTS}）。请先完成训练：`{command}`。"), where=str(self.path))
        return path

    def write_atomic(self, name: str, data: bytes | str) -> None:
        write_atomic(self.file(name), data)

    def write_json(self, name: str, value: object) -> None:
        write_json(self.file(name), value)

    def read_json(self, name: str) -> object:
        """The content of a JSON file of the run. UserError where it is missing or broken."""
        path = self.file(name)
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(tr("no such file in the run; run the earlier step again.",
                               "训练文件夹中没有这个文件，请重新运行前一步。"), where=str(path)) from None
        except ValueError as error:
            raise UserError(tr(f"is damaged ({error}); delete it and run the earlier step again.",
                               f"已损坏（{error}），请删除后重新运行前一步。"), where=str(path)) from None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the folder for this process; clears what killed ones left behind. UserError names the holder's PID."""
        path = self.file(".lock")
        with writing(path, tr("the lock", "锁文件")):
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        try:
            if not _try_lock(handle) or not _same(handle, path):
                os.lseek(handle, 0, os.SEEK_SET)
                holder = os.read(handle, 32).decode("ascii", "replace").strip() or "?"
                raise UserError(tr(
                    f"another process (PID {holder}) is working in this run folder. Wait for it, stop it, or choose "
                    "another folder with --run.",
                    f"另一个进程（PID {holder}）正在使用这个训练文件夹。请等它结束、停止它，或用 --run 换一个文件夹。"),
                    where=str(self.path))
            with writing(path, tr("the lock", "锁文件")):
                os.ftruncate(handle, 0)
                os.lseek(handle, 0, os.SEEK_SET)
                os.write(handle, f"{os.getpid()}\n".encode())
            self.clean()
            yield
        finally:
            os.close(handle)  # the file stays: removing it would let two processes lock two files of one name

    def discard(self) -> None:
        """Takes back what ``create`` and ``lock`` did for a run that never began. Call it under the lock."""
        with contextlib.suppress(OSError):
            self.file(".lock").unlink()
        for path in self.made:
            if path == self.path:
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.rmdir()

    def empty(self, keep: Iterable[str] = ()) -> None:
        """Removes everything of the run but the names in `keep`. Call it under the lock, whose file stays."""
        for path in sorted(self.path.iterdir(), key=lambda p: p.name != RECIPE):  # the recipe first: no recipe, no run
            if path.name == ".lock" or path.name in keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def clean(self) -> list[str]:
        """Removes temporary files and folders of processes that are gone; gives their names. Call it under the lock."""
        gone = []
        for folder in (self.path, self.file("checkpoints"), self.file("data"), self.file("codec")):
            for path in sorted(folder.glob("*.tmp-*")) if folder.is_dir() else ():
                owner = path.name.rpartition(".tmp-")[2].partition("-")[0]
                if owner.isdigit() and int(owner) != os.getpid() and _alive(int(owner)):
                    continue
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
                gone.append(path.name)
        return gone
