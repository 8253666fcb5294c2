"""text-to-speech: from spoken letters to speech, alone and over the OpenAI API; alignments against trying all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import cli
from multihead.codec.audio import RATE, decoded, wav
from multihead.codec.voice import HOP
from multihead.data.audio import from_uri, kind_of, to_uri
from multihead.errors import UserError
from multihead.predict import encode
from multihead.tasks.speech._alignment import aligned, likelihood, search, spread, straight
from multihead.tasks.speech._reading import Reading, plain, sentences
from multihead.tasks.speech._synthesiser import whole_frames
from multihead.tasks.speech.text_to_speech import TextToSpeech
from multihead.train import train
from multihead.transformer.config import TransformerConfig

TONES = {"a": 400, "b": 1000, "c": 2200}
PARTS = {"high": 1.3, "low": 1.0}
"""Two speakers: one says every letter a third higher."""


def said(text: str, voice: str = "low", seed: int = 0) -> bytes:
    """A tone of about a tenth of a second for every letter, as a WAV file."""
    rng = np.random.default_rng([seed, *text.encode()])
    parts = []
    for letter in text:
        t = np.arange(int(RATE * rng.uniform(0.09, 0.12))) / RATE
        parts.append(np.sin(2 * np.pi * TONES[letter] * PARTS[voice] * t) * np.hanning(len(t)) ** 0.25)
    return wav((np.concatenate(parts) * 8000 + rng.normal(0, 20, sum(map(len, parts)))).astype(np.int16))


def rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    found = []
    for i in range(count):
        text, voice = "".join(rng.choice(list(TONES), size=int(rng.integers(2, 6)))), ("high", "low")[i % 2]
        found.append({"audio": to_uri(said(text, voice, i))[0], "text": text, "speaker": voice})
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained until letters and speakers are told apart."""
    folder = tmp_path_factory.mktemp("tones")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(120)), "utf-8")
    recipe = {
        "task": "text-to-speech", "name": "tones", "data": {"train": str(folder / "rows.jsonl")},
        "options": {"mels": 40, "text_layers": 1, "steps": 4, "samples": 2, "decoder": "regression", "trim": 0.0,
                    "max_seconds": 5},
        "model": {"d_model": 48, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
        "train": {"steps": 160, "batch_size": 16, "lr": 0.01, "threads": 1, "ema": 0.9, "precision": "float32",
                  "eval_every": 160, "optimizer": "adamw"},
        "evaluate": {"bootstrap": 20},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    return train(folder / "recipe.yaml", run=folder / "run", progress=False)


def pitches(answer: dict[str, Any], count: int) -> list[float]:
    """The loudest frequency of each of `count` even parts of a recording."""
    samples = decoded(from_uri(answer["audio"]))[0].astype(float)
    found = []
    for part in np.array_split(samples, count):
        middle = part[len(part) // 4 : len(part) * 3 // 4]
        found.append(float(np.abs(np.fft.rfft(middle * np.hanning(len(middle)), RATE)).argmax()))
    return found


# -- alignments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "frames"), [(1, 1), (1, 4), (3, 3), (3, 7), (4, 9)])
def test_the_alignment_is_the_best_of_all(tokens: int, frames: int) -> None:
    score = np.random.default_rng(tokens * 100 + frames).normal(size=(tokens, frames)).astype(np.float32)
    best = max(
        sum(score[s, bounds[s] : bounds[s + 1]].sum() for s in range(tokens))
        for cuts in itertools.combinations(range(1, frames), tokens - 1)
        for bounds in [(0, *cuts, frames)]
    )
    # Beside it in the batch lies a longer row, and behind its end whatever may be there.
    batch = np.full((2, tokens + 2, frames + 5), 9.0, np.float32)
    batch[0, :tokens, :frames] = score
    found = search(batch, np.array([tokens, tokens + 2]), np.array([frames, frames + 5]))
    assert found[0, :tokens].min() >= 1 and found[0].sum() == frames and found[1].sum() == frames + 5
    ends = np.cumsum(found[0, :tokens])
    total = sum(score[s, e - d : e].sum() for s, (d, e) in enumerate(zip(found[0], ends, strict=False)))
    assert total == pytest.approx(best, abs=1e-5)


def test_likelihood_is_that_of_normal_distributions() -> None:
    mean, mel = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    normal = torch.distributions.Normal(mean[:, :, None], 1.0).log_prob(mel[:, None]).sum(-1)
    torch.testing.assert_close(likelihood(mean, mel), normal + 2.5 * np.log(2 * np.pi))


def test_a_model_that_knows_nothing_spreads_tokens_evenly() -> None:
    tokens, frames = torch.tensor([4, 3]), torch.tensor([20, 9])
    found = aligned(torch.zeros(2, 4, 5), torch.randn(2, 20, 5), tokens, frames, 20.0)
    assert found[0].tolist() == [5, 5, 5, 5] and found[1, :3].tolist() == [3, 3, 3]
    assert straight(np.array([4]), np.array([20]), 4, 20).max() <= 0


def test_frames_find_their_tokens_and_rounding_adds_no_error() -> None:
    assert spread(torch.tensor([[2, 0, 3]]), 7).tolist() == [[0, 0, 2, 2, 2, 2, 2]]
    lengths = torch.full((40,), 2.4).log()
    assert int(whole_frames(lengths, 1.0).sum()) == 96 and int(whole_frames(lengths, 2.0).sum()) == 48


# -- reading -----------------------------------------------------------------------------------------------------------


def test_texts_are_read_in_one_form_and_cut_at_sentences() -> None:
    assert plain("  ＡＢＣ’s “one”…  Two!! ") == "abc's \"one\". two!"
    text = "One two. Three, four five six seven eight! Nine."
    assert sentences(text, 30)[0] == "One two. Three," and sentences(text, 30)[-1] == "Nine."
    assert all(len(piece) <= 20 for piece in sentences(text, 20))
    assert "".join(sentences(text, 20)).replace(" ", "") == text.replace(" ", "")
    assert sentences("It is 3.5 degrees. No more.", 20) == ["It is 3.5 degrees.", "No more."]
    assert sentences("你好,世界。再见!明天见。", 6) == ["你好,世界。", "再见!", "明天见。"]


def test_chinese_is_read_as_pinyin_with_its_numbers() -> None:
    pytest.importorskip("pypinyin")
    pytest.importorskip("cn2an")
    reading = Reading.fit(["你好，三十一度。", "ni3"])
    assert reading.kind == "pinyin" and Reading.fit(["hello"]).kind == "char"
    assert reading.encode("你好").tolist() == reading.encode("ni3 hao3").tolist()
    assert reading.encode("31度").tolist() == reading.encode("三十一度").tolist()
    with pytest.raises(UserError, match="nothing"):
        reading.encode("𝄞")


# -- speech ------------------------------------------------------------------------------------------------------------


def test_it_says_what_it_is_told_in_the_voice_it_is_told(run: Any) -> None:
    for voice, by in PARTS.items():
        found = pitches(run.predict([{"text": "abca", "speaker": voice}])[0], 4)
        assert found == pytest.approx([TONES[letter] * by for letter in "abca"], rel=0.12), voice


def test_speed_scales_the_length_and_a_long_text_is_read_in_pieces(run: Any) -> None:
    one, two = (run.predict(["abcab"], speed=speed)[0]["seconds"] for speed in (1.0, 2.0))
    assert two == pytest.approx(one / 2, abs=3 * HOP / RATE)
    longer = run.predict(["abcab" * 6])[0]["seconds"]
    assert 4 < longer / one < 8
    with pytest.raises(UserError, match="characters"):
        run.predict(["a" * 1001])
    with pytest.raises(UserError, match="speed"):
        run.predict(["a"], speed=9)


def test_the_report_plays_and_shows(run: Any) -> None:
    found = run.evaluate(progress=False)
    assert {"loss", "mcd", "duration_error", "length_error"} <= set(found["metrics"])
    report = (run.path / "report.html").read_text("utf-8")
    assert report.count("<audio") == 4 and report.count('src="data:image/png') == 6 and "media-src data:" in report


def test_recordings_are_written_where_the_command_says(run: Any, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", str(run.path), "ab", "c", "--ask", "speed=1.5", "--out", str(tmp_path / "spoken")])
    assert left.value.code in (0, None)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(one["audio"]).name for one in told] == ["1.wav", "2.wav"]
    samples, rate = decoded(Path(told[0]["audio"]).read_bytes())
    assert rate == RATE and len(samples) / RATE == pytest.approx(told[0]["seconds"], abs=1e-3)


@pytest.mark.parametrize("kind", ["flow", "regression"])
def test_seeds_matter_to_a_flow_alone(kind: Any) -> None:
    task = TextToSpeech(TextToSpeech.Options(decoder=kind, mels=20, text_layers=1, steps=2, max_seconds=5))
    task.fit(rows(6))
    torch.manual_seed(0)
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    batch = task.collate([encode(task, {"text": "abc"})])
    with torch.no_grad():
        one, again, other = (task.predict(model, batch, {"seed": seed})[0]["audio"] for seed in (1, 1, 2))
    assert one == again and (one != other) == (kind == "flow")


def test_a_recogniser_of_ones_own_writes_down_what_is_said(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("jiwer")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(30)), "utf-8")
    recipe = {
        "task": "speech-recognition", "name": "heard", "data": {"train": str(tmp_path / "rows.jsonl")},
        "options": {"mels": 20, "channels": 4, "decoder_layers": 0, "max_seconds": 5, "chunk": 5},
        "model": {"d_model": 16, "num_layers": 1, "num_heads": 2},
        "train": {"steps": 2, "batch_size": 8, "threads": 1, "precision": "float32"}, "evaluate": {"bootstrap": 20},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    train(tmp_path / "recipe.yaml", run=tmp_path / "heard", progress=False)
    task = TextToSpeech(TextToSpeech.Options(mels=20, text_layers=1, max_seconds=5, recogniser=str(tmp_path / "heard")))
    task.fit(rows(4))
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    with torch.no_grad():
        answers = task.predict(model, task.collate([task.encode(row) for row in rows(4)]), {"evaluate": True})
    assert all(isinstance(answer["heard"], str) for answer in answers)
    perfect = [{**answer, "heard": row["text"]} for answer, row in zip(answers, rows(4), strict=True)]
    assert task.score(perfect, rows(4))["heard_cer"] == 0
    perfect[0]["heard"] = ""
    count = sum(len(row["text"]) for row in rows(4))
    assert task.score(perfect, rows(4))["heard_cer"] == pytest.approx(len(rows(4)[0]["text"]) / count)
    with pytest.raises(UserError, match="must be one of speech-recognition"):
        TextToSpeech(TextToSpeech.Options(recogniser=str(run.path))).fit(rows(4))


def test_what_cannot_be_learned_from_is_named() -> None:
    task = TextToSpeech(TextToSpeech.Options(mels=20))
    task.fit(rows(4))
    with pytest.raises(UserError, match="too many"):
        task.check({"audio": to_uri(said("ab"))[0], "text": "abc" * 20}, "train")
    with pytest.raises(UserError, match="no voice 'nobody'; there are: high, low"):
        encode(task, {"text": "abc", "speaker": "nobody"})


# -- over the API ------------------------------------------------------------------------------------------------------


@pytest.fixture
def api(run: Any) -> Any:
    openai = pytest.importorskip("openai")
    testclient = pytest.importorskip("starlette.testclient")
    from multihead.serve.app import Served, ServeSettings, create_app

    app = create_app([Served("tones", run.task, run.model)], ServeSettings())
    with testclient.TestClient(app, base_url="http://localhost") as client:
        yield openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=client)


@pytest.mark.parametrize(("form", "kind"), [("wav", "audio/wav"), ("flac", "audio/flac"), ("mp3", "audio/mpeg"),
                                            ("opus", "audio/ogg")])  # fmt: skip
def test_the_openai_client_gets_the_recording_that_predict_makes(run: Any, api: Any, form: Any, kind: str) -> None:
    raw = api.audio.speech.create(model="tones", input="abc", voice="high", response_format=form, speed=1.25).content
    assert kind_of(raw) == kind
    expected = from_uri(run.predict([{"text": "abc", "speaker": "high"}], speed=1.25)[0]["audio"])
    if form == "wav":
        assert raw == expected
    assert abs(len(decoded(raw)[0]) - len(decoded(expected)[0])) < 0.1 * RATE


@pytest.mark.parametrize(("wish", "said"), [
    ({"voice": "nobody"}, "high, low"), ({"speed": 5.0}, "speed"), ({"speed": 0.1}, "speed"), ({"input": ""}, "input"),
    ({"input": "a" * 5000}, "input"), ({"input": "a" * 1500}, "1,000"), ({"response_format": "aac"}, "response_format"),
    ({"input": "???"}, "nothing"), ({"extra_body": {"steps": 0}}, "steps"), ({"extra_body": {"pitch": 2}}, "pitch"),
    ({"instructions": "sadly"}, "instructions"),
])  # fmt: skip
def test_what_cannot_be_said_is_refused_by_name(api: Any, wish: dict, said: str) -> None:
    import openai

    with pytest.raises(openai.APIStatusError, match=said) as refused:
        api.audio.speech.create(**{"model": "tones", "input": "abc", "voice": "low", **wish})
    assert refused.value.status_code == 422


@pytest.mark.parametrize("body", [
    b"", b"[]", b'"abc"', b"{", b"\xff\xfe", b'{"input": 5}', b'{"input": null}', b'{"input": "\\ud800"}',
    b'{"input": "abc", "speed": NaN}', b'{"input": "abc", "speed": 1e999}', b'{"input": "abc", "seed": -1}',
    b'{"input": "abc", "seed": 1e30}', b'{"input": "abc", "voice": ["low"]}', b'{"input": "abc", "model": "\\u0000"}',
    b'{"input": "\\u0000\\u0001\\u202e"}', b'{"input": "abc", "response_format": "../wav"}',
])  # fmt: skip
def test_bodies_made_to_do_harm_are_refused(api: Any, body: bytes) -> None:
    reply = api._client.post("/v1/audio/speech", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= reply.status_code < 500 and reply.json()["error"]["message"], reply.text
