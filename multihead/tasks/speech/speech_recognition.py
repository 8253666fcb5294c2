"""speech-recognition: the text of a recording.

Log-mel frames go through two convolutions into a Transformer that looks both ways; its vectors are read by CTC (Graves
et al. 2006) and by an attention decoder, trained and searched together (Watanabe et al. 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from multihead import task as base
from multihead.codec import activity
from multihead.codec import audio as sound
from multihead.codec.audio import RATE, AudioCodec
from multihead.codec.text import TextCodec
from multihead.codec.transcript import PinyinCodec, plain, syllables, toneless, words
from multihead.data import audio
from multihead.data.columns import changed
from multihead.data.rows import TEXT_NAMES, Column
from multihead.data.store import Store
from multihead.errors import UserError, tr
from multihead.generation.ctc import Reading, best_path, joint_search, prefix_beam
from multihead.metrics.speech import ErrorRates, jiwer
from multihead.task import Answer, Batch, Example, Loss, Task
from multihead.tasks.speech import _report as told
from multihead.tasks.speech import _whisper as whisper
from multihead.tasks.speech._language import COPY, MOST_WEIGHT, Language
from multihead.tasks.speech._language import found as find_language
from multihead.tasks.speech._recogniser import Recogniser, heard, positions_of
from multihead.tasks.speech._whisper import Prompts
from multihead.transformer.config import TransformerConfig
from multihead.transformer.losses import vocabulary_loss
from multihead.transformer.sounds import BandInput, SoundInput

AUDIO_NAMES = ("file", "path", "wav", "recording", "sound", "clip", "filename", "file_name", "audio_path", "audio_file",
               "audio_filepath", "wav_path", "录音", "音频", "文件", "文件名", "路径", "音频路径")
KEPT = 128 << 10  # characters of a recording that is kept as it is beside its encoding
MOST_BEAMS = 64


class SpeechRecognition(Task):
    """Recording → text."""

    field = "speech"
    title = ("write down what is said in a recording", "语音识别：把录音写成文字")
    columns = (
        Column("audio", "audio", names=AUDIO_NAMES),
        Column("text", "text", names=("transcript", "transcription", "normalized_text", "label", "转写", "转录",
                                      *TEXT_NAMES), target=True),
    )  # fmt: skip
    metric = ("cer", "min")
    unit = "tokens"
    asks = ("decoding", "beam", "timestamps", "lm_weight")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        # The same words spoken twice are two examples; the same recording twice is still one.
        "model": {"d_model": 144, "num_layers": 6, "num_heads": 4, "conv_kernel": 15, "dropout": 0.1,
                  "norm": "layernorm"},
        "train": {"steps": 3000, "batch_size": 32, "optimizer": "muon", "lr": 0.002, "ema": 0.995},
        "serve": {"max_body_bytes": 32 << 20, "max_batch": 8},
    }

    class Options(base.Options):
        units: Literal["char", "bpe", "pinyin"] = "char"
        """What is written. char: characters; bpe: pieces of words; pinyin: Mandarin syllables with tones, of Chinese
        text.
        写出的单位。char：字符；bpe：词的片段；pinyin：由中文得到的带声调拼音。"""
        vocab_size: int = Field(4000, ge=5)
        """Most characters, or pieces of words.
        字符或片段的最大数目。"""
        plain_text: bool = True
        """Learn and compare texts in lower case and without punctuation.
        学习和比较时统一为小写并去掉标点。"""
        suffix: str | None = None
        """A column that is joined to the end of every text, such as the tone beside a syllable.
        接在每条文本末尾的列，例如音节旁边的声调。"""
        trim: float = Field(0.0, ge=0, le=100)
        """What is so many decibels below the loudest, or hardly above the noise, counts as silence at the ends, and is
        cut before anything is read; 40 is usual; 0: nothing is.
        首尾比最响处低这么多分贝、或几乎不高于噪声的部分视为静音，识别前先切除；通常取 40；0 表示不切。"""
        pause: float = Field(0.0, ge=0, le=60)
        """Pauses within a recording are cut to so many seconds (with trim); 0: they stay.
        录音中间的停顿缩短到这么多秒（需 trim）；0 表示不动。"""
        front: Literal["plain", "whisper"] = "plain"
        """How it hears. plain: log-mel without loudness, four frames a position; whisper: as weights of Whisper do that
        `model.from` names.
        如何听取。plain：去掉音量的 log-mel，四帧一个位置；whisper：按 `model.from` 所指 Whisper 权重的方式。"""
        language: str | None = None
        """Of Whisper's weights: the language that is spoken (zh, en …); nothing: found out for each recording.
        Whisper 权重所听的语言（zh、en 等）；不填则逐条判断。"""
        text_length: int | None = Field(None, ge=8, le=4096)
        """Most tokens that the decoder holds; nothing: model.max_length.
        解码器最多容纳的词元数；不填则为 model.max_length。"""
        mels: int = Field(80, ge=16, le=128)
        """Bands of the spectrogram.
        频谱的频带数。"""
        channels: int = Field(32, ge=1, le=512)
        """Channels of the convolutions in front of the Transformer.
        Transformer 之前卷积的通道数。"""
        decoder_layers: int = Field(2, ge=0, le=24)
        """Blocks of the attention decoder; 0: CTC alone.
        注意力解码器的层数；0 表示只用 CTC。"""
        ctc_weight: float = Field(0.3, ge=0, le=1)
        """Share of CTC in the loss and in joint search; the rest is the decoder's.
        CTC 在损失与联合搜索中的比重，其余归解码器。"""
        label_smoothing: float = Field(0.1, ge=0, lt=1)
        """Share of certainty taken from the decoder's true token.
        从解码器正确词元上拿走的确定性比例。"""
        decoding: Literal["greedy", "ctc", "joint"] = "greedy"
        """How a text is found. greedy: the likeliest token of each frame; ctc: prefix beam search; joint: CTC and
        decoder together, best and slowest.
        如何得到文本。greedy：每帧取最可能的词元；ctc：前缀束搜索；joint：CTC 与解码器联合，最好也最慢。"""
        beam: int = Field(8, ge=1, le=MOST_BEAMS)
        """Texts kept in a search.
        搜索时保留的文本数。"""
        language_model: str | None = None
        """A run of text-generation, trained on texts in the same form, that is heard in ctc and joint decoding. It is
        copied into this run.
        text-generation 的训练结果目录（训练文本的形式应相同），在 ctc 与 joint 解码时参与打分；会复制到本次训练里。"""
        lm_weight: float = Field(0.3, ge=0, le=MOST_WEIGHT)
        """Weight of its log-probability beside that of CTC and decoder.
        语言模型对数概率的权重，加在 CTC 与解码器的得分上。"""
        max_seconds: float = Field(30.0, ge=0.5, le=600)
        """Longer recordings are left out of training; where they are only answered, any length will do.
        更长的录音不用于训练；识别时长度不限。"""
        chunk: float = Field(20.0, ge=1, le=600)
        """Seconds that are read at once; longer recordings are read in pieces that overlap, by CTC.
        一次读取的秒数；更长的录音分段重叠读取（用 CTC）。"""
        overlap: float = Field(4.0, ge=0, le=60)
        """Seconds that two pieces share.
        相邻两段重叠的秒数。"""
        speed: float = Field(0.1, ge=0, le=0.5)
        """Play recordings in training by up to this share faster or slower.
        训练时随机加快或放慢的最大比例。"""
        gain: float = Field(6.0, ge=0, le=40)
        """Make them louder or softer by up to so many decibels; what is too loud is clipped.
        训练时随机增减音量的最大分贝数，超出范围的会被削波。"""
        noise: float = Field(0.3, ge=0, le=1)
        """Share of recordings that get noise, 10 to 40 decibels below them.
        训练时加入噪声的录音比例，噪声比录音低 10 到 40 分贝。"""
        bands_hidden: float = Field(0.3, ge=0, le=1)
        """SpecAugment: two stripes of bands are hidden, each at most this share of all.
        SpecAugment：遮住两条频带，每条最多占此比例。"""
        time_hidden: float = Field(0.15, ge=0, le=1)
        """SpecAugment: two stretches of time are hidden, each at most this share of the recording.
        SpecAugment：遮住两段时间，每段最多占录音的此比例。"""

    codec: AudioCodec
    units: TextCodec | PinyinCodec
    prompts: Prompts | None = None
    fused: Language | None = None
    _decoded: tuple[str, np.ndarray, int] | None = None

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        jiwer()  # told of now, not at the first evaluation
        o, texts = self.options, _Texts(self, rows)
        if o.language_model is not None:
            self.fused = Language(o.language_model)
            if o.decoding == "greedy":
                raise UserError(tr("options.language_model is heard in ctc and joint decoding alone: set "
                                   "options.decoding to one of them",
                                   "options.language_model 只在 ctc 与 joint 解码时起作用：请把 options.decoding "
                                   "设为其中之一"))
        if (self.origin is not None) != (o.front == "whisper"):
            raise UserError(tr("options.front: whisper goes with weights of Whisper, and with no others (model.from)",
                               "options.front: whisper 只能与 Whisper 的权重（model.from）一起使用"))
        if self.origin is not None:
            self.codec = AudioCodec.whisper(o.mels, self.origin.window)
            self.units = units = self.origin.codec()
            self.prompts = Prompts.of(units, self.origin.path)
            if o.language is not None and self.prompts.languages:
                self.prompts.ids(o.language)
            if o.units == "pinyin" or o.language_model or o.decoding != "greedy":
                raise UserError(tr("weights of Whisper have their own tokens and are read greedily: leave "
                                   "options.units, decoding and language_model out",
                                   "Whisper 的权重有自己的词元，并用 greedy 解码：请去掉 options.units、decoding 与 "
                                   "language_model"))
            return
        if o.units == "pinyin":
            self.units = PinyinCodec.fit(texts)
        else:
            self.units = TextCodec.fit(texts, o.units, o.vocab_size)
        self.codec = AudioCodec.fit((row["audio"] for row in rows), o.mels)

    def text_of(self, row: dict[str, Any]) -> str:
        """A row's text in the form that is learned and compared."""
        text = str(row["text"])
        if self.options.suffix is not None:
            if row.get(self.options.suffix) is None:
                name = self.options.suffix
                raise UserError(tr(f"there is no column '{name}' (options.suffix)",
                                   f"没有 '{name}' 这一列（options.suffix）"), getattr(row, "where", ""))
            text += str(row[self.options.suffix]).strip()
        if self.options.units == "pinyin":
            return " ".join(syllables(plain(text)))
        return plain(text) if self.options.plain_text else text.strip()

    def encode(self, row: dict[str, Any]) -> Example:
        """``audio``: (N,) int16 at 16 kHz; ``rate``: what it had; ``target``: (L,) ids of the text; with the option
        `trim` also ``voiced``: (K, 2), which samples were kept, and ``whole``: of how many."""
        if self._decoded is None or self._decoded[0] is not row["audio"]:  # `check` has just asked
            self._decoded = (row["audio"], *self.codec.encode(row["audio"]))
        _, samples, rate = self._decoded
        example = {"audio": samples, "rate": np.array(rate, dtype=np.int32)}
        if self.options.trim:
            voiced = activity.spoken(samples, self.options.trim, self.options.pause)
            example |= {"audio": activity.joined(samples, voiced), "voiced": voiced,
                        "whole": np.array(len(samples), dtype=np.int64)}
        if row.get("text") is not None:
            example["target"] = self.units.encode(self.text_of(row)).astype(np.int32)
        return example

    def check(self, row: dict[str, Any], part: str) -> None:
        if part == "train":
            example = self.encode(row)
            if self.codec.window:
                whisper.refuse_unfit(len(example["audio"]), example["target"], self.codec.window,
                                     self.options.text_length or 448)
                return
            told.refuse_unfit(len(example["audio"]), example["target"], self.options.max_seconds)

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if len(row["audio"]) <= KEPT else changed(row, audio=None)

    def describe(self, store: Store) -> dict[str, Any]:
        return told.described(store)

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        self.units.save(folder / "units")
        if self.fused is not None:
            self.fused.copy(folder / COPY)
        if self.prompts is not None:
            self.prompts.save(folder)

    def load(self, folder: Path) -> None:
        self.codec = AudioCodec.load(folder)
        kind = PinyinCodec if self.options.units == "pinyin" else TextCodec
        self.units = kind.load(folder / "units")
        self.fused = find_language(folder, self.options.language_model)
        self.prompts = Prompts.load(folder) if self.codec.window else None

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> Recogniser:
        o, units = self.options, self.units
        if self.codec.window:
            return Recogniser(config, self.codec, units.vocab_size, units.bos, units.eos, BandInput(config, o.mels),
                              o.decoder_layers, o.text_length, ctc=False)
        most = max(o.max_seconds * (1 + o.speed) / (1 - o.speed), o.chunk)
        if (needed := int(positions_of(int(most * RATE))) + 1) > config.max_length:
            raise UserError(tr(f"recordings of {most:.0f} s have {needed} positions; model.max_length is "
                               f"{config.max_length}: lower options.max_seconds and options.chunk, or raise it",
                               f"{most:.0f} 秒的录音有 {needed} 个位置；model.max_length 是 {config.max_length}："
                               "请调小 options.max_seconds 与 options.chunk，或调大它"))
        return Recogniser(config, self.codec, units.vocab_size, units.bos, units.eos,
                          SoundInput(config, o.mels, o.channels), o.decoder_layers, o.text_length)

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """Speed, loudness and noise of the recording, and the rectangles that SpecAugment hides."""
        o, samples = self.options, np.asarray(example["audio"])
        if o.speed:
            faster = sound.resampled(samples, float(rng.uniform(1 - o.speed, 1 + o.speed)))
            if told.fits(len(faster), example["target"]):
                samples = faster
        if o.gain:
            louder = 10 ** (float(rng.uniform(-o.gain, o.gain)) / 20)
            samples = np.clip(samples * np.float32(louder), -32768, 32767).astype(np.int16)
        if rng.random() < o.noise:
            samples = sound.noisy(samples, float(rng.uniform(10, 40)), rng)
        frames = int(sound.frames_of(len(samples)))
        spans = [(0, frames, *_stretch(rng, o.mels, o.bands_hidden)) for _ in range(2)]
        spans += [(*_stretch(rng, frames, o.time_hidden), 0, o.mels) for _ in range(2)]
        return {**example, "audio": samples, "spans": np.array(spans, dtype=np.int32)}

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("audio")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        assert isinstance(model, Recogniser)
        target_BL, size_B = batch["target"].long(), batch["target_lengths"]
        memory_BSD, length_B = model.encode(batch["audio"], batch["audio_lengths"], batch.get("spans"))
        count = int(size_B.sum()) + len(size_B)
        ctc = memory_BSD.new_zeros(())
        if model.ctc is not None:
            ctc = F.ctc_loss(model.ctc_scores(memory_BSD).transpose(0, 1), target_BL, length_B, size_B, reduction="sum",
                             zero_infinity=True)
        if model.decoder is None:
            return Loss(ctc, count)
        smooth = self.options.label_smoothing if model.training else 0.0
        prompt = [model.bos] if self.prompts is None else self.prompts.ids(self.options.language)
        prompt_BP = torch.tensor([prompt], device=target_BL.device).expand(len(target_BL), -1)
        x_BLD = model.states(memory_BSD, length_B, torch.cat((prompt_BP, target_BL), 1))[:, len(prompt) - 1 :]
        wanted_BL = F.pad(target_BL, (0, 1)).scatter(1, size_B[:, None], model.eos)
        real_BL = torch.arange(wanted_BL.shape[1], device=size_B.device) <= size_B[:, None]
        heard_as = vocabulary_loss(x_BLD[real_BL], model.head.linear.weight, wanted_BL[real_BL], smooth)
        weight = self.options.ctc_weight
        parts = {"ctc": ctc.detach(), "attention": heard_as.detach()}
        return Loss(weight * ctc + (1 - weight) * heard_as, count, parts)

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"text", "score", "seconds"}``, with ``ask["timestamps"]`` also ``words``; `ask` may hold `decoding`,
        `beam` and `lm_weight`. The score is the log-probability of the text over its tokens."""
        assert isinstance(model, Recogniser)
        wishes = self._wishes(ask)
        lengths_B = batch["audio_lengths"]
        if self.prompts is not None:
            return self._dictated(model, batch)
        found = heard(model, batch["audio"], lengths_B, self.options.chunk, self.options.overlap)
        answers = []
        whole_B = batch.get("whole", lengths_B).tolist()
        for i, (logp_SV, memory_1SD) in enumerate(found):
            reading = self._read(model, logp_SV, memory_1SD, wishes)
            answer = {"text": self.units.decode(reading.ids).strip(), "seconds": round(whole_B[i] / RATE, 3),
                      "score": round(reading.score / (len(reading.ids) + 1), 5)}
            if wishes["timestamps"]:
                answer["words"] = told.timed(self.units, logp_SV, reading.ids, float(lengths_B[i]) / RATE)
                if "voiced" in batch:
                    told.put_back(answer["words"], batch["voiced"][i, : int(batch["voiced_lengths"][i])].cpu().numpy())
            answers.append(answer)
        return answers

    def _dictated(self, model: Recogniser, batch: Batch) -> list[Answer]:
        """As `predict`, by weights of Whisper."""
        assert self.prompts is not None
        found = whisper.dictated(model, batch["audio"], batch["audio_lengths"], self.prompts, self.options.language)
        whole_B = batch.get("whole", batch["audio_lengths"]).tolist()
        return [{"text": whisper.joined([self.units.decode(one.ids) for one in parts]),
                 "seconds": round(samples / RATE, 3),
                 "score": round(sum(one.score for one in parts) / sum(len(one.ids) + 1 for one in parts), 5)}
                for parts, samples in zip(found, whole_B, strict=True)]

    def _read(self, model: Recogniser, logp_SV: np.ndarray, memory: torch.Tensor | None, wishes: dict[str, Any]
              ) -> Reading:
        units, decoding = self.units, wishes["decoding"]
        logp_SV = logp_SV.copy()
        logp_SV[:, [units.unk, units.bos, units.eos]] = -1e9
        if decoding == "greedy":
            return best_path(logp_SV)
        say = None
        if self.fused is not None and wishes["lm_weight"]:
            say = self.fused.on(next(model.parameters()).device).fusion(units, wishes["lm_weight"])
        if decoding == "joint" and memory is not None and model.decoder is not None:
            limit = min(len(logp_SV), model.max_length - 2)
            with torch.autocast(memory.device.type, enabled=False):
                state, logits_1V = model.begin(memory.float())
                return joint_search(model, state, logits_1V, logp_SV, units.eos, wishes["beam"],
                                    self.options.ctc_weight, limit, (units.pad, units.unk, units.bos), say)[0]
        return prefix_beam(logp_SV, wishes["beam"], fusion=say)[0]

    def _wishes(self, ask: dict[str, Any]) -> dict[str, Any]:
        o = self.options
        wishes = {"decoding": o.decoding, "beam": o.beam, "timestamps": False, "lm_weight": o.lm_weight}
        wishes |= {name: ask[name] for name in wishes if ask.get(name) is not None}
        beam = wishes["beam"]
        if wishes["decoding"] not in ("greedy", "ctc", "joint"):
            raise UserError(tr(f"decoding is {wishes['decoding']!r}; there are greedy, ctc and joint",
                               f"decoding 是 {wishes['decoding']!r}；可选 greedy、ctc、joint"))
        if not isinstance(beam, int) or isinstance(beam, bool) or not 1 <= beam <= MOST_BEAMS:
            raise UserError(tr(f"beam is {beam!r}; it must be a whole number, 1 to {MOST_BEAMS}",
                               f"beam 是 {beam!r}，应为 1 到 {MOST_BEAMS} 的整数"))
        if not isinstance(wishes["timestamps"], bool):
            raise UserError(tr(f"timestamps is {wishes['timestamps']!r}; it is true or false",
                               f"timestamps 是 {wishes['timestamps']!r}；应为 true 或 false"))
        if self.prompts is not None and (wishes["decoding"] != "greedy" or wishes["timestamps"]):
            raise UserError(tr("weights of Whisper write without CTC here: greedily, and without times of words; ask "
                               "for json or text",
                               "Whisper 的权重在这里不用 CTC：只有 greedy，没有词的时间；请要 json 或 text"))
        weight = wishes["lm_weight"]
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight <= MOST_WEIGHT:
            raise UserError(tr(f"lm_weight is {weight!r}; it must be a number, 0 to {MOST_WEIGHT:g}",
                               f"lm_weight 是 {weight!r}，应为 0 到 {MOST_WEIGHT:g} 的数"))
        if ask.get("lm_weight") and self.fused is None:
            raise UserError(tr("lm_weight: this run has no language model (options.language_model)",
                               "lm_weight：这次训练没有语言模型（options.language_model）"))
        return wishes

    def _rates(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> ErrorRates:
        form = plain if self.options.plain_text else str
        return ErrorRates([form(a["text"]) for a in answers], [form(self.text_of(row)) for row in rows], words)

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Word and character error rate, and the share of texts without an error; of pinyin also that without tones.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        found = self._rates(answers, rows).scores(weights)
        if self.options.units == "pinyin":
            bare = ErrorRates([toneless(a["text"]) for a in answers], [toneless(self.text_of(r)) for r in rows], words)
            found["toneless_wer"] = bare.scores(weights)["wer"]
        return found

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Texts beside the true ones, the rows with most errors, and the words most often mistaken."""
        return told.figures(self._rates(answers, rows), answers, rows, self.text_of)

    # -- serve --------------------------------------------------------------------------------------------------------

    def sample(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"audio": row["audio"]} if "audio" in row else {}

    def request(self, body: Any) -> dict[str, Any]:
        """An object with ``audio``, or the recording alone: a data URI; from Python also a `pathlib.Path`, the bytes of
        a file, or (samples, rate). A text is never taken for a path: a caller of the server must not read its files."""
        row = dict(body) if isinstance(body, dict) else {"audio": body}
        given: Any = row.get("audio")
        fault = ""
        if isinstance(given, Path):
            given, fault = audio.read_file(given)
        elif isinstance(given, bytes):
            given, fault = audio.to_uri(given)
        elif isinstance(given, tuple) and len(given) == 2:
            given, fault = audio.to_uri(told.as_wav(*given))
        if fault:
            raise UserError(fault)
        return {**row, "audio": given} if "audio" in row else row


def _stretch(rng: np.random.Generator, size: int, share: float) -> tuple[int, int]:
    """A random stretch of at most `share` of `size`."""
    width = int(rng.integers(0, int(share * size) + 1))
    start = int(rng.integers(0, size - width + 1))
    return start, start + width


class _Texts:
    """The texts of rows; may be read again."""

    def __init__(self, task: SpeechRecognition, rows: Iterable[dict[str, Any]]) -> None:
        self.task, self.rows = task, rows

    def __iter__(self) -> Iterator[str]:
        return (self.task.text_of(row) for row in self.rows)
