"""video-classification: its parts against closed forms, the whole from folders of clips to a served answer."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead import cli
from multihead.data.rows import open_rows
from multihead.data.video import ClipFile, read_clip, to_uri
from multihead.errors import UserError
from multihead.predict import encode
from multihead.tasks.vision import _augment as noise
from multihead.tasks.vision.video_classification import VideoClassification
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from tests import clips

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("av")
KINDS = ("still", "down", "right")


def moving(kind: str, rng: np.random.Generator, side: int = 24, count: int = 8) -> list[np.ndarray]:
    """A bright square on noise that lies still, sinks or wanders, from anywhere."""
    row, column = rng.integers(side, size=2)
    found = []
    for i in range(count):
        frame = rng.integers(0, 60, (side, side, 3))
        rows, columns = (row + (kind == "down") * 3 * i) % side, (column + (kind == "right") * 3 * i) % side
        frame[np.ix_((rows + np.arange(8)) % side, (columns + np.arange(8)) % side)] += 180
        found.append(frame.astype(np.uint8))
    return found


def made(**options: Any) -> VideoClassification:
    """A task with a codec for grey clips of 8 × 8, two frames, and labels a, b."""
    chosen = {"size": 8, "patch": 4, "frames": 2, "tubelet": 1, "jitter": 3} | options
    task = VideoClassification(VideoClassification.Options(**chosen))
    uri = to_uri(clips.clip(clips.ramp(6, 16, 16)))[0]
    task.fit([{"video": uri, "label": name} for name in "ab"])
    return task


# -- noise -------------------------------------------------------------------------------------------------------------


def test_all_frames_of_a_clip_are_bent_alike() -> None:
    """Bent as a clip, each frame is what it would be bent alone; brightness and the erased box are the clip's."""
    task, rng = made(), np.random.default_rng(0)
    video = torch.from_numpy(rng.integers(256, size=(3, 4, 1, 8, 8), dtype=np.uint8))
    drawn = [noise.drawn(rng, VideoClassification.Options(operations=3, shift=0.2), 1, 8) for _ in range(3)]
    batch = noise.stacked(drawn)
    batch["tint"][:, :, 1] = 1.0  # contrast is about the mean of all frames
    whole = noise.bent(video, batch, task._normal, 0)
    frames = [noise.bent(video[:, i], batch, task._normal, 0) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(frames, dim=1))
    colour = torch.from_numpy(rng.integers(256, size=(3, 4, 3, 8, 8), dtype=np.uint8))
    whole = noise.bent(colour, batch, lambda x: x, 0).view(3, 4, 3, 8, 8)
    torch.testing.assert_close(whole[:, 2], noise.bent(colour[:, 2], batch, lambda x: x, 0))


def test_training_draws_frames_about_their_places_and_answers_take_the_middle_ones() -> None:
    task = made()
    example = task.encode({"video": to_uri(clips.clip(clips.ramp(6, 16, 16)))[0], "label": "a"})
    assert example["video"].shape == (6, 1, 8, 8)
    draws = {tuple(task._places(np.random.default_rng(i))) for i in range(60)}
    assert draws == {(a, b) for a in (0, 1, 2) for b in (3, 4, 5)} and task._places().tolist() == [1, 4]
    seen, share = task._seen(task.collate([example]))
    assert seen.shape == (1, 2, 1, 8, 8) and share is None
    torch.testing.assert_close(seen, task._normal(torch.from_numpy(example["video"][[1, 4]]).float()[None] / 255))
    bent = task.augment(example, np.random.default_rng(0))
    assert bent["video"].shape == (2, 1, 8, 8) and "warp" in bent


