"""Checkpoints and weights: safetensors and JSON only, written so that the newest whole one can always be found.

A checkpoint is a folder ``checkpoints/step-00000100``: one safetensors file per group of tensors, ``state.json``, and
``manifest.json`` with the size and the xxh3-128 hash of each of them, written last. The folder is built under a
temporary name and renamed when everything in it is on the disk; only then are older ones removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import Problem, UserError, tr
from ..run import file_hash, fsync_folder, replacing, write_atomic, writing
from .sharding import fill, is_sharded, whole

Tensors = dict[str, Tensor]
_NAME = re.compile(r"step-(\d+)(\.old)?$")
_HASH = "xxh3_128"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
}  # fmt: skip


# ---- one safetensors file ------------------------------------------------------------------------------------------


def _bytes(tensor: Tensor) -> memoryview:
    """The content of `tensor` in row-major order, without a copy where it lies so in memory already."""
    flat = whole(tensor.detach()).cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def hand_over(*groups: Mapping[str, Tensor], hashed: bool = False) -> None:
    """What the other processes of a crew do while the first one calls `save` (with these groups) or, where `hashed`,
    `save_weights`: lend their rows of each tensor, one after the other, so that nobody ever holds two whole ones."""
    for tensors in groups:
        for name in [*(sorted(tensors) if hashed else ()), *_order(tensors)]:
            whole(tensors[name].detach())


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, str]:
    """Writes one safetensors file (https://github.com/huggingface/safetensors, "Format"), fsynced; (size, xxh3-128).

    Written here and not by the library's `save_file`, for the hash of the very bytes handed to the disk, and for an
    OSError with its number when the disk is full.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = _order(tensors)
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: safetensors has no {tensor.dtype}")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    size = 0
    with open(path, "wb") as file:
        pieces: Iterator[bytes | memoryview] = (_bytes(tensors[name]) for name in order)
        for piece in chain((len(text).to_bytes(8, "little"), text), pieces):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def save_weights(
    path: str | Path, weights: nn.Module | Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a model's (or given) tensors to one safetensors file, durably, all or nothing.

    `metadata` (text to text) is kept in the file's header, beside a hash of all tensors that `load_weights` verifies.
    """
    path = Path(path)
    tensors = model_tensors(weights) if isinstance(weights, nn.Module) else dict(weights)
    with replacing(path, what=tr(f"the weights {path.name}", f"权重 {path.name}")) as part:
        _write_tensors(part, tensors, {**(metadata or {}), _HASH: tensors_hash(tensors)})


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """xxh3-128 over names, types, shapes and contents: equal exactly where two sets of weights are bit-equal."""
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def load_weights(path: str | Path, device: str | torch.device = "cpu") -> Tensors:
    """Reads every tensor of a safetensors file. UserError where it is missing, truncated or altered."""
    path = Path(path)
    if not path.is_file():
        raise UserError(tr("no such weights file.", "没有这个权重文件。"), where=str(path))
    advice = tr("Train again (`multihead train` resumes from the last checkpoint) or copy the file again.",
                "请重新训练（`multihead train` 会从最近的检查点继续），或重新复制该文件。")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            noted = (file.metadata() or {}).get(_HASH)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(tr(f"is not a whole safetensors file ({error}). {advice}",
                           f"不是完整的 safetensors 文件（{error}）。{advice}"), where=str(path)) from None
    if noted is not None and tensors_hash(tensors) != noted:
        raise UserError(tr(f"was altered after it was written (its hash differs). {advice}",
                           f"写入之后内容被改变（校验值不符）。{advice}"), where=str(path))
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text kept in the header of a safetensors file, without reading its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != _HASH}
    except (SafetensorError, OSError) as error:
        raise UserError(tr(f"is not a whole safetensors file ({error}).", f"不是完整的 safetensors 文件（{error}）。"),
                        where=str(path)) from None


# ---- a model's tensors ---------------------------------------------------------------------------------------------


def _same(tensor: Tensor) -> tuple:
    """A key that two tensors share exactly where they are the same memory seen the same way."""
    if is_sharded(tensor):
        return ("sharded", id(tensor))
    if tensor.numel() == 0:
        return ("empty", id(tensor))
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


def aliases(model: nn.Module) -> tuple[Tensors, dict[str, str]]:
    """The model's tensors, each memory once under its first name; and the other names of tied ones."""
    tensors: Tensors = {}
    first: dict[tuple, str] = {}
    alias: dict[str, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: only tensors can be saved, not {type(value).__name__}")
        owner = first.setdefault(_same(value), name)
        if owner == name:
            tensors[name] = value.detach()
        else:
            alias[name] = owner
    return tensors, alias


def model_tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers by name; of tied weights the first name only. Views, not copies."""
    return aliases(model)[0]


def load_model(model: nn.Module, tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Copies `tensors` into the model in place. One UserError lists all that does not fit."""
    own, alias = aliases(model)
    problems = []
    given = dict(tensors)
    for name, owner in alias.items():
        other = given.pop(name, None)
        if other is not None and not torch.equal(given.setdefault(owner, other), other):
            problems.append(tr(f"{name} and {owner} are one weight in this model, but differ in the file",
                               f"{name} 与 {owner} 在该模型中是同一个权重，但文件中两者不同"))
    for name in own.keys() - given.keys():
        problems.append(tr(f"{name} {tuple(own[name].shape)} is missing", f"缺少 {name} {tuple(own[name].shape)}"))
    for name in given.keys() - own.keys():
        problems.append(tr(f"{name} {tuple(given[name].shape)} does not exist in this model",
                           f"该模型中没有 {name} {tuple(given[name].shape)}"))
    for name in own.keys() & given.keys():
        if own[name].shape != given[name].shape:
            here, there = tuple(own[name].shape), tuple(given[name].shape)
            problems.append(tr(f"{name} is {there} in the file, {here} in the model",
                               f"{name} 在文件中是 {there}，在模型中是 {here}"))
    if problems:
        head = tr("these weights belong to another model; check the recipe's `model:` and `options:`.",
                  "这些权重属于另一个模型，请检查配方中的 `model:` 与 `options:`。")
        raise UserError.many([Problem(head, where), *(Problem(p, where) for p in sorted(problems))])
    with torch.no_grad():
        for name, value in own.items():
            fill(value, given[name])


# ---- nested state to flat tensors and back -------------------------------------------------------------------------


def flatten(state: object) -> tuple[Tensors, object]:
    """Splits a nested state (of an optimizer, say) into flat tensors and a JSON-able rest.

    `unflatten` undoes it exactly: dicts (keys of any scalar type), lists, tuples, tensors, None, bool, int, float and
    str come back bit for bit. Raises TypeError for anything else, with its place.
    """
    tensors: Tensors = {}

    def visit(value: object, place: str) -> object:
        if isinstance(value, Tensor):
            while place in tensors:  # the keys 1 and "1" make one place
                place += "'"
            tensors[place] = value
            return {"tensor": place}
        if isinstance(value, dict):
            inner = f"{place}." if place else ""
            return {"dict": [[key, visit(item, f"{inner}{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [visit(item, f"{place}.{index}") for index, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TypeError(f"{place or 'state'}: cannot save a {type(value).__name__}")

    return tensors, visit(state, "")


def unflatten(tensors: Mapping[str, Tensor], rest: object) -> Any:
    """The state that `flatten` was given."""
    if not isinstance(rest, dict):
        return rest
    ((kind, value),) = rest.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(tensors, item) for key, item in value}
    items = [unflatten(tensors, item) for item in value]
    return items if kind == "list" else tuple(items)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its step, the `meta` given to `save`, and its groups of tensors, read when asked for."""

    path: Path
    step: int
    meta: Any
    groups: tuple[str, ...]

    def tensors(self, group: str) -> Tensors:
        """The tensors of one group ("model", "optimizer", ...), on the CPU. KeyError where there is no such group."""
        if group not in self.groups:
            raise KeyError(group)
        return load_weights(self.path / f"{group}.safetensors")


def save(
    folder: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: object, keep: int = 2
) -> Path:
    """Writes ``<folder>/checkpoints/step-<step>`` durably, then removes all but the newest `keep`.

    `folder` is the run folder; `tensors` maps a group's name to its tensors; `meta` is JSON-able. A checkpoint of the
    same step is replaced. Raises UserError where the disk is full: the earlier checkpoints are then untouched.
    """
    parent = Path(folder) / "checkpoints"
    final = parent / f"step-{step:08d}"
    part = parent / f"{final.name}.tmp-{os.getpid()}"
    what = tr(f"the checkpoint of step {step}", f"第 {step} 步的检查点")
    with writing(final, what, _kept(parent)):
        parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        try:
            _fill(part, step, tensors, meta)
            aside = final.with_name(final.name + ".old")
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(final, aside)
            os.rename(part, final)
            fsync_folder(parent)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    _prune(parent, step, max(keep, 1))
    return final


def _kept(parent: Path) -> str:
    """What a full disk leaves whole, in words."""
    steps = [step for step, path in _found(parent) if not _fault(path, hashes=False)]
    if not steps:
        return tr("There is no earlier checkpoint.", "此前没有检查点。")
    return tr(f"The earlier checkpoint of step {steps[0]} is whole.", f"第 {steps[0]} 步的检查点完好无损。")


def _fill(part: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], meta: object) -> None:
    part.mkdir()
    files: dict[str, dict[str, object]] = {}
    for group, values in tensors.items():
        name = f"{group}.safetensors"
        size, digest = _write_tensors(part / name, values, {})
        files[name] = {"size": size, _HASH: digest}
    state = json.dumps({"step": step, "meta": meta}, ensure_ascii=False).encode()
    write_atomic(part / "state.json", state)
    files["state.json"] = {"size": len(state), _HASH: xxhash.xxh3_128_hexdigest(state)}
    manifest = {"step": step, "groups": list(tensors), "files": files}
    manifest[_HASH] = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    write_atomic(part / "manifest.json", json.dumps(manifest, indent=1))
    fsync_folder(part)


def _found(parent: Path) -> list[tuple[int, Path]]:
    """Every checkpoint folder, newest first; one that was being replaced comes after its successor."""
    found = []
    for path in parent.iterdir() if parent.is_dir() else ():
        if match := _NAME.match(path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, verified by its own hash. ValueError where it is broken, OSError where it is missing."""
    manifest = json.loads((path / "manifest.json").read_text("utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("not a manifest")
    noted = manifest.pop(_HASH, None)
    if noted != xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode()):
        raise ValueError("hash differs")
    return manifest


def _fault(path: Path, hashes: bool = True) -> str:
    """Why the checkpoint at `path` is not whole, or an empty string. Without `hashes` only names and sizes count."""
    try:
        manifest = _manifest(path)
    except OSError:
        return tr("manifest.json is missing", "缺少 manifest.json")
    except ValueError as error:
        return tr(f"manifest.json is damaged ({error})", f"manifest.json 已损坏（{error}）")
    for name, noted in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != noted["size"]:
                return tr(f"{name} has {size} bytes instead of {noted['size']}",
                          f"{name} 有 {size} 字节，应为 {noted['size']} 字节")
            if hashes and file_hash(file) != noted[_HASH]:
                return tr(f"the content of {name} was altered (its hash differs)", f"{name} 的内容被改变（校验值不符）")
        except FileNotFoundError:
            return tr(f"{name} is missing", f"缺少 {name}")
        except OSError as error:
            return tr(f"{name} cannot be read ({error.strerror})", f"无法读取 {name}（{error.strerror}）")
    return ""


def latest(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of the run folder, or None; and one message for each broken one that was skipped."""
    skipped: list[str] = []
    for _, path in _found(Path(folder) / "checkpoints"):
        fault = _fault(path)
        if not fault:
            return opened(path), skipped
        skipped.append(tr(f"skipped the broken checkpoint {path}: {fault}", f"跳过损坏的检查点 {path}：{fault}"))
    return None, skipped


def opened(path: Path) -> Checkpoint:
    """A checkpoint that is known to be whole."""
    state = json.loads((path / "state.json").read_text("utf-8"))
    return Checkpoint(path, state["step"], state["meta"], tuple(_manifest(path)["groups"]))


def _prune(parent: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` up to `step`, and broken ones. What cannot be removed stays for next time."""
    whole = 0
    for number, path in _found(parent):
        if not path.name.endswith(".old") and not _fault(path, hashes=False):
            whole += number <= step
            if whole <= keep:
                continue
        # The manifest goes first, so that a half-removed folder can never be taken for a whole one.
        (path / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
