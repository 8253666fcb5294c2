"""Whisper: its folder hears and writes the same here: frames, logits, and the texts of a greedy search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, processors

from multihead import recipe as recipes
from multihead.build import Run, open_run, take
from multihead.codec.audio import AudioCodec, wav
from multihead.errors import UserError
from multihead.export import export
from multihead.task import find
from multihead.tasks.speech import _whisper as whisper
from multihead.tasks.speech.speech_recognition import SpeechRecognition
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.weights import open_origin
from tests.weights import peers

transformers = pytest.importorskip("transformers")
CLOSE = 1e-4
SECONDS = 4
NAMES = ("endoftext", "startoftranscript", "en", "zh", "transcribe", "notimestamps", "0.00")
SPECIAL = [f"<|{name}|>" for name in NAMES]
SHAPE = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "num_mel_bins": 80,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_target_positions": 40,
         "max_source_positions": 50 * SECONDS, "vocab_size": 320, "pad_token_id": 0, "bos_token_id": 0,
         "eos_token_id": 0, "decoder_start_token_id": 1}


def tokens() -> Any:
    """Whisper's kind: pairs of bytes, languages, and what asks for no times."""
    tokenizer = peers.byte_level(SPECIAL)
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftranscript|> <|notimestamps|> $A <|endoftext|>", pair="$A $B",
        special_tokens=[(name, i) for i, name in enumerate(SPECIAL)])
    return tokenizer


def folder(path: Path, **more: Any) -> tuple[Path, Any, Any]:
    """A folder as people download it, its model and what makes its frames."""
    model = peers.peer("Whisper", "ConditionalGeneration", **{**SHAPE, **more})
    torch.nn.init.normal_(model.model.decoder.embed_positions.weight, std=1)  # else one token follows itself for ever
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"):
        setattr(model.generation_config, name, None)
    made = transformers.WhisperFeatureExtractor(feature_size=model.config.num_mel_bins, chunk_length=SECONDS)
    made.save_pretrained(path)
    names = {f"{role}_token": "<|endoftext|>" for role in ("bos", "eos", "pad", "unk")}
    return peers.write(path, model, tokens(), tokenizer_class="PreTrainedTokenizerFast", **names), model, made


def sounds(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 4000, n) * np.sin(np.arange(n) / 900) for n in (16000 * SECONDS, 9000, 33333)[:count]]
    return [wave.clip(-32768, 32767).astype(np.int16) for wave in waves]


def batch(waves: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    held = np.zeros((len(waves), max(map(len, waves))), np.int16)
    for row, wave in zip(held, waves, strict=True):
        row[: len(wave)] = wave
    return torch.from_numpy(held), torch.tensor([len(wave) for wave in waves])


def ours(there: Path, **options: Any) -> tuple[SpeechRecognition, Any]:
    """The task and its model with the folder's weights."""
    origin = open_origin(there)
    task = SpeechRecognition(SpeechRecognition.Options(**{**origin.options, **origin.preferred, **options}))
    task.origin = origin
    task.fit([])
    model = task.model(TransformerConfig(**origin.config)).eval()
    told = take(model, origin)
    assert not told.new and not told.left and not told.unknown
    return task, model


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [SECONDS, 30])
def test_frames_are_those_of_transformers(mels: int, seconds: int) -> None:
    theirs = transformers.WhisperFeatureExtractor(feature_size=mels, chunk_length=seconds)
    samples, lengths = batch(sounds())
    samples[1, int(lengths[1]) :] = 0
    expected = theirs([wave.astype(np.float32) / 32768 for wave in sounds()], sampling_rate=16000, return_tensors="pt")
    features = AudioCodec.whisper(mels, seconds * 16000).features()
    found = features(samples, lengths)
    torch.testing.assert_close(found.mT, expected["input_features"], atol=CLOSE, rtol=0)
    assert features.frames(lengths).tolist() == [100 * seconds] * 3
    assert found.shape == (3, 100 * seconds, mels)


