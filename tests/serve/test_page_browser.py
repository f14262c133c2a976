"""The page in Chromium: write, drop an image, generate, see it grow, stop, refresh, two people."""

import json
import os
import threading
import time
import zipfile
from pathlib import Path

import pytest

from moma.images import png_bytes
from moma.runs import Run
from moma.serve.app import Limits
from moma.serve.engine import Engine
from moma.serve.page_html import PATH
from tests.serve.models import noise, running, wait_until

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=[*FLAGS])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("page") / "my run")
    (run.path / "validation").mkdir(parents=True)
    run.metrics.write_text(json.dumps({"step": 1, "loss": 2.5, "loss_text": 2.5}) + "\n")
    noise(5).save(run.path / "validation" / "step-00000001.png")
    return run


def serve(model, run):
    """An engine with a page of its model, and the page's address."""
    from moma.serve.page import mount_page
    from moma.serve.page_run import RunView

    engine = Engine(model, max_active=2)

    def mount(app):
        mount_page(app, engine, RunView(run), Limits())

    return engine, running(engine, mount=mount)


@pytest.fixture(scope="module")
def short(mixed, run):
    engine, served = serve(mixed, run)
    with engine, served as url:
        yield engine, url


@pytest.fixture(scope="module")
def endless(never_ending, run):
    engine, served = serve(never_ending, run)
    with engine, served as url:
        yield engine, url


@pytest.fixture
def open_page(browser):
    """Open the page as one more person; every request must go to the server."""
    contexts, requests = [], []

    def open_(url, width=1440):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append((url, request.url)))
        page.goto(url)
        assert page.url == f"{url}{PATH}/"
        page.wait_for_selector("#prompt textarea")
        return page

    yield open_
    for context in contexts:
        context.close()
    for url, requested in requests:
        assert requested.startswith((f"{url}/", "data:", "blob:"))


def ask(page, text, mode):
    page.fill("#prompt textarea", text)
    page.locator("#mode label", has_text=mode).click()
    page.click("#start")


def drop(page, data):
    """Drop a file on the prompt, as a person does who drags it there."""
    transfer = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], "a.png", {type: "image/png"});
            transfer.items.add(file);
            return transfer;
        }""",
        list(data),
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#prompt textarea", event, {"dataTransfer": transfer})
    page.locator("#prompt img").wait_for(state="attached")


def wait_for_end(page, end="complete"):
    page.locator(".about", has_text=end).wait_for()


@pytest.mark.parametrize("width", [1440, 390])
def test_an_image_is_drawn_with_its_routing_and_can_be_kept(short, open_page, width, tmp_path):
    page = open_page(short[1], width)
    page.check("#experts input")
    ask(page, "the red apple", "image")
    wait_for_end(page)
    assert page.locator(".answer img.complete").count() == 1
    page.locator("#routing .token").first.hover()
    assert page.locator("#routing .token").count() >= 5
    assert page.locator("#routing figure").count() == 2
    assert page.locator("#gallery img").count() >= 1
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).first.click()
    file = tmp_path / "answer.zip"
    download.value.save_as(file)
    with zipfile.ZipFile(file) as archive:
        assert set(archive.namelist()) == {"answer.txt", "image_1.png"}
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    # Whoever comes next sees nothing of it.
    assert open_page(short[1]).locator(".answer img").count() == 0


def test_a_dropped_image_is_part_of_the_prompt(short, open_page):
    page = open_page(short[1])
    drop(page, png_bytes(noise(1)))
    ask(page, "the", "text")
    wait_for_end(page, " tokens, ")
    text_alone = 2
    assert int(page.locator(".about").inner_text().split(" + ")[0]) >= text_alone + 6


def test_a_bad_prompt_is_explained(short, open_page):
    page = open_page(short[1])
    ask(page, "a <image> b", "text")
    page.get_by_text("the text has <image> 1 times, but there are 0 images").wait_for()
    # Said before images are decoded.
    drop(page, b"not an image")
    ask(page, "the " * 100, "text")
    page.get_by_text("shorten the prompt").wait_for()


def test_an_answer_grows_and_stops(endless, open_page):
    engine, url = endless
    page = open_page(url)
    ask(page, "the", "text")
    page.wait_for_function("document.querySelector('.answer').innerText.length > 30")
    before = len(page.locator(".answer").inner_text())
    page.wait_for_function(f"document.querySelector('.answer').innerText.length > {before}")
    other = open_page(url)
    ask(other, "apple", "text")
    wait_until(lambda: engine.active == 2)
    page.click("#stop")
    wait_for_end(page, "stopped")
    wait_until(lambda: engine.active == 1)
    assert len(page.locator(".answer").inner_text()) >= before
    other.reload()  # frees the place of the answer that nobody reads any more
    wait_until(lambda: engine.active == 0)
    other.wait_for_selector("#prompt textarea")
    assert other.locator(".answer .empty").count() == 1


def test_an_image_grows(short, open_page):
    engine, url = short
    page = open_page(url)
    page.evaluate(
        """() => {
            const look = () => { window.seen ||= document.querySelector(".answer img.growing"); };
            new MutationObserver(look).observe(document, {subtree: true, childList: true});
        }"""
    )
    ended = threading.Event()

    def slow_down():
        while not ended.is_set():
            engine.call(lambda _: time.sleep(0.2)).result()

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        ask(page, "the", "image")
        wait_for_end(page)
    finally:
        ended.set()
        thread.join()
    assert page.evaluate("!!window.seen")
    assert page.locator(".answer img.growing").count() == 0


def test_the_training_of_a_run_is_followed(short, run, open_page):
    page = open_page(short[1])
    page.get_by_role("tab", name="Training").click()
    page.get_by_text("Step 1.").wait_for()
    page.locator("#sheets img").wait_for()
    with run.metrics.open("a") as log:
        log.write(json.dumps({"step": 2, "loss": 1.5, "loss_text": 1.5}) + "\n")
        log.flush()
        os.fsync(log.fileno())
    page.get_by_text("Step 2.").wait_for()
    page.locator("#curves canvas, #curves svg").first.wait_for()
