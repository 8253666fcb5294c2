"""The page at / in a real browser: it answers, streams, stops, speaks two languages, and takes nothing for markup."""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Iterator

import pytest
import serve_models as models
import uvicorn
from serve_process import until

from multihead.serve.app import PAGE, Served, ServeSettings, create_app, listen

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
NASTY = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"


@contextlib.contextmanager
def serving(*more: Served, **settings) -> Iterator[tuple[str, object]]:
    """A server in a thread of this process: its address and its application."""
    writer = Served("writer", *models.writer())
    mood = Served(NASTY, models.Mood(), models.Mean().eval(), examples=[NASTY, models.LINES[1]])
    filler = Served("filler", *models.filler(), examples=["<b>房<mask>很[MASK]</b>"])
    app = create_app([writer, mood, filler, *more], ServeSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with listen("127.0.0.1", 0) as found:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [found]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{found.getsockname()[1]}", app
        finally:
            server.should_exit = True
            thread.join(20)


@pytest.fixture(scope="module")
def browser():
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no Chromium at {CHROMIUM}; install it, or name it in CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api", reason="the extra [dev] is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Opens pages, and sees that none asks for anything elsewhere, fails, or is refused by its own policy."""
    contexts, faults = [], []

    def open_page(address: str, **context):
        contexts.append(browser.new_context(**{"locale": "en-US"} | context))
        page = contexts[-1].new_page()
        page.on("request", lambda r: r.url.startswith((address, "data:")) or faults.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: m.type == "error" and "status of" not in m.text and faults.append(m.text))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def test_labels_with_bars_in_two_languages_and_nothing_becomes_markup(visit):
    with serving() as (address, _):
        page = visit(address, locale="zh-CN")
        assert page.locator("html").get_attribute("lang") == "zh"
        page.locator("nav button").nth(1).click()
        assert page.locator("#card .go").inner_text() == "回答"
        assert page.locator("#card h2").inner_text() == NASTY
        page.locator(".chips button").nth(0).click()
        page.wait_for_selector(".bar")
        assert page.locator(".answer .given").inner_text() == NASTY
        names = page.locator(".bar .name").all_inner_texts()
        assert sorted(names) == sorted(models.LABELS)
        values = [float(v.split()[0]) for v in page.locator(".bar .value").all_inner_texts()]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=0.2)
        assert page.locator(".answer .label").inner_text() == names[0]
        assert page.locator("img, b, main script").count() == 0 and page.title() == "multihead"
        page.locator("#language").click()
        assert page.locator("#card .go").inner_text() == "Answer"
        page.locator("#card .go").click()
        assert "write something" in page.locator("#card .problem").inner_text()
        page.locator("textarea").fill("☠")
        page.locator("#card .go").click()
        page.wait_for_function("() => document.querySelector('.problem:not([hidden])')?.textContent.includes('log')")


def test_a_text_is_streamed_and_can_be_stopped(visit):
    with serving() as (address, app):
        page = visit(address)
        engine = app.state.models["writer"].engine
        page.locator("textarea").fill("房间 <b>")
        page.locator("[name=seed]").fill("3")
        page.locator("#card .go").click()
        page.wait_for_selector(".told:not(.live)")
        text, meta = page.locator(".told").text_content(), page.locator(".meta").inner_text()
        assert text.startswith("房间 <b>") and len(text) > 20 and "tokens/s" in meta
        page.locator("#card .go").click()
        page.wait_for_selector(".told:not(.live)")
        assert page.locator(".told").text_content() == text
        page.locator("[name=max_tokens]").evaluate("(e) => { e.value = 1000; e.dispatchEvent(new Event('input')); }")
        model = app.state.models["writer"].served.model
        step, slow = model.step, threading.Event()
        model.step = lambda ids, cache: (slow.wait(0.02), step(ids, cache))[1]
        page.locator("#card .go").click()
        until(lambda: engine.active == 1)
        page.locator("#card .stop").click()
        until(lambda: engine.active == 0)
        assert "stopped" in page.locator(".meta").inner_text()
        assert page.locator("#card .problem:not([hidden])").count() == 0
        page.locator("summary").click()
        assert "/v1/completions" in page.locator("#curl").inner_text()


def test_gaps_are_filled_in_place(visit):
    with serving() as (address, _):
        page = visit(address, locale="zh-CN")
        page.locator("nav button").nth(2).click()
        page.locator(".chips button").click()
        page.wait_for_selector(".answer mark")
        best = page.locator(".answer mark").all_inner_texts()
        assert page.locator(".answer .filled").inner_text() == f"<b>房{best[0]}很{best[1]}</b>"
        assert page.locator(".bars").count() == 2 and page.locator(".bar").count() == 10
        assert page.locator(".bar.top .name").all_inner_texts() == best and page.locator("main b").count() == 0
        page.locator("textarea").fill("房间")
        page.locator("#card .go").click()
        page.wait_for_selector("#card .problem:not([hidden])")
        assert "<mask>" in page.locator("#card .problem").inner_text()


def dropped(page, uri, place):
    """Drop the file of a data URI on a place of the page; what the page then asks the server for."""
    transfer = page.evaluate_handle("""([type, text]) => {
        const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "file", { type }));
        return data;
    }""", [uri.partition(";")[0].removeprefix("data:"), uri.partition(",")[2]])
    with page.expect_request("**/v1/predict") as asked:
        page.dispatch_event(place, "drop", {"dataTransfer": transfer})
    return asked.value.post_data_json


def test_a_picture_is_dropped_chosen_or_tried(visit, tmp_path):
    pytest.importorskip("PIL")
    task, model, file = models.eye(tmp_path)
    uri = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    with serving(Served("eye", task, model, examples=[{"image": uri}])) as (address, _):
        page = visit(address)
        page.locator("nav button").nth(3).click()
        page.locator("#card .go").click()
        assert "picture first" in page.locator("#card .problem").inner_text()
        page.locator("input[type=file]").set_input_files(file)
        page.wait_for_selector(".answer .bar")
        assert page.locator(".answer img").get_attribute("src") == uri == page.locator(".drop img").get_attribute("src")
        page.locator(".chips button").click()
        page.wait_for_function("() => document.querySelectorAll('.answer').length === 2")
        for count, place in ((3, ".drop"), (4, "h1")):  # what misses its place is taken there all the same
            assert dropped(page, uri, place) == {"model": "eye", "input": {"image": uri}}
            page.wait_for_function(f"() => document.querySelectorAll('.answer').length === {count}")
        assert len(set(page.locator(".answer .label").all_inner_texts())) == 1
        page.locator("summary").click()
        assert len(page.locator("#curl").inner_text()) < 400
        (tmp_path / "bad.png").write_bytes(b"no picture")
        page.locator("input[type=file]").set_input_files(tmp_path / "bad.png")
        page.wait_for_selector("#card .problem:not([hidden])")
        assert "picture" in page.locator("#card .problem").inner_text()


def test_a_locked_server_asks_for_its_key(visit):
    with serving(api_keys=["open sesame"]) as (address, _):
        page = visit(address, color_scheme="dark", viewport={"width": 380, "height": 700})
        page.locator("#key").fill("wrong")
        page.locator("#unlock").click()
        page.wait_for_selector("#key-problem:not([hidden])")
        page.locator("#key").fill("open sesame")
        page.locator("#unlock").click()
        page.wait_for_selector("#card textarea")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_the_page_stands_alone():
    text = PAGE.read_text(encoding="utf-8")
    outside = [part for part in text.split('"') if part.startswith(("http:", "https:", "//"))]
    assert not outside and "innerHTML" not in text and "eval(" not in text


def test_a_history_grows_by_clicks_and_the_list_follows(visit):
    finder, taste = models.finder(), models.Taste()
    chain = [Served("finder", *finder, examples=[{"history": ["i4", "i7"]}]),
             Served("taste", taste, models.Mean().eval())]
    with serving(*chain) as (address, _):
        page = visit(address)
        page.locator("nav button").nth(3).click()
        page.wait_for_selector(".item")
        names = page.locator(".item .name")
        assert names.count() == 10 and "Popular" in page.locator(".answer .about").inner_text()
        first = names.nth(0).inner_text()
        assert first.startswith("<b>Film</b>") and page.locator("main b").count() == 0
        page.locator(".item").nth(0).click()
        among = "[...document.querySelectorAll('{}')].some((b) => b.textContent === t)"
        page.wait_for_function(f"(t) => {among.format('#history button')}", arg=first)
        page.wait_for_function(f"(t) => document.querySelector('.item') && !{among.format('.item .name')}", arg=first)
        assert "Recommended" in page.locator(".answer .about").inner_text()
        page.locator("[name=q]").fill("film 12")
        page.locator(".chips button", has_text="Film</b> 12").first.click()
        page.wait_for_function("() => document.querySelectorAll('#history button').length === 2")
        page.locator("#history button").nth(0).click()
        page.wait_for_function("() => document.querySelectorAll('#history button').length === 1")
        page.locator("[name=hour]").fill("3")
        page.locator("[name=hour]").press("Tab")
        page.wait_for_selector(".item")
        page.locator("summary").click()
        told = page.locator("#curl").inner_text()
        assert "/v1/recommend" in told and '"history":["i12"]' in told and '"context":{"hour":3}' in told
        page.locator("#card .chips button", has_text="Film</b> 4").first.click()
        page.wait_for_function("() => document.querySelectorAll('#history button').length === 2")
        page.locator("#language").click()
        page.wait_for_function("() => document.querySelector('.answer .about')?.textContent.includes('为您推荐')")
