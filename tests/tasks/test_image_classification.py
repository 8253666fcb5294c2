"""image-classification: its parts against closed forms, the whole from a folder of pictures to a served answer."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from multihead import cli
from multihead.codec.image import ImageCodec
from multihead.data.images import to_uri
from multihead.errors import UserError
from multihead.metrics.vision import confused_pairs, top_accuracy
from multihead.predict import encode
from multihead.tasks.vision import _augment as noise
from multihead.tasks.vision import _maps as maps
from multihead.tasks.vision.image_classification import ImageClassification, PictureClassifier
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from multihead.transformer.patches import PatchInput, grid_sinusoids, patch_trunk, patches, rotary_grid

Image = pytest.importorskip("PIL.Image")
SIDE = 12


def made(**options: Any) -> ImageClassification:
    """A task with a codec for grey pictures of 12 × 12 and labels a, b, c."""
    task = ImageClassification(ImageClassification.Options(size=SIDE, **options))
    rows = [{"image": uri(np.full((SIDE, SIDE), 100 * i, np.uint8)), "label": name} for i, name in enumerate("abc")]
    task.fit(rows)
    return task


def uri(array: np.ndarray) -> str:
    height, width = array.shape
    return to_uri(b"P5 %d %d 255\n" % (width, height) + array.astype(np.uint8).tobytes())[0]


# -- patches and positions ---------------------------------------------------------------------------------------------


def test_patches_are_a_convolution_of_the_patch_s_stride() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 12, 12), torch.randn(8, 3, 4, 4)
    expected = F.conv2d(x, weight, stride=4).flatten(2).mT
    torch.testing.assert_close(patches(x, 4) @ weight.flatten(1).mT, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "none"])
def test_a_picture_s_vectors_do_not_depend_on_its_batch(stem: str, positions: Any) -> None:
    torch.manual_seed(0)
    config = TransformerConfig(d_model=16, num_layers=1, num_heads=2, positions=positions)
    entry = PatchInput(config, 1, 12, 4, stem, extra=2)
    x = torch.randn(5, 1, 12, 12)
    whole = entry(x)
    assert whole.shape == (5, entry.length, 16) == (5, 11, 16)
    torch.testing.assert_close(torch.cat([entry(row[None]) for row in x]), whole, rtol=1e-4, atol=1e-5)


def test_rotary_positions_see_differences_of_rows_and_columns_alone() -> None:
    """q·k after the rotation depends on where the two patches lie to each other, not on where they lie."""
    torch.manual_seed(0)
    grid, extra, head = 5, 2, 8
    cos, sin = rotary_grid(head, grid, extra, 100.0).unbind(1)
    assert torch.equal(cos[:extra], torch.ones(extra, head // 2)) and not sin[:extra].any()
    q, k = torch.randn(2, head)

    def turned(x: torch.Tensor, row: int, column: int) -> torch.Tensor:
        c, s = cos[extra + row * grid + column], sin[extra + row * grid + column]
        a, b = x.chunk(2)
        return torch.cat((a * c - b * s, b * c + a * s))

    for down, right in ((1, 0), (0, 2), (2, -1)):
        found = [turned(q, r, c) @ turned(k, r + down, c + right) for r, c in ((0, 1), (2, 2), (1, 2))]
        torch.testing.assert_close(torch.stack(found), found[0].expand(3), rtol=1e-4, atol=1e-4)
    assert abs(float(turned(q, 0, 0) @ turned(k, 0, 1) - turned(q, 0, 0) @ turned(k, 1, 0))) > 1e-3


def test_sinusoids_of_a_square_name_row_and_column() -> None:
    table = grid_sinusoids(3, 8).view(3, 3, 8)
    assert torch.equal(table[1, 0, :4], table[1, 2, :4]) and torch.equal(table[0, 1, 4:], table[2, 1, 4:])
    assert len(table.flatten(0, 1).unique(dim=0)) == 9


def test_without_positions_a_trunk_cannot_tell_where_a_patch_lies() -> None:
    torch.manual_seed(0)
    for positions, differs in (("none", False), ("rotary", True)):
        config = TransformerConfig(d_model=16, num_layers=2, num_heads=2, positions=positions)  # type: ignore[arg-type]
        trunk, x = patch_trunk(config, 3, 0), torch.randn(1, 9, 16)
        swapped = x[:, torch.tensor([1, 0, 2, 3, 4, 5, 6, 7, 8])]
        assert torch.allclose(trunk(x).mean(1), trunk(swapped).mean(1), atol=1e-5) is not differs


@pytest.mark.parametrize("pool", ["mean", "class", "attention"])
def test_pools_leave_registers_out(pool: Any) -> None:
    torch.manual_seed(0)
    task = made(pool=pool, registers=2)
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    assert model.input.length == 9 + 2 + (pool == "class")
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model(torch.randn(2, 1, SIDE, SIDE))
    assert seen[0].shape[1] == (1 if pool == "class" else 9)


# -- noise -------------------------------------------------------------------------------------------------------------


def bent(array: np.ndarray, warp: list[float]) -> np.ndarray:
    x = torch.from_numpy(array.astype(np.float32))[None, None]
    return noise.warped(x, torch.tensor([warp], dtype=torch.float32))[0, 0].numpy()


def test_a_warp_mirrors_shifts_and_turns() -> None:
    array = np.random.default_rng(0).random((8, 8))
    assert np.allclose(bent(array, [1, 0, 0, 0, 1, 0]), array, atol=1e-5)
    assert np.allclose(bent(array, [-1, 0, 0, 0, 1, 0]), array[:, ::-1], atol=1e-5)
    assert np.allclose(bent(array, [1, 0, 2 * 2 / 8, 0, 1, 0])[:, :6], array[:, 2:], atol=1e-5)
    assert np.allclose(bent(array, [0, -1, 0, 1, 0, 0]), np.rot90(array), atol=1e-5)


def test_shifts_are_whole_pixels_and_operations_as_many_as_asked_for() -> None:
    rng = np.random.default_rng(0)
    options = ImageClassification.Options(operations=0, shift=0.25, flip=False)
    found = np.stack([noise.drawn(rng, options, 1, 16)["warp"][0] for _ in range(200)]).reshape(-1, 2, 3)
    assert np.array_equal(found[:, :, :2], np.broadcast_to(np.eye(2, dtype=np.float32), (200, 2, 2)))
    moved = found[:, :, 2] * 8
    assert np.array_equal(moved, moved.round()) and set(np.unique(moved)) == set(range(-4, 5))
    tints = [noise.drawn(rng, ImageClassification.Options(operations=2), 1, 16) for _ in range(200)]
    changed = np.array([(t["tint"] != 1).sum() for t in tints])
    assert changed.max() == 2 and 0.6 < changed.mean() < 1.1  # 2 · 3/7 on average


def test_tints_keep_what_they_do_not_touch() -> None:
    x = torch.rand(1, 3, 6, 6) * 0.5 + 0.25
    one = torch.ones(1, 3)
    torch.testing.assert_close(noise.tinted(x, one), x)
    grey = noise.tinted(x, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand(1, 3, 6, 6))
    flat = noise.tinted(x, torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(flat, torch.full_like(x, float(x.mean())))
    torch.testing.assert_close(noise.tinted(x, torch.tensor([[0.5, 1.0, 1.0]])), x / 2)


def test_holes_and_pasted_boxes_are_as_large_as_they_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        hole = noise.hole(rng, 20)
        area = (hole[1] - hole[0]) * (hole[3] - hole[2])
        assert 0 <= hole[0] < hole[1] <= 20 and 0 <= hole[2] < hole[3] <= 20 and 1 <= area <= 0.45 * 400
        assert int(noise.within(torch.from_numpy(hole)[None], 20).sum()) == area
        found = noise.mix(rng, ImageClassification.Options(cutmix=1.0), 20)
        pasted = int(noise.within(torch.from_numpy(found[1:])[None], 20).sum())
        assert found[0] == pytest.approx(1 - pasted / 400)
    assert not noise.within(torch.zeros(1, 4), 20).any()


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pictures_and_their_losses_are_shared_alike(kind: str) -> None:
    """The loss of a mixed picture is the mean of two cross-entropies by the shares in which its pixels are mixed."""
    task = made(operations=0, flip=False, shift=0.0, label_smoothing=0.0, **{kind: 1.0})
    bright, dark = (task.encode({"image": uri(np.full((SIDE, SIDE), v, np.uint8)), "label": name})
                    for v, name in ((200, "a"), (100, "b")))  # fmt: skip
    task._others = [dark]  # type: ignore[assignment]
    batch = task.collate([task.augment(bright, np.random.default_rng(i)) for i in range(8)])
    x, share = task._seen(batch)
    assert share is not None and 0 <= float(share.min()) < float(share.max()) <= 1
    pixels = x * task.codec.std[0] + task.codec.mean[0]
    mean = pixels.mean((1, 2, 3)) * 255
    torch.testing.assert_close(mean, 100 + 100 * share, rtol=1e-3, atol=0.1)
    logits = torch.randn(8, 3)

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return logits

    logp = logits.log_softmax(-1)
    expected = -(share * logp[:, 0] + (1 - share) * logp[:, 1]).sum()
    found = task.loss(Fixed(), batch)
    torch.testing.assert_close(found.total, expected)
    assert found.count == 8


def test_mixing_does_not_depend_on_the_batch() -> None:
    """A batch of 4 is 2 × 2: what a picture is mixed with it draws itself."""
    task = made(mixup=0.5, cutmix=0.5)
    rng = np.random.default_rng(0)
    rows = [{"image": uri(rng.integers(256, size=(SIDE, SIDE))), "label": "abc"[i % 3]} for i in range(4)]
    examples = [task.encode(row) for row in rows]
    task._others = examples  # type: ignore[assignment]
    bent = [task.augment(example, np.random.default_rng(i)) for i, example in enumerate(examples)]
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    whole = task.loss(model, task.collate(bent)).total
    halves = task.loss(model, task.collate(bent[:2])).total + task.loss(model, task.collate(bent[2:])).total
    torch.testing.assert_close(whole, halves)


def test_without_noise_training_sees_the_picture_itself() -> None:
    task = made(operations=0, flip=False, shift=0.0)
    example = task.encode({"image": uri(np.arange(SIDE * SIDE).reshape(SIDE, SIDE)), "label": "a"})
    plain, _ = task._seen(task.collate([example]))
    seen, share = task._seen(task.collate([task.augment(example, np.random.default_rng(0))]))
    torch.testing.assert_close(seen, plain, rtol=1e-4, atol=1e-4)
    assert share is None


# -- figures -----------------------------------------------------------------------------------------------------------


def test_top_accuracy_and_confused_pairs() -> None:
    likely = np.array([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.1, 0.2, 0.7]])
    target = np.array([1, 0, 1, 2])
    assert top_accuracy(likely, target, 1) == 0.25 and top_accuracy(likely, target, 2) == 0.5
    assert top_accuracy(likely, target, 3) == 1.0
    weights = np.array([[1, 1, 1, 1], [0, 0, 0, 4]])
    assert top_accuracy(likely, target, 1, weights).tolist() == [0.25, 1.0]
    guess = np.array([0, 1, 0, 2])
    found = confused_pairs(target, guess, ["a", "b", "c"], np.array([0.5, 0.5, 0.9, 0.7]))
    assert found == [{"truth": "b", "answer": "a", "count": 2, "rows": [2, 0]},
                     {"truth": "a", "answer": "b", "count": 1, "rows": [1]}]  # fmt: skip


# -- what a person may have got wrong ----------------------------------------------------------------------------------


def test_options_that_do_not_go_together() -> None:
    for options in ({"size": 30, "patch": 4}, {"patch": 6, "size": 12}, {"mixup": 0.7, "cutmix": 0.5}):
        with pytest.raises(ValueError):
            ImageClassification.Options(**options)
    with pytest.raises(UserError, match="width"):
        made().model(TransformerConfig(d_model=12, num_layers=1, num_heads=2))
    with pytest.raises(UserError, match="same label"):
        ImageClassification().fit([{"image": uri(np.zeros((4, 4))), "label": "a"}] * 3)


def test_numbers_have_names() -> None:
    task = ImageClassification(ImageClassification.Options(names=["shirt", "coat"]))
    rows = [{"image": uri(np.full((8, 8), i, np.uint8)), "label": str(i % 2)} for i in range(4)]
    task.fit(rows)
    assert task.labels.names == ["coat", "shirt"] and int(task.encode(rows[0])["label"]) == 1
    with pytest.raises(UserError, match="label 2 has no name"):
        task.encode({**rows[0], "label": "2"})


def test_a_request_is_a_picture_and_never_a_path(tmp_path: Path) -> None:
    task = made()
    good = uri(np.full((9, 7), 50, np.uint8))
    file = tmp_path / "a.png"
    Image.fromarray(np.full((9, 7), 50, np.uint8)).save(file)
    expected = encode(task, {"image": good})["image"]
    for body in (good, file, file.read_bytes(), Image.open(file), {"image": file}):
        assert np.array_equal(encode(task, body)["image"], expected)
    for body in (str(file), {"image": str(file)}, {"image": "data:image/png;base64,AAAA"}, {"image": 3}, {}, 3):
        with pytest.raises(UserError):
            encode(task, body)


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trained on a folder of noisy JPEGs and PNGs: a bright top, a bright left or a bright middle."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for i in range(150):
        array = rng.integers(0, 120, size=(16, 20, 3))
        name = ("top", "left", "middle")[i % 3]
        where = {"top": np.s_[:5], "left": np.s_[:, 2:8], "middle": np.s_[5:11, 6:14]}[name]
        array[where] += 130
        place = folder / "photos" / name / f"{i}.{'jpg' if i % 2 else 'png'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(place)
    recipe = {
        "task": "image-classification", "name": "shapes", "data": {"train": "photos"},
        "options": {"size": 16, "flip": False, "cutmix": 0.1, "erase": 0.1},
        "model": {"d_model": 32, "num_layers": 2, "num_heads": 2, "conv_kernel": 0},
        "train": {"steps": 60, "batch_size": 32, "lr": 0.002, "muon_lr": 0.02, "threads": 1, "precision": "float32",
                  "ema": 0.9},
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return train(folder / "r.yaml", run=folder / "run", progress=False), folder


def test_it_learns_and_its_report_shows_pictures(run: Any) -> None:
    trained, folder = run
    found = trained.evaluate(progress=False)
    assert found["metrics"]["accuracy"]["value"] > 0.85
    page = (folder / "run" / "report.html").read_text("utf-8")
    line = json.loads((folder / "run" / "predictions.jsonl").read_text("utf-8").splitlines()[0])
    assert line["where"].endswith((".jpg", ".png")) and line["input"] == {} and line["answer"]["label"]
    answers = [{"label": "top", "scores": {"top": 0.8, "left": 0.1, "middle": 0.1}}] * 15
    rows = list(trained.store("test").rows())
    assert sum(bool(m["picture"]) for m in trained.task.figures(answers, rows)["mistakes"]) >= 5
    assert "img-src data:" in page or "<img" not in page
    pictures = folder / "run" / "pictures" / "maps"
    assert all(Image.open(pictures / f"right-1-{i}.png").size == (128, 128) for i in (1, 2, 3))
    assert page.count("data:image/png") >= 12


def test_maps_point_at_what_the_labels_were_made_from(run: Any) -> None:
    """Integrated gradients add up to the logit's difference, and what speaks for "top" lies at the top."""
    trained, _ = run
    store, model, task = trained.store("train"), maps.Still(trained.model), trained.task
    images = torch.tensor(np.stack([store[i]["image"] for i in range(90)]))
    x = task._normal(images.float() / 255)
    top = torch.tensor([i for i in range(90) if task.labels.names[int(store[i]["label"])] == "top"])
    label = torch.full((len(top),), task.labels.encode("top"))
    part, error = maps.added(model, x[top], label, x.mean(0), 64)
    assert error.max() < 0.05
    assert part[:, :6].sum() > 0.6 * part.sum() > 0
    flow = maps.looked_at(model, x[:4])
    assert flow.shape == (4, 4, 4) and flow.amin() == 0 and flow.amax() == 1


