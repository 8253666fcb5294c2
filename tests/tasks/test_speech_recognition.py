"""Recordings and texts in every shape a person keeps them in, long recordings in pieces, times of words."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from multihead import prepare
from multihead import recipe as recipes
from multihead.codec.audio import AudioCodec, wav
from multihead.codec.text import TextCodec
from multihead.codec.transcript import PinyinCodec
from multihead.data.rows import open_rows
from multihead.errors import UserError
from multihead.generation.ctc import prefix_beam
from multihead.init import write_recipe
from multihead.run import RunFolder
from multihead.task import find
from multihead.tasks.speech import _report as told
from multihead.tasks.speech._recogniser import heard
from multihead.tasks.speech.speech_recognition import SpeechRecognition
from multihead.train import train
from multihead.transformer.config import TransformerConfig

COLUMNS = SpeechRecognition.columns


def sound(seconds: float = 0.4, seed: int = 0, rate: int = 16000, loud: float = 3000) -> bytes:
    wave = np.random.default_rng(seed).normal(0, loud, int(seconds * rate))
    return wav(wave.clip(-32768, 32767).astype(np.int16), rate)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "speech"
    for i, name in enumerate(("ann/one", "ann/two", "bob/three")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.wav").write_bytes(sound(seed=i))
        (folder / f"{name}{'.lab' if i else '.txt'}").write_text(f"text {i}\n")
    return folder


def packed(folder: Path, out: Path, more: dict[str, str] | None = None) -> Path:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    files |= {name: text.encode() for name, text in (more or {}).items()}
    if out.suffix == ".zip":
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return out
    with tarfile.open(out, "w:gz" if out.suffix == ".gz" else "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out


def read(path: Path, **more) -> list[tuple[str, str]]:
    rows = open_rows(str(path), COLUMNS, **more)
    return [(row["text"], row["audio"]) for row in rows]


def test_manifests_folders_and_archives_give_the_same_rows(recordings: Path, tmp_path: Path):
    expected = read(recordings)
    assert [text for text, _ in expected] == ["text 0", "text 1", "text 2"]
    assert [row["speaker"] for row in open_rows(str(recordings), COLUMNS)] == ["ann", "ann", "bob"]
    assert sorted(read(packed(recordings, tmp_path / "a.tar.gz"))) == sorted(expected)
    assert sorted(read(packed(recordings, tmp_path / "a.zip"))) == sorted(expected)
    names = ["speech/ann/one.wav", "speech/ann/two.wav", "speech/bob/three.wav"]
    tsv = "".join(f"{name}\ttext {i}\tx\n" for i, name in enumerate(names))
    (tmp_path / "m.tsv").write_text("wav\tsentence\tspeaker\n" + tsv)
    (tmp_path / "bare.tsv").write_text(tsv)
    (tmp_path / "m.csv").write_text("audio,text\n" + "".join(f"{n},text {i}\n" for i, n in enumerate(names)))
    lines = (json.dumps({"audio_filepath": n, "text": f"text {i}"}) for i, n in enumerate(names))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    for name in ("m.tsv", "m.csv", "m.jsonl"):
        assert read(tmp_path / name) == expected, name
    assert read(tmp_path / "bare.tsv", mapping={"audio": "1", "text": "2"}) == expected
    listed = "file\ttext\n" + "".join(f"{n.removeprefix('speech/')}\ttext {i}\n" for i, n in enumerate(names))
    assert sorted(read(packed(recordings, tmp_path / "b.tar", {"train.tsv": listed}))) == sorted(expected)


def test_what_cannot_be_read_is_named(recordings: Path, tmp_path: Path):
    (recordings / "ann/four.wav").write_bytes(b"RIFF but no sound")
    (recordings / "ann/five.wav").write_bytes(sound(seed=9))
    rows = open_rows(str(recordings), COLUMNS)
    assert len(list(rows)) == 3
    told_of = {p.where.split("/")[-1]: p.message for p in rows.rejected}
    assert "no text lies beside" in told_of["five.wav"] and "no recording" in told_of["four.wav"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "a.wav").write_bytes(sound())
    with pytest.raises(UserError, match="have no texts"):
        open_rows(str(bare), COLUMNS)
    (tmp_path / "m.csv").write_text("audio,text\n../../etc/passwd.wav,x\nhttp://x/y.wav,x\nspeech/none.wav,x\n")
    rows = open_rows(str(tmp_path / "m.csv"), COLUMNS)
    assert not list(rows)
    assert [w in p.message for p, w in zip(rows.rejected, ("outside", "network", "no recording"), strict=True)]


def test_init_writes_a_recipe_that_prepares_and_the_report_names_what_is_odd(tmp_path: Path):
    lines = ["audio\ttext"]
    for i in range(30):
        (tmp_path / f"{i}.wav").write_bytes(sound(seed=i))
        lines.append(f"{i}.wav\tyes")
    for name, content in (("silent", wav(np.zeros(8000, np.int16))), ("clipped", sound(loud=60000)),
                          ("rate", sound(rate=8000)), ("unfit", sound(0.1))):  # fmt: skip
        (tmp_path / f"{name}.wav").write_bytes(content)
        lines.append(f"{name}.wav\t{'a text that is much too long' if name == 'unfit' else 'no'}")
    (tmp_path / "m.tsv").write_text("\n".join(lines) + "\n")
    write_recipe("speech-recognition", [str(tmp_path / "m.tsv")], tmp_path / "mine.yaml")
    settings = ["data.max_rejected=0.1", "data.split.valid=0", "data.split.test=0", "options.mels=16"]
    recipe = recipes.load(tmp_path / "mine.yaml", settings, find=find)
    task = prepare.make_task(recipe, tmp_path)
    report = prepare.prepare(recipe, task, RunFolder.create(tmp_path / "run"))
    assert report["parts"]["train"]["issues"] == {"silent": 1, "clipped": 1, "another_rate": 1}
    assert "hardly belongs" in report["rejected"]["examples"][0]["message"]
    assert report["rejected"]["examples"][0]["where"].endswith("m.tsv:35")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    task = SpeechRecognition(SpeechRecognition.Options(mels=16, channels=4, decoder_layers=1, max_seconds=4, chunk=4))
    task.codec, task.units = AudioCodec(16, np.zeros(16), np.ones(16)), TextCodec.fit(["abcd e"], "char", 100)
    made = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2, conv_kernel=3)).eval()
    torch.nn.init.normal_(made.ctc.weight, std=3)
    return task, made


@torch.no_grad()
def test_a_long_recording_is_read_in_pieces_of_the_right_length(model):
    _, made = model
    for samples in (1600, 64000, 64001, 100_001, 200_000):
        x = torch.from_numpy(np.random.default_rng(0).normal(0, 3000, samples).astype(np.int16))[None]
        (whole, memory), = heard(made, x, torch.tensor([samples]), 60, 1)
        (pieces, none), = heard(made, x, torch.tensor([samples]), 4, 1)
        assert whole.shape == pieces.shape and len(whole) == ((samples // 160 + 2) // 2 + 1) // 2
        assert (none is None) == (samples > 64000) and memory is not None


@torch.no_grad()
def test_every_way_of_decoding_gives_a_text_and_its_words(model):
    task, made = model
    samples = torch.from_numpy(np.random.default_rng(1).normal(0, 3000, 12000).astype(np.int16))[None]
    batch = {"audio": samples, "audio_lengths": torch.tensor([12000])}
    greedy, ctc, joint = (task.predict(made, batch, {"decoding": d, "timestamps": True})[0]
                          for d in ("greedy", "ctc", "joint"))  # fmt: skip
    for answer in (greedy, ctc, joint):
        assert answer["seconds"] == 0.75 and isinstance(answer["text"], str)
        assert "".join(w["word"] for w in answer["words"]) == answer["text"].replace(" ", "")
    with pytest.raises(UserError, match="decoding"):
        task.predict(made, batch, {"decoding": "loud"})


def test_words_get_times_from_their_tokens():
    units = TextCodec.fit(["ab c你好"], "char", 100)
    ids = units.encode("ab c你好").tolist()
    logp = np.full((40, units.vocab_size), -20.0)
    logp[:, 0] = -0.1
    for k, token in enumerate(ids):
        logp[3 + 5 * k : 5 + 5 * k, token] = 0.0
    found = [(w["word"], w["start"], w["end"]) for w in told.timed(units, logp, ids, 1.18)]
    assert found == [("ab", 0.12, 0.4), ("c", 0.72, 0.8), ("你", 0.92, 1.0), ("好", 1.12, 1.18)]
    pinyin = PinyinCodec.fit(["中国"])
    assert [w["word"] for w in told.timed(pinyin, np.zeros((9, 9)), pinyin.encode("中国").tolist(), 9)] == [
        "zhong1", "guo2"]  # fmt: skip


def test_requests_take_files_bytes_and_samples_but_no_paths_as_texts(tmp_path: Path):
    task = SpeechRecognition()
    (tmp_path / "a.wav").write_bytes(sound())
    uri = task.request(tmp_path / "a.wav")["audio"]
    assert uri == task.request(sound())["audio"] == task.request({"audio": uri})["audio"]
    assert task.request((np.zeros(800, np.float32), 16000))["audio"].startswith("data:audio/wav")
    assert task.request(str(tmp_path / "a.wav"))["audio"] == str(tmp_path / "a.wav")


@torch.no_grad()
def test_silence_is_cut_and_times_are_those_of_the_whole(model):
    plain, made = model
    task = SpeechRecognition(plain.options.model_copy(update={"trim": 40.0, "pause": 0.2}))
    task.codec, task.units = plain.codec, plain.units
    rng = np.random.default_rng(2)
    loud, hush = rng.normal(0, 6000, 8000).astype(np.int16), rng.normal(0, 3, 16000).astype(np.int16)
    whole = np.concatenate((hush, loud, hush, loud, hush))
    example = task.encode({"audio": task.request((whole, 16000))["audio"]})
    assert int(example["whole"]) == len(whole) and abs(len(example["audio"]) - (16000 + 3200 + 4 * 2400)) <= 320
    answer, = task.predict(made, task.collate([example]), {"timestamps": True, "decoding": "ctc"})
    assert answer["seconds"] == 4.0 and answer["words"]
    assert all(0.8 <= w["start"] <= w["end"] <= 3.2 for w in answer["words"])
    words = [{"start": 0.0, "end": 0.65}, {"start": 0.8, "end": 1.0}]
    told.put_back(words, np.array([[16000, 28000], [40000, 52000]]))
    assert words == [{"start": 1.0, "end": 1.65}, {"start": 2.55, "end": 2.75}]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    (folder / "lines.txt").write_text("abcd e\nad ed\nbad cab\n" * 20)
    (folder / "lm.yaml").write_text(
        f"task: text-generation\nname: lm\ndata: {{train: {folder / 'lines.txt'}, split: {{valid: 0}}}}\n"
        "options: {tokenizer: char, context: 16}\nmodel: {d_model: 16, num_layers: 1, num_heads: 2, max_length: 64}\n"
        "train: {steps: 2, batch_size: 4}\n")
    return train(folder / "lm.yaml", run=folder / "run", progress=False).path


@torch.no_grad()
def test_a_language_model_is_copied_into_the_run_and_adds_its_say(model, language_model: Path, tmp_path: Path):
    plain, made = model
    for i in range(4):
        (tmp_path / f"{i}.wav").write_bytes(sound(seed=i))
    (tmp_path / "m.tsv").write_text("audio\ttext\n" + "".join(f"{i}.wav\tabcd e\n" for i in range(4)))
    moved = tmp_path / "lm"
    shutil.copytree(language_model, moved)
    (tmp_path / "r.yaml").write_text(
        f"task: speech-recognition\nname: r\ndata: {{train: {tmp_path / 'm.tsv'}, split: {{valid: 0, test: 0}}}}\n"
        f"options: {{mels: 16, language_model: {moved}, decoding: ctc, lm_weight: 0.7}}\n")
    recipe = recipes.load(tmp_path / "r.yaml", [], find=find)
    task = prepare.make_task(recipe, tmp_path)
    prepare.prepare(recipe, task, RunFolder.create(tmp_path / "run"))
    shutil.rmtree(moved)  # the run holds a copy
    again = SpeechRecognition(recipe.options)
    again.load(tmp_path / "run" / "codec")
    assert again.fused is not None and again.units.vocab_size == plain.units.vocab_size
    samples = torch.from_numpy(np.random.default_rng(1).normal(0, 3000, 12000).astype(np.int16))[None]
    batch = {"audio": samples, "audio_lengths": torch.tensor([12000])}
    (logp, _), = heard(made, samples, torch.tensor([12000]), 4, 1)
    logp[:, [1, 2, 3]] = -1e9
    texts = {plain.units.decode(r.ids): r.score for r in prefix_beam(logp, beam=64)}
    says = dict(zip(texts, again.fused.texts([text.strip() for text in texts]), strict=True))
    for weight in (0.7, 3.0):
        answer, = again.predict(made, batch, {"lm_weight": weight, "beam": 64})
        best = max(texts, key=lambda text: texts[text] + weight * says[text])
        assert answer["text"] == best.strip()
    without, = again.predict(made, batch, {"lm_weight": 0})
    assert without == plain.predict(made, batch, {"decoding": "ctc"})[0]
    joint, = again.predict(made, batch, {"decoding": "joint"})
    assert isinstance(joint["text"], str)
    for ask, said in (({"lm_weight": -1}, "number"), ({"lm_weight": True}, "number"), ({"lm_weight": "x"}, "number")):
        with pytest.raises(UserError, match=said):
            again.predict(made, batch, ask)
    with pytest.raises(UserError, match="no language model"):
        plain.predict(made, batch, {"lm_weight": 0.5})


def test_a_language_model_is_one_of_text_generation_and_is_heard(language_model: Path, tmp_path: Path):
    rows = [{"audio": "data:audio/wav;base64,", "text": "a"}]
    with pytest.raises(UserError, match="ctc and joint"):
        SpeechRecognition(SpeechRecognition.Options(language_model=str(language_model))).fit(rows)
    with pytest.raises(UserError, match="nowhere"):
        SpeechRecognition(SpeechRecognition.Options(language_model=str(tmp_path / "nowhere"))).fit(rows)