@torch.inference_mode()
@pytest.mark.parametrize("more", [{}, {"activation_function": "relu"}, {"num_mel_bins": 128, "decoder_layers": 1}])
def test_logits_are_those_of_transformers(tmp_path: Path, more: dict[str, Any]) -> None:
    there, model, made = folder(tmp_path / "there", **more)
    _, mine = ours(there)
    samples, lengths = batch(sounds())
    heard = made([wave.astype(np.float32) / 32768 for wave in sounds()], sampling_rate=16000, return_tensors="pt")
    ids = torch.randint(7, 320, (3, 20), generator=torch.Generator().manual_seed(0))
    theirs = model(input_features=heard["input_features"], decoder_input_ids=ids, output_hidden_states=True)
    memory, sizes = mine.encode(samples, lengths)
    torch.testing.assert_close(memory, theirs.encoder_last_hidden_state, atol=CLOSE, rtol=0)
    logits = mine.head(mine.states(memory, sizes, ids))
    torch.testing.assert_close(logits, theirs.logits, atol=CLOSE, rtol=0)
    cache, step = mine.begin(memory, ids[:, :5])
    for t in range(5, 20):
        torch.testing.assert_close(step, theirs.logits[:, t - 1], atol=CLOSE, rtol=0)
        step = mine.step(ids[:, t], cache)


@torch.inference_mode()
@pytest.mark.parametrize("language", ["en", "zh"])
def test_texts_are_those_of_transformers_greedy_search(tmp_path: Path, language: str) -> None:
    there, model, made = folder(tmp_path / "there")
    task, mine = ours(there, language=language)
    heard = made([wave.astype(np.float32) / 32768 for wave in sounds()], sampling_rate=16000, return_tensors="pt")
    prompt = task.prompts.ids(language)
    assert prompt == [1, {"en": 2, "zh": 3}[language], 4, 5]
    state = model.get_encoder()(heard["input_features"])
    ids = torch.tensor([prompt] * 3)
    for _ in range(36):  # the plain way: the whole text again for each token
        logits = model(encoder_outputs=state, decoder_input_ids=ids).logits[:, -1]
        logits[:, 1:7] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    memory, _ = mine.encode(*batch(sounds()))
    found = whisper.write(mine, memory, task.prompts, language)
    for row, one in zip(ids[:, 4:].tolist(), found, strict=True):
        assert one.ids == (row[: row.index(0)] if 0 in row else row) and len(one.ids) <= 36
    answers = task.predict(mine, dict(zip(("audio", "audio_lengths"), batch(sounds()), strict=True)), {})
    assert [a["text"] for a in answers] == [task.units.decode(one.ids).strip() for one in found]
    assert len({tuple(one.ids) for one in found}) > 1 and any(len(set(one.ids)) > 2 for one in found), found


def test_the_language_is_the_likeliest_unless_it_is_told(tmp_path: Path) -> None:
    there, _, _ = folder(tmp_path / "there")
    task, mine = ours(there)
    with torch.inference_mode():
        memory, _ = mine.encode(*batch(sounds()))
        _, logits = mine.begin(memory, torch.tensor([[1]] * 3))
        expected = (logits[:, 2] < logits[:, 3]).long() + 2
        assert whisper.prompted(mine, memory, task.prompts, None)[:, 1].tolist() == expected.tolist()
    with pytest.raises(UserError, match="en, zh"):
        ours(there, language="fr")
    for ask in ({"decoding": "joint"}, {"timestamps": True}):
        with pytest.raises(UserError, match="CTC"):
            task.predict(mine, {"audio_lengths": torch.tensor([1])}, ask)


def recipe(base: Path, **more: Any) -> Path:
    base.mkdir()
    lines = ["audio\ttext"]
    for i in range(8):
        (base / f"{i}.wav").write_bytes(wav(np.roll(sounds()[i % 3], 999 * i)))
        lines.append(f"{i}.wav\tThe room was clean, {i}")
    (base / "m.tsv").write_text("\n".join(lines) + "\n")
    held = {"task": "speech-recognition", "name": "w", "data": {"train": str(base / "m.tsv"), "split": {"test": 0}},
            "model": {"from": str(base.parent / "there")}, "options": {"language": "en"},
            "train": {"steps": 0, "batch_size": 2, "threads": 1, "precision": "float32"}, **more}  # fmt: skip
    (base / "r.yaml").write_text(json.dumps(held))
    return base / "r.yaml"