def test_options_that_do_not_go_together() -> None:
    for options in ({"frames": 6, "tubelet": 4}, {"jitter": 2}, {"size": 30, "patch": 4}):
        with pytest.raises(ValueError):
            VideoClassification.Options(**options)
    with pytest.raises(UserError, match="at least 8"):
        made().model(TransformerConfig(d_model=8, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="all clips have the same label"):
        VideoClassification().fit([{"video": "", "label": "a"}] * 3)


@pytest.mark.parametrize("pool", ["mean", "class", "attention"])
@pytest.mark.parametrize("attention", ["joint", "factorised"])
def test_a_clip_s_answer_does_not_depend_on_its_batch(pool: Any, attention: Any) -> None:
    torch.manual_seed(0)
    task = made(pool=pool, attention=attention, registers=1)
    model = task.model(TransformerConfig(d_model=16, num_layers=2, num_heads=2)).eval()
    x = torch.randn(3, 2, 1, 8, 8)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), rtol=1e-4, atol=1e-5)


# -- data --------------------------------------------------------------------------------------------------------------


def rows(where: Path, *paths: str) -> Any:
    return open_rows(list(paths), VideoClassification.columns, base=where)


def test_folders_of_clips_of_frames_and_tables_are_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in KINDS:
        (tmp_path / "data" / kind).mkdir(parents=True)
        for form in ("mp4", "gif"):
            (tmp_path / "data" / kind / f"1.{form}").write_bytes(clips.clip(moving(kind, rng), form))
        folder = tmp_path / "data" / kind / "frames 2"
        folder.mkdir()
        for i, frame in enumerate(moving(kind, rng)):
            Image.fromarray(frame).save(folder / f"{i}.jpg")
    found = rows(tmp_path, "data")
    read = list(found)
    assert len(read) == 9 and {row["label"] for row in read} == set(KINDS) and not found.rejected
    assert sum(row["video"].frames for row in read) == 3 and len(found.files) == 6 + 24
    assert all(isinstance(row["video"], ClipFile) for row in read) and len({row["video"] for row in read}) == 9
    lines = [{"clip": os.path.relpath(row["video"].paths[0].parent if row["video"].frames else row["video"].paths[0],
                                      tmp_path), "label": row["label"]} for row in read]  # fmt: skip
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["video"] for row in rows(tmp_path, "table.jsonl")] == [row["video"] for row in read]


def test_what_a_table_may_not_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.mp4").write_bytes(clips.clip(clips.ramp(3)))
    (tmp_path / "out.mp4").write_bytes(clips.clip(clips.ramp(3)))
    (tmp_path / "in" / "link.mp4").symlink_to(tmp_path / "out.mp4")
    (tmp_path / "in" / "jpeg.mp4").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    names = ["good.mp4", "../out.mp4", "link.mp4", "jpeg.mp4", "none.mp4", "https://example.org/a.mp4", ""]
    (tmp_path / "in" / "t.csv").write_text("video,label\n" + "".join(f"{name},a\n" for name in names))
    found = rows(tmp_path, "in/t.csv")
    assert len(list(found)) == 1 and len(found.rejected) == 6
    told = "\n".join(map(str, found.rejected))
    for word in ("outside the table's folder", "picture (JPEG)", "no clip 'none.mp4'", "network", "empty"):
        assert word in told, word


