"""text-to-speech: a recording of a text, in a voice learned from recordings.

A Transformer reads characters or pinyin and says what each token sounds like and for how long, by alignments that are
found while learning (Kim et al. 2020, "Glow-TTS"); a second one makes log-mel frames of that, by flow matching
(Mehta et al. 2024, "Matcha-TTS") or in one go (Ren et al. 2021, "FastSpeech 2"); Griffin-Lim makes them heard.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from multihead import task as base
from multihead.codec.audio import RATE, decoded
from multihead.codec.voice import HOP, VoiceCodec, encoded, griffin_lim, whole
from multihead.data.audio import from_uri, to_uri
from multihead.data.columns import changed
from multihead.data.rows import TEXT_NAMES, Column
from multihead.data.store import Store
from multihead.errors import Problem, UserError, tr
from multihead.generation import flow
from multihead.metrics import text as metrics
from multihead.metrics.spectra import distortion
from multihead.run import write_json
from multihead.task import Answer, Batch, Example, Loss, Task
from multihead.tasks.speech import _spoken as spoken
from multihead.tasks.speech._alignment import aligned
from multihead.tasks.speech._reading import Reading, Units
from multihead.tasks.speech._synthesiser import Said, Synthesiser, whole_frames
from multihead.tasks.speech._vocoder import Vocoder, segment
from multihead.tasks.speech.speech_recognition import AUDIO_NAMES, KEPT
from multihead.transformer.config import TransformerConfig

VOICE_NAMES = ("voice", "speaker_id", "spk", "client_id", "说话人", "发音人", "音色")
SLOWEST, FASTEST = 0.25, 4.0
"""What a caller may ask of `speed`, as in the OpenAI API."""
PULL = 20.0


class TextToSpeech(Task):
    """Text → recording."""

    field = "speech"
    title = ("read a text aloud, in a voice of your recordings", "语音合成：用录音里的声音朗读文本")
    columns = (
        Column("audio", "audio", names=AUDIO_NAMES, target=True),
        Column("text", "text", names=("transcript", "transcription", "normalized_text", "转写", "转录", *TEXT_NAMES)),
        Column("speaker", "label", required=False, names=VOICE_NAMES),
    )
    metric = ("loss", "min")
    unit = "frames"
    speaks = True
    asks = ("speed", "seed", "steps")
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "model": {"d_model": 192, "num_layers": 6, "num_heads": 4, "conv_kernel": 7, "dropout": 0.1,
                  "norm": "layernorm", "activation": "gelu_tanh", "qk_norm": True, "max_length": 2048},
        "train": {"steps": 5000, "batch_size": 16, "optimizer": "muon", "lr": 0.002, "ema": 0.995},
        "serve": {"max_rows": 8, "max_batch": 4, "queue": 32},
    }  # fmt: skip

    class Options(base.Options):
        units: Literal["auto", "char", "pinyin"] = "auto"
        """What is read. char: characters; pinyin: Mandarin syllables with tones; auto: pinyin of Chinese, else char.
        读取的单位。char：字符；pinyin：带声调的拼音；auto：中文用 pinyin，其余用 char。"""
        suffix: str | None = None
        """A column that is joined to the end of every text, such as the tone beside a syllable.
        接在每条文本末尾的列，例如音节旁边的声调。"""
        mels: int = Field(80, ge=16, le=128)
        """Bands of the spectrogram.
        频谱的频带数。"""
        trim: float = Field(40.0, ge=0, le=100)
        """What is so many decibels below the loudest counts as silence at the ends, and is cut; 0: nothing is.
        首尾比最响处低这么多分贝的部分视为静音并切除；0 表示不切。"""
        pause: float = Field(0.0, ge=0, le=60)
        """Pauses within a recording are cut to so many seconds (with trim); 0: they stay.
        录音中间的停顿缩短到这么多秒（需 trim）；0 表示不动。"""
        text_layers: int = Field(4, ge=1, le=24)
        """Blocks of the Transformer that reads; model.num_layers are those of the one that speaks.
        阅读文本的层数；model.num_layers 是发声部分的层数。"""
        group: int = Field(2, ge=1, le=8)
        """Frames (12.5 ms) that lie side by side in one vector; more are faster and coarser.
        一个向量里并排的帧数（每帧 12.5 毫秒）；越多越快，也越粗。"""
        decoder: Literal["flow", "regression"] = "regression"
        """How frames are made. regression: in one go; flow: out of noise, by flow matching.
        如何生成频谱。regression：一步得到；flow：由噪声出发，用流匹配。"""
        vocoder: Literal["griffin-lim", "neural"] = "griffin-lim"
        """How frames are made heard. griffin-lim: needs no learning; neural: by a small network that learns beside the
        rest.
        如何由频谱得到声音。griffin-lim：无需学习；neural：用一同训练的小网络。"""
        vocoder_width: int = Field(192, ge=16, le=1024)
        """Width of that network.
        该网络的宽度。"""
        vocoder_rounds: int = Field(0, ge=0, le=60)
        """Rounds of Griffin-Lim that its phases are made to agree in; 0: none.
        对其相位再做几轮 Griffin-Lim；0 表示不做。"""
        steps: int = Field(8, ge=1, le=flow.MOST_STEPS)
        """Steps from noise to frames (flow).
        从噪声到频谱的步数（flow）。"""
        temperature: float = Field(0.7, ge=0, le=2)
        """Deviation of the noise that a voice starts from (flow): less is steadier, more is livelier.
        起始噪声的标准差（flow）：越小越稳，越大越有变化。"""
        max_seconds: float = Field(20.0, ge=0.5, le=60)
        """Longer recordings are left out.
        更长的录音不使用。"""
        max_characters: int = Field(1000, ge=10, le=4096)
        """Longest text that is read aloud; one longer than those learned from is read sentence by sentence.
        可朗读的最长文本；比训练文本更长的，逐句朗读。"""
        recogniser: str | None = None
        """A run of speech-recognition that writes down what was synthesised: its error rate stands in the evaluation.
        speech-recognition 的训练结果目录，用来转写合成的语音；评估里给出其错误率。"""
        samples: int = Field(10, ge=0, le=1000)
        """Held-out texts of which the evaluation keeps the recording.
        评估时保留录音的留出文本数。"""

    codec: VoiceCodec
    reading: Reading
    voices: list[str]
    """Names of the voices, the most frequent first; one without a name where the data names none."""
    _least: int = -1
    _judge: Any = None

    def identity(self) -> Sequence[str]:
        return ["audio", "text"]

    # -- prepare ------------------------------------------------------------------------------------------------------

    def fit(self, rows: Iterable[dict[str, Any]]) -> None:
        self._recogniser()
        counts = Counter(str(row["speaker"]) for row in rows if row.get("speaker") is not None)
        self.voices = sorted(counts, key=lambda name: (-counts[name], name)) or [""]
        self.reading = Reading.fit(_Texts(self, rows), self.options.units)
        o = self.options
        self.codec = VoiceCodec.fit((row["audio"] for row in rows), o.mels, o.trim, o.pause)

    def _recogniser(self) -> Any:
        if self._judge is None and self.options.recogniser:
            self._judge = spoken.Recognised(self.options.recogniser)
        return self._judge

    def text_of(self, row: dict[str, Any]) -> str:
        """A row's text with its suffix."""
        text, name = str(row["text"]), self.options.suffix
        if name is not None and "audio" in row and row.get(name) is None:
            raise UserError(tr(f"there is no column '{name}' (options.suffix)",
                               f"没有 '{name}' 这一列（options.suffix）"), getattr(row, "where", ""))
        return text + str(row.get(name) or "").strip() if name is not None else text

    def encode(self, row: dict[str, Any]) -> Example:
        """``ids``: (S,) int32; ``voice``: its number; ``mel``: frames (T, M) float16."""
        text = self.text_of(row)
        if "audio" not in row and len(text) > self.options.max_characters:
            raise UserError(tr(f"the text has {len(text):,} characters; at most {self.options.max_characters:,} are "
                               "read aloud at once (options.max_characters)",
                               f"文本有 {len(text):,} 个字符；一次至多朗读 {self.options.max_characters:,} 个"
                               "（options.max_characters）"))
        example = {"ids": self.reading.encode(text), "voice": np.array(self._voice(row.get("speaker")), np.int64)}
        if row.get("audio") is not None:
            example["mel"], wave = self.codec.both(decoded(from_uri(row["audio"]))[0])
            if self.options.vocoder == "neural":
                example["wave"] = wave
        return example

    def _voice(self, name: Any) -> int:
        if name is None or len(self.voices) == 1:
            return 0
        if str(name) not in self.voices:
            known = ", ".join(self.voices[:20])
            raise UserError(tr(f"there is no voice '{name}'; there are: {known}",
                               f"没有名为 '{name}' 的声音；现有：{known}"), "speaker")
        return self.voices.index(str(name))

    def check(self, row: dict[str, Any], part: str) -> None:
        example = self.encode(row)
        spoken.refuse_unfit(example["ids"], len(example["mel"]), self.options.max_seconds)

    def kept(self, row: dict[str, Any]) -> dict[str, Any]:
        return row if len(row["audio"]) <= KEPT else changed(row, audio=None)

    def describe(self, store: Store) -> dict[str, Any]:
        return spoken.described(store, self.voices)

    def examples(self, store: Store, part: str) -> Sequence[Example]:
        """The rows; and of a held-out part, of which ones the recording is kept: those of the smallest keys."""
        if part != "train" and len(store):
            keys = sorted(_key(store[i]["ids"], int(store[i]["voice"])) for i in range(len(store)))
            self._least = keys[min(self.options.samples, len(keys)) - 1] if self.options.samples else -1
        return store

    def save(self, folder: Path) -> None:
        self.codec.save(folder)
        self.reading.save(folder)
        about = {"voices": self.voices, "units": self.reading.kind, "longest": self.reading.longest}
        write_json(folder / "voices.json", about)

    def load(self, folder: Path) -> None:
        self.codec = VoiceCodec.load(folder)
        try:
            about = json.loads((folder / "voices.json").read_text("utf-8"))
            self.voices = [str(name) for name in about["voices"]]
            kind: Units = "pinyin" if about["units"] == "pinyin" else "char"
            self.reading = Reading.load(folder, kind, int(about["longest"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(tr(f"this codec cannot be read ({error}); prepare the run again",
                               f"编码器无法读取（{error}）；请重新准备"), str(folder / "voices.json")) from None

    # -- build and train ----------------------------------------------------------------------------------------------

    def model(self, config: TransformerConfig) -> Synthesiser:
        o = self.options
        if (needed := int(o.max_seconds * RATE / HOP / o.group) + 2) > config.max_length:
            raise UserError(tr(f"recordings of {o.max_seconds:g} s have {needed} positions; model.max_length is "
                               f"{config.max_length}: lower options.max_seconds, or raise it",
                               f"{o.max_seconds:g} 秒的录音有 {needed} 个位置；model.max_length 是 "
                               f"{config.max_length}：请调小 options.max_seconds，或调大它"))
        if config.norm_position != "before":
            raise UserError(tr("text-to-speech has its norms before: model.norm_position: before",
                               "语音合成的归一化在前：model.norm_position: before"))
        made = Synthesiser(config, self.codec.mels, self.reading.vocab_size, len(self.voices), o.text_layers, o.group,
                           o.decoder == "flow")
        if o.vocoder == "neural":
            mean, std = torch.from_numpy(self.codec.mean), torch.from_numpy(self.codec.std)
            made.vocoder = Vocoder(mean, std, o.vocoder_width)
        return made

    def augment(self, example: Example, rng: np.random.Generator) -> Example:
        """The noise that a flow starts from, the time it is looked at, and the place that a vocoder learns from."""
        if self.options.vocoder == "neural":
            example = {**example, "place": np.array(rng.random(), np.float32)}
        if self.options.decoder != "flow":
            return example
        noise = rng.standard_normal(example["mel"].shape, dtype=np.float32)
        return {**example, "noise": noise, "time": np.array(rng.random(), np.float32)}

    def length(self, store: Store) -> np.ndarray:
        return store.lengths("mel" if "mel" in store[0] else "ids")

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        parts, _, _ = self._errors(model, batch)
        frames = batch["mel_lengths"]
        return Loss((torch.stack([*parts.values()]).sum(0) * frames).sum(), int(frames.sum()),
                    {name: (value.detach() * frames).sum() for name, value in parts.items()})

    def _errors(self, model: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Said]:
        """The parts of the loss, means over each row, (B,) each; the alignment (B, S); what the text is to sound like.
        """
        tokens_B, frames_B, G = batch["ids_lengths"], batch["mel_lengths"], model.group
        data_BTM = batch["mel"].float()
        data_BTM = torch.nn.functional.pad(data_BTM, (0, 0, 0, -data_BTM.shape[1] % G))
        T, S = data_BTM.shape[1], batch["ids"].shape[1]
        real_BS = torch.arange(S, device=data_BTM.device) < tokens_B[:, None]
        real_BT = torch.arange(T, device=data_BTM.device) < frames_B[:, None]
        said = model.read(batch["ids"].long(), real_BS, batch["voice"])
        durations_BS = aligned(said.mean, data_BTM, tokens_B, frames_B, PULL)
        mean_BTM, held_BUD = model.stretched(said, durations_BS, T)
        if model.flows:
            noise_BTM = torch.nn.functional.pad(batch["noise"], (0, 0, 0, T - batch["noise"].shape[1]))
            x_BTM, wanted_BTM = flow.on_path(noise_BTM, data_BTM, batch["time"])
            found_BTM = model(mean_BTM, held_BUD, real_BT, x_BTM, batch["time"])
        else:
            found_BTM, wanted_BTM = model(mean_BTM, held_BUD, real_BT), data_BTM
        log_BS = durations_BS.clamp(min=1).float().log()
        more = {}
        if model.vocoder is not None:
            more["vocoder"] = model.vocoder.errors(*segment(batch["mel"], batch["wave"], frames_B, batch["place"]))
        return {
            **more,
            "frames": spoken.mean_where((found_BTM - wanted_BTM).square().mean(2), real_BT),
            "means": spoken.mean_where((mean_BTM - data_BTM).square().mean(2), real_BT),
            "durations": spoken.mean_where((said.log_durations - log_BS).square(), real_BS),
        }, durations_BS, said  # fmt: skip

    # -- evaluate -----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, batch: Batch, ask: dict[str, Any]) -> list[Answer]:
        """``{"audio": WAV data URI, "seconds", "seed"}``; in an evaluation what is measured, and of some the sound.

        Rows are answered one by one: a waveform is then the same to the bit in whatever batch its text stands.
        """
        wish = None if ask.get("evaluate") else self._wish(ask)
        answers = []
        for i in range(len(batch["ids"])):
            ids = batch["ids"][i, : int(batch["ids_lengths"][i])]
            if wish is not None:
                frames = self.speak(model, ids, batch["voice"][i : i + 1], **wish)
                sound = self.sound(model, frames)
                answers.append({"audio": to_uri(encoded(sound))[0], "seconds": round(len(sound) / RATE, 3),
                                "seed": wish["seed"]})
            else:
                row = {key: value[i : i + 1] for key, value in batch.items()}
                row["mel"] = row["mel"][:, : int(batch["mel_lengths"][i])]
                answers.append(self._measured(model, {**row, "ids": ids[None]}))
        return answers

    def _wish(self, ask: dict[str, Any]) -> dict[str, Any]:
        wish = {"speed": 1.0, "seed": self.seed, "steps": self.options.steps}
        wish |= {name: ask[name] for name in wish if ask.get(name) is not None}
        speed, problems = wish["speed"], []
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not SLOWEST <= speed <= FASTEST:
            problems.append(Problem(tr(f"speed is {speed!r}; it must be a number from {SLOWEST} to {FASTEST:g}",
                                       f"speed 是 {speed!r}，应为 {SLOWEST} 到 {FASTEST:g} 的数")))
        for name, most in (("seed", flow.SEEDS - 1), ("steps", flow.MOST_STEPS)):
            value = wish[name]
            if not isinstance(value, int) or isinstance(value, bool) or not (name == "steps") <= value <= most:
                problems.append(Problem(tr(f"{name} is {value!r}; it must be a whole number up to {most}",
                                           f"{name} 是 {value!r}，应为不超过 {most} 的整数")))
        if problems:
            raise UserError.many(problems)
        return wish

    def speak(self, model: Any, ids: Tensor, voice_1: Tensor, speed: float = 1.0, seed: int = 0, steps: int = 8
              ) -> np.ndarray:
        """Frames (T, M) of one text, sentence by sentence."""
        found = []
        for number, part in enumerate(self.reading.parts(ids.cpu().numpy())):
            ids_1S = torch.from_numpy(part[: model.config.max_length]).long().to(ids.device)[None]
            said = model.read(ids_1S, torch.ones_like(ids_1S, dtype=torch.bool), voice_1)
            durations_1S = whole_frames(said.log_durations[0], speed)[None]
            found.append(self._frames(model, said, durations_1S, seed + number, steps))
        return np.concatenate(found)

    @torch.no_grad()
    def sound(self, model: Any, frames_TM: np.ndarray) -> np.ndarray:
        """Frames (T, M) → (N,) int16 at 16 kHz."""
        if model.vocoder is None:
            return self.codec.waveform(frames_TM)
        frames_TM = frames_TM if len(frames_TM) > 1 else np.repeat(frames_TM, 2, 0)
        x_1TM = torch.from_numpy(frames_TM)[None].float().to(next(model.parameters()).device)
        if not self.options.vocoder_rounds:
            return whole(model.vocoder(x_1TM)[0].cpu().numpy())
        spectra_FT = model.vocoder.spectra(x_1TM)[0].cpu()
        return whole(griffin_lim(spectra_FT.abs(), self.options.vocoder_rounds, spectra_FT=spectra_FT).numpy())

    def _frames(self, model: Any, said: Said, durations_1S: Tensor, seed: int, steps: int) -> np.ndarray:
        G = model.group
        most = model.config.max_length * G
        T = min(most, max(2, int(durations_1S.sum())))
        mean, held = model.stretched(said, durations_1S, T + -T % G)
        real_1T = torch.ones(mean.shape[:2], dtype=torch.bool, device=mean.device)
        if not model.flows:
            return model(mean, held, real_1T)[0, :T].cpu().numpy()
        noise = flow.noise_of([seed], mean.shape[1:], mean.device) * self.options.temperature
        frames = flow.integrate(lambda x, t_B: model(mean, held, real_1T, x, t_B), noise, steps, "euler")
        return frames[0, :T].cpu().numpy()

    def _measured(self, model: Any, row: Batch) -> Answer:
        """The loss of a held-out row, at a time and with noise that depend on the row alone; how far synthesised frames
        are from the real ones; and for some rows the recording."""
        ids, mel = row["ids"], row["mel"]
        key = _key(ids[0].cpu().numpy(), int(row["voice"]))
        rng = np.random.default_rng(key)
        row = {**row, "ids_lengths": torch.tensor([ids.shape[1]], device=ids.device),
               "mel_lengths": torch.tensor([mel.shape[1]], device=ids.device),
               "noise": torch.from_numpy(rng.standard_normal(mel.shape, dtype=np.float32)).to(ids.device),
               "time": torch.tensor([rng.random()], device=ids.device).float(),
               "place": torch.tensor([rng.random()], device=ids.device).float()}
        parts, durations_1S, said = self._errors(model, row)
        timed = whole_frames(said.log_durations[0], 1.0)
        frames = self._frames(model, said, timed[None], self.seed, self.options.steps)
        real = mel[0].float().cpu().numpy()
        answer: Answer = {name: float(f"{value.item():.6g}") for name, value in parts.items()}
        late = float((timed - durations_1S[0]).abs().float().mean()) * HOP / RATE
        answer |= {"loss": float(f"{sum(answer.values()):.6g}"),
                   "mcd": round(distortion(self.codec.log_mel(frames), self.codec.log_mel(real)), 3),
                   "duration_error": round(1000 * late, 2),
                   "length_error": round(abs(len(frames) / len(real) - 1), 4)}
        if key <= self._least or self._recogniser():
            sound = self.sound(model, frames)
            if self._recogniser():
                answer["heard"] = self._recogniser().text(sound)
            if key <= self._least:
                answer |= {"audio": to_uri(encoded(sound))[0],
                           **spoken.shown(self, said, durations_1S[0].cpu().numpy(), real, frames)}
        return answer

    def score(
        self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]], weights: np.ndarray | None = None
    ) -> dict[str, Any]:
        """The loss; mel-cepstral distance (dB) of free synthesis; error of durations (ms a token) and of the whole
        length; where there is a recogniser, its error rates.

        Args:
            weights: (R, n), see `metrics.intervals.bootstrap`; figures are then arrays (R,).
        """
        names = ("loss", "frames", "means", "durations", "mcd", "duration_error", "length_error")
        found = {name: metrics.mean(np.array([answer[name] for answer in answers]), weights) for name in names}
        if answers and "heard" in answers[0]:
            said = [self.text_of(row) for row in rows]
            found |= self._recogniser().scores([answer["heard"] for answer in answers], said, weights)
        return found

    def figures(self, answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Spectrograms beside the real ones, alignments and players."""
        return spoken.figures(answers, rows, [self.text_of(row) for row in rows])

    # -- serve --------------------------------------------------------------------------------------------------------

    def request(self, body: Any) -> dict[str, Any]:
        """An object with ``text`` and, of several voices, ``speaker``; or the text alone."""
        return body if isinstance(body, dict) else {"text": body}


def _key(ids: np.ndarray, voice: int) -> int:
    """A number that depends on the text and the voice alone."""
    return zlib.crc32(np.ascontiguousarray(ids, dtype=np.int32).tobytes() + bytes([voice % 256]))


class _Texts:
    """The texts of rows; may be read again."""

    def __init__(self, task: TextToSpeech, rows: Iterable[dict[str, Any]]) -> None:
        self.task, self.rows = task, rows

    def __iter__(self) -> Iterator[str]:
        return (self.task.text_of(row) for row in self.rows)