def test_predict_takes_files_folders_and_globs(run: Any, capsys: pytest.CaptureFixture[str],
                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    trained, folder = run
    monkeypatch.chdir(folder)
    several = ["photos/left/*.jpg", "photos/top/0.png"]
    for inputs, count in ((["photos/top/0.png"], 1), (["photos"], 150), (several, 26)):
        with pytest.raises(SystemExit) as left:
            cli.main(["predict", "run", *inputs])
        assert left.value.code == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) == count and {line["label"] for line in lines} <= {"top", "left", "middle"}
    right = [line["label"] in line["file"] for line in lines]
    assert sum(right) > 20 and trained.predict([folder / "photos/top/0.png"])[0]["label"] == lines[-1]["label"]
    (folder / "broken.jpg").write_bytes((folder / "photos/left/1.jpg").read_bytes()[:300])
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", "run", "photos/top/0.png", "broken.jpg", "photos/none.jpg"])
    assert left.value.code == 2 and "none.jpg" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main(["predict", "run", "photos/top/0.png", "broken.jpg"])
    told = capsys.readouterr()
    assert left.value.code == 2 and told.err.count("\n") == 1 and "broken.jpg" in told.err and not told.out


def test_it_is_served(run: Any) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from multihead.serve.app import Served, create_app
    from multihead.serving import examples

    trained, folder = run
    shown = examples(trained)
    assert len(shown) == 3 and all(one["image"].startswith("data:image/") for one in shown)
    app = create_app([Served("shapes", trained.task, trained.model, examples=shown)], trained.recipe.serve)
    raw = (folder / "photos/middle/2.png").read_bytes()
    with testclient.TestClient(app, base_url="http://127.0.0.1") as client:
        reply = client.post("/v1/predict", json={"input": {"image": to_uri(raw)[0]}})
        assert reply.status_code == 200, reply.text
        assert reply.json()["answers"][0]["label"] == trained.predict([raw])[0]["label"]
        assert client.get("/v1/models").json()["data"][0]["inputs"] == [
            {"name": "image", "kind": "image", "required": True}]  # fmt: skip
        large = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(256, size=(1200, 1200, 3), dtype=np.uint8)).save(large, "PNG")
        assert client.post("/v1/predict", json={"input": {"image": to_uri(large.getvalue())[0]}}).status_code == 200
        for bad in (str(folder / "photos/middle/2.png"), "data:image/png;base64,AAAA", to_uri(raw)[0][:200], 7,
                    "data:image/svg+xml;base64,PHN2Zy8+"):  # fmt: skip
            refused = client.post("/v1/predict", json={"input": {"image": bad}})
            assert refused.status_code == 422 and refused.json()["error"]["message"], bad