def test_a_request_is_a_clip_and_never_a_path(tmp_path: Path) -> None:
    task, raw = made(), clips.clip(clips.ramp(6, 16, 16))
    file = tmp_path / "a.mp4"
    file.write_bytes(raw)
    expected = encode(task, {"video": to_uri(raw)[0]})["video"]
    octets = "data:application/octet-stream;base64," + base64.b64encode(raw).decode()
    for body in (file, raw, to_uri(raw)[0], octets, {"video": file}):
        assert np.array_equal(encode(task, body)["video"], expected)
    hashed = str(read_clip(file)[0])
    for body in (str(file), {"video": str(file)}, hashed, {"video": "data:video/mp4;base64,AAAA"}, {"video": 3}, {}, 3):
        with pytest.raises(UserError):
            encode(task, body)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained on a folder of MP4s and WebMs, of a square that moves in one of three ways."""
    folder = tmp_path_factory.mktemp("moving")
    rng = np.random.default_rng(0)
    for i in range(150):
        kind = KINDS[i % 3]
        place = folder / "clips" / kind / f"{i}.{'webm' if i % 10 == 0 else 'mp4'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(clips.clip(moving(kind, rng), place.suffix[1:]))
    recipe = {
        "task": "video-classification", "name": "moving", "data": {"train": "clips"},
        "options": {"size": 24, "frames": 4, "tubelet": 2, "patch": 8, "flip": False, "operations": 0, "jitter": 1},
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2},
        "train": {"steps": 100, "batch_size": 32, "lr": 0.003, "threads": 1, "precision": "float32", "ema": 0.9},
        "evaluate": {"bootstrap": 20},
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return train(folder / "r.yaml", run=folder / "run", progress=False), folder


def test_it_learns_and_its_report_shows_strips(run: Any) -> None:
    trained, folder = run
    found = trained.evaluate(part="valid", progress=False)
    assert found["metrics"]["accuracy"]["value"] > 0.6
    line = json.loads((folder / "run" / "predictions.jsonl").read_text("utf-8").splitlines()[0])
    assert line["where"].endswith((".mp4", ".webm")) and line["input"] == {} and line["answer"]["label"]
    kept = list(trained.store("test").rows())
    assert all(row["video"].startswith("data:") for row in kept)
    wrong = [{"label": "still", "scores": {"still": 0.8, "down": 0.1, "right": 0.1}}] * len(kept)
    figures = trained.task.figures(wrong, kept)
    assert figures["mistakes"] and all(m["picture"].startswith("data:image/png") for m in figures["mistakes"])


def test_predict_takes_files_folders_and_globs(run: Any, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    trained, folder = run
    monkeypatch.chdir(folder)
    for inputs, count in ((["clips/down/1.mp4"], 1), (["clips/right/*.mp4", "clips/down/1.mp4"], 46)):
        with pytest.raises(SystemExit) as left:
            cli.main(["predict", "run", *inputs])
        told = capsys.readouterr()
        assert left.value.code == 0, told.err
        lines = [json.loads(line) for line in told.out.splitlines()]
        assert len(lines) == count and {line["label"] for line in lines} <= set(KINDS)
    assert trained.predict([folder / "clips/down/1.mp4"])[0]["label"] == lines[-1]["label"]
    (folder / "broken.mp4").write_bytes((folder / "clips/down/1.mp4").read_bytes()[:900])
    (folder / "jpeg.mp4").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    for bad in ("broken.mp4", "jpeg.mp4"):
        with pytest.raises(SystemExit) as left:
            cli.main(["predict", "run", "clips/down/1.mp4", bad])
        told = capsys.readouterr()
        assert left.value.code == 2 and told.err.count("\n") == 1 and bad in told.err and not told.out


def test_it_is_served(run: Any) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app
    from multihead.serving import examples

    trained, folder = run
    shown = examples(trained)
    assert len(shown) == 3 and all(one["video"].startswith("data:image/gif") for one in shown)
    app = create_app([Served("moving", trained.task, trained.model, examples=shown)], trained.recipe.serve)
    raw = (folder / "clips/down/1.mp4").read_bytes()
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        for given in (to_uri(raw)[0], shown[0]["video"]):
            reply = client.post("/v1/predict", json={"input": {"video": given}})
            assert reply.status_code == 200, reply.text
        alone = client.post("/v1/predict", json={"input": {"video": to_uri(raw)[0]}}).json()["answers"][0]["label"]
        assert alone == trained.predict([raw])[0]["label"]
        hashed = str(read_clip(folder / "clips/down/1.mp4")[0])
        for bad in (str(folder / "clips/down/1.mp4"), hashed, "data:video/mp4;base64,AAAA", to_uri(raw)[0][:400], 7,
                    to_uri(clips.sound_alone())[0], to_uri(clips.many_samples(True))[0]):  # fmt: skip
            refused = client.post("/v1/predict", json={"input": {"video": bad}})
            assert refused.status_code == 422 and refused.json()["error"]["message"], bad
