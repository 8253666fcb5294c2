"""What the names of folders say of the files in them: their labels, or the parts of the data (train, val, test)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from multihead.data.archives import is_archive, members
from multihead.data.files import Source, read_head
from multihead.errors import UserError, tr

PARTS = {"train": "train", "training": "train", "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
         "test": "test", "testing": "test", "eval": "test"}
"""What folders of parts are called, and a recipe's word for each."""
_TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def labels_of(names: Sequence[str]) -> list[str | None]:
    """The label of each file: the first folder of its path in which the paths differ; where all lie in one folder, that
    one's name, unless it is that of a part; None for files above the folders of the others."""
    folders = [PurePosixPath(name.replace(os.sep, "/")).parts[:-1] for name in names]
    first, last = min(folders, default=()), max(folders, default=())
    common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    if all(len(parts) == common for parts in folders) and first[-1:] and first[-1].casefold() not in PARTS:
        common -= 1
    return [parts[common] if len(parts) > common else None for parts in folders]


def shared(names: Sequence[str]) -> str:
    """What messages call several files: the folder they share, else the first of them."""
    try:  # what the first and the last in order share, all share
        return (os.path.commonpath((min(names), max(names))) if len(names) > 1 else "") or names[0]
    except ValueError:  # relative and absolute ones
        return names[0]


def parts_of(item: str, base: Path | str = ".") -> dict[str, str]:
    """The folders train, val and test of a folder or of a zip or tar archive, by what a recipe calls them; {} where it
    has no two of them, or folders of classes or a table beside them.

    Args:
        item: as a person names it. A folder in an archive is called ``photos.zip/train``.
        base: where relative paths start from.

    Raises:
        UserError: an archive that cannot be read.
    """
    path = Path(base) / os.path.expanduser(item)
    try:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            return _named(item, [p.name for p in inside if p.is_dir()], [p.name for p in inside if not p.is_dir()])
        source = Source(path, item)
        if not path.is_file() or not is_archive(read_head(source, 512)[0]):
            return {}
    except (OSError, ValueError):  # what is wrong is told where it is opened
        return {}
    names = [member.name for member in members(source)]
    while True:
        folders = list(dict.fromkeys(name.split("/")[0] for name in names if "/" in name))
        found = _named(item, folders, [name for name in names if "/" not in name])
        if found or len(folders) != 1:
            return found
        item = f"{item}/{folders[0]}"  # all lies in one folder: look into it
        names = [name.partition("/")[2] for name in names if "/" in name]


def _named(item: str, folders: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    called = sorted((name for name in folders if name.casefold() in PARTS),
                    key=lambda name: ("train", "valid", "test").index(PARTS[name.casefold()]))
    found = {PARTS[name.casefold()]: f"{item}/{name}" for name in called}
    alone = len(found) == len(folders) > 1 and "train" in found
    return found if alone and not any(name.lower().endswith(_TABLES) for name in files) else {}


def refuse_splits(labels: Sequence[str | None], where: str) -> None:
    """UserError where the folders are those of parts and not of classes."""
    names = {label for label in labels if label is not None}
    if names and all(name.casefold() in PARTS for name in names) and len(names) > 1:
        shown, first = ", ".join(sorted(names)), max(sorted(names), key=lambda name: PARTS[name.casefold()] == "train")
        raise UserError(tr(f"the folders in here are parts, not classes: {shown}. Name each by itself: data.train: "
                           f"{where}/{first}, data.valid: …, data.test: …",
                           f"这里的文件夹是数据划分而不是类别：{shown}。请分别指定：data.train: {where}/{first}，"
                           f"data.valid、data.test 同理"), where)