def test_a_run_without_a_step_is_the_folder_and_steps_learn(tmp_path: Path) -> None:
    there, _, _ = folder(tmp_path / "there")
    path = recipe(tmp_path / "work")
    assert recipes.load(path, [], find=find).options.max_seconds == SECONDS
    run = train(path, run=tmp_path / "run", progress=False)
    again = open_run(run.path)
    wave = sounds()[2]
    one, two = run.predict([(wave, 16000)])[0], again.predict([(wave, 16000)])[0]
    task, mine = ours(there, language="en")
    answer, = task.predict(mine, dict(zip(("audio", "audio_lengths"), batch([wave]), strict=True)), {})
    assert one == two == answer
    done = export(again, tmp_path / "back", texts=3)
    assert done.kind == "WhisperForConditionalGeneration" and done.proof is not None and done.proof.rows == 3
    old, new = (load_file(path / "model.safetensors") for path in (there, done.path))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    written = transformers.WhisperForConditionalGeneration.from_pretrained(done.path).eval()
    heard = transformers.WhisperFeatureExtractor.from_pretrained(done.path)(
        wave.astype(np.float32) / 32768, sampling_rate=16000, return_tensors="pt")
    ids = written.generate(heard["input_features"], language="en", task="transcribe", do_sample=False)[0].tolist()
    said = transformers.AutoTokenizer.from_pretrained(done.path).decode(ids, skip_special_tokens=True)
    assert said.strip() == answer["text"]
    long = np.concatenate([*sounds(), *sounds()])  # longer than a window: in pieces
    assert again.predict([(long, 16000)])[0]["seconds"] == round(len(long) / 16000, 3)
    learnt = train(path, ["train.steps=30", "train.lr=0.003", "train.optimizer=adamw", "model.dropout=0"],
                   run=tmp_path / "learnt", progress=False)  # fmt: skip
    losses = [json.loads(line) for line in (learnt.path / "log.jsonl").read_text().splitlines()]
    found = [line["loss"] for line in losses if "loss" in line]
    assert found[-1] < 0.6 * found[0]
    assert isinstance(learnt, Run) and "wer" in learnt.evaluate(part="valid", progress=False)["metrics"]


@pytest.mark.parametrize(("change", "said"), [
    ({"decoder_ffn_dim": 64}, "decoder_ffn_dim"),
    ({"scale_embedding": True}, "scale_embedding"),
    ({"max_source_positions": 1 << 20}, "max_source_positions"),
    ({"num_mel_bins": 1 << 20}, "num_mel_bins"),
    ({"max_target_positions": 50}, r"is \(40, 32\); by config.json it must be \(50, 32\)"),
    ({"encoder_layers": 5}, "5 layers"),
    ({"vocab_size": 10}, r"\(10, 32\)"),
    ({"activation_function": "silu"}, "activation_function"),
])  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    there, _, _ = folder(tmp_path / "there")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        open_origin(there).codec()


def test_other_frames_missing_tensors_and_other_tasks_are_refused(tmp_path: Path) -> None:
    there, _, _ = folder(tmp_path / "there")
    settings = json.loads((there / "preprocessor_config.json").read_text())
    for key, value in (("feature_size", 64), ("hop_length", 100), ("do_normalize", True), ("chunk_length", 30)):
        (there / "preprocessor_config.json").write_text(json.dumps({**settings, key: value}))
        with pytest.raises(UserError, match=key):
            open_origin(there)
    (there / "preprocessor_config.json").write_text(json.dumps(settings))
    path = recipe(tmp_path / "work")
    for more in ("options.ctc_weight=0.5", "options.mels=40", "options.front=plain", "model.d_model=64"):
        with pytest.raises(UserError, match=more.split("=")[0].split(".")[1]):
            recipes.load(path, [more], find=find)
    text = json.loads(path.read_text()) | {"task": "text-classification", "options": {}}
    (path.parent / "t.yaml").write_text(json.dumps(text))
    with pytest.raises(UserError, match="read recordings"):
        train(path.parent / "t.yaml", run=tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="greedily"):
        train(path, ["options.decoding=joint"], run=tmp_path / "run", progress=False)
    for name in ("encoder.conv1.weight", "decoder.layers.2.encoder_attn.v_proj.bias"):
        held = load_file(there / "model.safetensors")
        held.pop(f"model.{name}")
        save_file(held, there / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=name.rsplit(".", 1)[0]):
            open_origin(there)
