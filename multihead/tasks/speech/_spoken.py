"""What is told of synthesised speech: what cannot be learned from, what the data holds, pictures and players, and what
a recogniser hears.

Legend: T frames, S tokens, M mel bands.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from multihead import recipe as recipes
from multihead.codec.audio import RATE
from multihead.codec.transcript import plain, words
from multihead.codec.voice import HOP, encoded
from multihead.data.audio import to_uri
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.metrics.speech import ErrorRates, jiwer
from multihead.run import RECIPE, RunFolder
from multihead.runtime import checkpoint
from multihead.task import Answer, find
from multihead.tasks.speech._alignment import likelihood

SLOW = 1.0  # tokens a second below which a text hardly belongs to its recording
NAMED = 20
_COLOURS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], float)


def mean_where(x_BT: Tensor, real_BT: Tensor) -> Tensor:
    """The mean of each row over its real places: (B,)."""
    return (x_BT * real_BT).sum(1) / real_BT.sum(1)


def refuse_unfit(ids: np.ndarray, frames: int, longest: float) -> None:
    """UserError where a recording and its text cannot be learned from."""
    seconds = frames * HOP / RATE
    if seconds > longest:
        raise UserError(tr(f"the recording is {seconds:.1f} s long, more than options.max_seconds ({longest:g}): cut "
                           "it, or raise the option",
                           f"录音长 {seconds:.1f} 秒，超过 options.max_seconds（{longest:g}）：请剪短，或调大该选项"))
    if len(ids) > frames:
        raise UserError(tr(f"the text has {len(ids)} tokens, too many for {seconds:.2f} s (80 a second at most): it "
                           "hardly belongs to this recording",
                           f"文本有 {len(ids)} 个词元，{seconds:.2f} 秒的录音容纳不下（每秒至多 80 个）："
                           "它多半不属于这段录音"))


def described(store: Store, voices: Sequence[str]) -> dict[str, Any]:
    """Hours, voices, and texts that do not fit their recordings: counts under ``issues``, places under
    ``issue_examples``."""
    frames, tokens = store.lengths("mel"), store.lengths("ids")
    speed = tokens / (frames * HOP / RATE)
    slow = np.flatnonzero(speed < SLOW)
    report: dict[str, Any] = {"hours": round(int(frames.sum()) * HOP / RATE / 3600, 4),
                              "tokens_per_second": round(float(tokens.sum() / (frames.sum() * HOP / RATE)), 2)}
    if len(voices) > 1:
        counts = np.bincount(np.asarray(store.stream("voice")).ravel(), minlength=len(voices))
        report["voices"] = dict(zip(voices, counts.tolist(), strict=True))
    if len(slow):
        report["issues"] = {"text_too_short": len(slow)}
        report["issue_examples"] = {"text_too_short": [store.where(int(i)) for i in slow[:NAMED]]}
    return report


# -- pictures ----------------------------------------------------------------------------------------------------------


def png(rgb_HWC: np.ndarray) -> str:
    """uint8 (H, W, 3) as a PNG's data URI (RFC 2083, one chunk of each kind)."""
    height, width, _ = rgb_HWC.shape
    lines = np.concatenate((np.zeros((height, 1), np.uint8), rgb_HWC.reshape(height, -1)), axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    raw = (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9))
           + chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(raw).decode()


def heat(x_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as colours from dark to bright: uint8 (H, W, 3)."""
    at = np.clip((x_HW - low) / max(high - low, 1e-9), 0, 1) * (len(_COLOURS) - 1)
    return np.stack([np.interp(at, np.arange(len(_COLOURS)), c) for c in _COLOURS.T], axis=-1).astype(np.uint8)


def shown(task: Any, said: Any, durations_S: np.ndarray, real_TM: np.ndarray, made_TM: np.ndarray) -> dict[str, str]:
    """Pictures of a real and a synthesised recording and of how the text lies on the real one."""
    real, made = task.codec.log_mel(real_TM), task.codec.log_mel(made_TM)
    low, high = float(real.min()), float(real.max())
    score_ST = likelihood(said.mean.float(), torch.from_numpy(real_TM)[None].to(said.mean.device))[0].cpu().numpy()
    score_ST = score_ST - score_ST.max(0)
    path = heat(np.exp(score_ST / 20)[::-1], 0, 1)
    ends = np.cumsum(durations_S)
    for s, (start, end) in enumerate(zip(ends - durations_S, ends, strict=True)):
        path[len(durations_S) - 1 - s, start:end] = (255, 80, 80)
    return {"real": png(heat(real.T[::-1], low, high)), "made": png(heat(made.T[::-1], low, high)),
            "alignment": png(np.repeat(path, max(1, 80 // len(path)), axis=0))}


def figures(answers: Sequence[Answer], rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, Any]:
    """What the report shows of synthesised speech."""
    held = []
    for answer, row, text in zip(answers, rows, texts, strict=True):
        if "audio" not in answer:
            continue
        sounds = [answer["audio"]] + ([row["audio"]] if row.get("audio") else [])
        heard = f" → {answer['heard']}" if "heard" in answer else ""
        held.append({"name": f"{text}{heard} · {answer['mcd']:.2f} dB", "sounds": sounds,
                     "pictures": [answer["made"], answer["real"], answer["alignment"]]})
    if not held:
        return {}
    return {"galleries": [{
        "title": ("What it says", "它说出来的"),
        "note": ("Held-out texts: the synthesised recording and spectrogram, then the real ones, then which frames of "
                 "the real recording (across) each token (upwards) was found in. None was picked.",
                 "留出文本：先是合成的录音与频谱，再是真实的，最后是每个词元（纵轴，自下而上）对应真实录音的哪些帧（横轴）。"
                 "未经挑选。"),
        "rows": held,
    }]}  # fmt: skip


# -- a recogniser ------------------------------------------------------------------------------------------------------


class Recognised:
    """A trained run that writes down recordings.

    Raises:
        UserError: no such run, or one of another task.
    """

    def __init__(self, path: str) -> None:
        jiwer()
        folder = RunFolder.open(path)
        recipe = recipes.load(folder.file(RECIPE), find=find, settled=True)
        if recipe.task != "speech-recognition":
            raise UserError(tr(f"options.recogniser is a run of {recipe.task}; it must be one of speech-recognition",
                               f"options.recogniser 是 {recipe.task} 的训练结果；应为 speech-recognition 的"), path)
        self.task = find(recipe.task, folder.path)(recipe.options, seed=recipe.seed)
        self.task.load(folder.file("codec"))
        self.model: Any = self.task.model(recipe.model)
        weights = folder.weights()
        checkpoint.load_model(self.model, checkpoint.load_weights(weights), str(weights))
        self.model.eval()

    @torch.no_grad()
    def text(self, samples: np.ndarray) -> str:
        """What it hears in (N,) int16 at 16 kHz."""
        example = self.task.encode({"audio": to_uri(encoded(samples))[0]})
        return str(self.task.predict(self.model, self.task.collate([example]), {})[0]["text"])

    def scores(self, heard: Sequence[str], said: Sequence[str], weights: np.ndarray | None) -> dict[str, Any]:
        """``heard_wer`` and ``heard_cer``: its errors, words and characters, against the texts."""
        written = self.task.text_of if hasattr(self.task, "text_of") else (lambda row: row["text"])
        options = self.task.options.model_copy(update={"suffix": None})
        self.task.options = options
        rates = ErrorRates([plain(one) for one in heard], [plain(written({"text": one})) for one in said], words)
        found = rates.scores(weights)
        return {"heard_wer": found["wer"], "heard_cer": found["cer"]}