def test_large_pictures_are_kept_small_beside_their_encoding() -> None:
    task = made()
    rng = np.random.default_rng(0)
    large = uri(rng.integers(256, size=(400, 600)))
    kept = task.kept({"image": large, "label": "a"})
    assert len(kept["image"]) < len(large) / 5 and kept["label"] == "a"
    assert np.abs(task.encode(kept)["image"].astype(int) - task.encode({"image": large})["image"]).mean() < 20
    small = {"image": uri(np.zeros((8, 8))), "label": "b"}
    assert task.kept(small) is small


def test_the_classifier_is_what_a_codec_and_options_say() -> None:
    codec = ImageCodec(16, 3, "crop", 255, [0.5] * 3, [0.2] * 3)
    model = PictureClassifier(TransformerConfig(d_model=16, num_layers=1, num_heads=2), codec, 5,
                              ImageClassification.Options(patch=8, stem="linear"))  # fmt: skip
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5) and model.input.length == 4


@pytest.mark.parametrize("channels", [1, 3])
def test_the_arithmetic_is_that_of_transformers_vit(channels: int) -> None:
    """Random weights of transformers' ViT under our names give its logits."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=12, patch_size=4,
        num_channels=channels, num_labels=5)).eval()  # fmt: skip
    given = theirs.state_dict()
    for value in given.values():
        value.normal_(std=0.3)
    config = TransformerConfig(d_model=24, num_layers=2, num_heads=3, d_ff=40, norm="layernorm", norm_eps=1e-12,
                               activation="gelu", positions="learned", bias=True)  # fmt: skip
    options = ImageClassification.Options(patch=4, stem="linear", pool="class")
    ours = PictureClassifier(config, ImageCodec(12, channels, "crop", 255, [], []), 5, options).eval()
    parts = {"attention.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
             "attention.out": ("attention.o_proj",), "attention_norm": ("layernorm_before",),
             "feed_forward.up": ("mlp.fc1",), "feed_forward.down": ("mlp.fc2",),
             "feed_forward_norm": ("layernorm_after",)}  # fmt: skip
    taken = {"input.front": given["vit.embeddings.cls_token"][0],
             "input.position": given["vit.embeddings.position_embeddings"][0],
             "input.linear.weight": given["vit.embeddings.patch_embeddings.projection.weight"].flatten(1),
             "input.linear.bias": given["vit.embeddings.patch_embeddings.projection.bias"]}  # fmt: skip
    for kind in ("weight", "bias"):
        taken[f"trunk.norm.{kind}"] = given[f"vit.layernorm.{kind}"]
        taken[f"head.linear.{kind}"] = given[f"classifier.{kind}"]
        for i in range(2):
            taken |= {f"trunk.blocks.{i}.{name}.{kind}": torch.cat([given[f"vit.layers.{i}.{t}.{kind}"] for t in them])
                      for name, them in parts.items()}  # fmt: skip
    ours.load_state_dict(taken)
    x = torch.randn(3, channels, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(pixel_values=x).logits, rtol=1e-4, atol=1e-4)
