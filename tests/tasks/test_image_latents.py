"""image-generation in the latents of an autoencoder: what it keeps, what is drawn from it, and the contract again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from multihead.data.images import to_uri
from multihead.errors import UserError
from multihead.tasks.vision import _drawn as drawn
from multihead.tasks.vision import _latents as latents
from multihead.tasks.vision.image_generation import ImageGeneration
from multihead.train import train
from multihead.transformer.config import TransformerConfig
from tests.contract import TINY, Contract, same

pytest.importorskip("PIL.Image")
SIDE = 16


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Soft slopes with a sharp square somewhere: uint8 (count, 1, SIDE, SIDE)."""
    rng, found = np.random.default_rng(seed), []
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for _ in range(count):
        one = 255 * (rng.random() * x + rng.random() * y) / 2
        top, left = rng.integers(SIDE - 6, size=2)
        one[top : top + 6, left : left + 6] = rng.integers(256)
        found.append(one.astype(np.uint8)[None])
    return np.stack(found)


def uri(picture: np.ndarray) -> str:
    return to_uri(b"P5 %d %d 255\n" % picture.shape[:0:-1] + picture.tobytes())[0]


@pytest.fixture(scope="module")
def learned() -> Iterator[latents.Latents]:
    yield latents.Latents(latents.trained(pictures(200), 4, 4, 120, seed=0))


def test_latents_of_the_training_pictures_have_mean_zero_and_deviation_one(learned: Any) -> None:
    z = learned.encode(pictures(200))
    assert z.shape == (200, 4, SIDE // 4, SIDE // 4) and z.dtype == np.float32
    np.testing.assert_allclose(z.mean((0, 2, 3)), 0, atol=1e-3)
    np.testing.assert_allclose(z.std((0, 2, 3)), 1, atol=1e-3)


def test_pictures_never_seen_come_back_better_than_as_their_mean(learned: Any) -> None:
    new = pictures(50, seed=1)
    mean = np.broadcast_to(pictures(200).mean(0), new.shape)
    assert latents.psnr(learned.rebuilt(new), new).mean() > latents.psnr(mean, new).mean() + 4


def test_the_same_seed_gives_the_same_weights_and_a_file_gives_them_back(learned: Any, tmp_path: Path) -> None:
    few = pictures(8)
    one, two, other = (latents.Latents(latents.trained(few, 2, 3, 4, seed=seed)) for seed in (5, 5, 6))
    assert np.array_equal(one.encode(few), two.encode(few)) and not np.array_equal(one.encode(few), other.encode(few))
    one.save(tmp_path)
    options = ImageGeneration.Options(latent=2, latent_channels=3)
    assert np.array_equal(latents.Latents.load(tmp_path, 1, options).rebuilt(few), one.rebuilt(few))
    with pytest.raises(UserError, match="another model"):
        latents.Latents.load(tmp_path, 3, options)


def test_noise_ratios_are_those_of_the_formula() -> None:
    grey = np.full((1, 3, 4, 4), 100, np.uint8)
    assert latents.psnr(grey, grey + 10)[0] == pytest.approx(20 * np.log10(255 / 10))
    assert latents.psnr(grey, grey)[0] == pytest.approx(10 * np.log10(255**2 * 12))


# -- the task ----------------------------------------------------------------------------------------------------------


def made(**options: Any) -> ImageGeneration:
    task = ImageGeneration(ImageGeneration.Options(size=SIDE, condition="none", steps=2, latent_steps=3, **options))
    task.fit([{"image": uri(one)} for one in pictures(12)])
    return task


def test_it_draws_pictures_of_the_asked_size_from_noise_as_small_as_the_latents() -> None:
    task = made(latent=4, patch=2)
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    assert model.input.length == (SIDE // 4 // 2) ** 2
    with torch.no_grad():
        answers = task.predict(model, task.collate([task.encode({})]), {"n": 2})
    assert [drawn.from_png(one).shape for one in answers[0]["pictures"]] == [(1, SIDE, SIDE)] * 2


def test_a_mirrored_picture_has_the_latents_of_its_mirror_image() -> None:
    task, picture = made(latent=4, patch=2, flip=True), pictures(1)[0]
    example, rng = task.encode({"image": uri(picture)}), np.random.default_rng(0)
    np.testing.assert_allclose(example["mirrored"], task.latents.encode(picture[None, :, :, ::-1])[0], atol=1e-5)
    seen = [task.augment(example, rng) for _ in range(200)]
    turned = [np.array_equal(one["latent"], example["mirrored"]) for one in seen]
    assert 70 < sum(turned) < 130 and all(set(one) == {"latent", "noise", "time", "label"} for one in seen)
    assert all(np.array_equal(one["latent"], example["latent"]) for one, t in zip(seen, turned, strict=True) if not t)


def test_what_does_not_fit_is_said_before_anything_is_learned() -> None:
    with pytest.raises(UserError, match=r"options\.patch is 4 of latents 16 times smaller"):
        made(latent=16, patch=4)


class TestInLatents(Contract):
    """Every promise of a task, with an autoencoder in between."""

    name = "image-generation"

    @pytest.fixture
    def recipe_path(self, tmp_path: Path) -> Path:
        path = Contract.recipe_path.__wrapped__(self, tmp_path)
        values = yaml.safe_load(path.read_text("utf-8"))
        tiny = yaml.safe_load((TINY / "image-generation-latents.yaml").read_text("utf-8"))
        values["options"] |= {**tiny["options"], "flip": True}
        path.write_text(yaml.safe_dump(values, allow_unicode=True), "utf-8")
        return path

    def test_rebuilt_pictures_are_measured_and_shown(self, recipe_path: Path, tmp_path: Path) -> None:
        run = train(recipe_path, run=tmp_path / "run", progress=False)
        found = run.evaluate(part="valid", progress=False)["metrics"]
        assert 5 < found["psnr"]["low"] <= found["psnr"]["value"] <= found["psnr"]["high"] < 59
        store = run.store("valid")
        real = drawn.pictures_of(store)
        expected = latents.psnr(run.task.latents.rebuilt(real), real)  # type: ignore[attr-defined]
        same(found["psnr"]["value"], float(expected.mean()))
        report = (run.path / "report.html").read_text("utf-8")
        assert "What the autoencoder keeps" in report and f"{expected[0]:.1f} dB" in report
