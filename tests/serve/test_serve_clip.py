"""The page takes a clip: chosen, dropped or one of the examples, and plays it beside the answer."""

from __future__ import annotations

import base64

import pytest
from test_serve_page import browser, dropped, serving, visit  # noqa: F401

from multihead.data.video import to_uri
from multihead.serve.app import Served
from multihead.transformer.config import TransformerConfig
from tests import clips


def test_a_clip_is_chosen_dropped_or_tried(visit, tmp_path):  # noqa: F811
    pytest.importorskip("av")
    from multihead.tasks.vision.video_classification import VideoClassification

    task = VideoClassification(VideoClassification.Options(size=16, frames=2, tubelet=1, jitter=1))
    raw, still = clips.clip(clips.ramp(6, 16, 16)), to_uri(clips.clip(clips.ramp(3, 16, 16), "gif"))[0]
    task.fit([{"video": to_uri(raw)[0], "label": name} for name in "ab"])
    model = task.model(TransformerConfig(d_model=16, num_layers=1, num_heads=2)).eval()
    (tmp_path / "a.mp4").write_bytes(raw)
    with serving(Served("film", task, model, task_settings(), examples=[{"video": still}])) as (address, _):
        page = visit(address)
        page.locator("nav button").nth(3).click()
        page.locator("#card .go").click()
        assert "clip first" in page.locator("#card .problem").inner_text()
        page.locator("input[type=file]").set_input_files(tmp_path / "a.mp4")
        page.wait_for_selector(".answer .bar")
        uri = page.locator(".answer video").get_attribute("src")
        assert uri == "data:video/mp4;base64," + base64.b64encode(raw).decode()
        page.locator(".chips button").click()
        page.wait_for_function("() => document.querySelectorAll('.answer').length === 2")
        assert page.locator(".answer img").get_attribute("src") == still  # a browser shows a GIF as a picture
        assert dropped(page, uri, ".drop") == {"model": "film", "input": {"video": uri}}
        page.wait_for_function("() => document.querySelectorAll('.answer').length === 3")
        (tmp_path / "bad.mp4").write_bytes(b"no clip")
        page.locator("input[type=file]").set_input_files(tmp_path / "bad.mp4")
        page.wait_for_selector("#card .problem:not([hidden])")
        assert "clip" in page.locator("#card .problem").inner_text()


def task_settings():
    """Room for a clip in a request."""
    from multihead.serve.settings import ServeSettings

    return ServeSettings(max_body_bytes=16 << 20)
