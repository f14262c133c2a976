"""The page beside the endpoint: what it serves, the order of a prompt, and a run that grows."""

import json
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from moma.errors import UserError
from moma.generate.guidance import Guidance
from moma.generate.sampling import Sampling
from moma.generate.settings import Settings
from moma.generate.stream import ImagePart, TextPiece
from moma.runs import Run
from moma.serve.app import Limits
from moma.serve.engine import Engine, EngineStoppedError
from moma.serve.page_html import PATH, answer_html, arrange
from tests.serve.models import ask, noise, running

TOKEN = "a token of many characters"
LIMITS = Limits(body_bytes=5000, pixels=400, tokens=40)
A, B = noise(1), noise(2)


def write_records(run, *steps):
    records = [{"step": n, "loss": 1 / n, "loss_text": 2 / n, "loss_image": None} for n in steps]
    with run.metrics.open("a") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    return run


@pytest.fixture(scope="module")
def http(mixed, tmp_path_factory):
    # Gradio takes seconds to import: not in processes that run other tests.
    from moma.serve.page import mount_page
    from moma.serve.page_run import RunView

    view = RunView(Run(tmp_path_factory.mktemp("run")))
    with Engine(mixed) as engine:

        def mount(app):
            mount_page(app, engine, view, LIMITS)

        with (
            running(engine, LIMITS, TOKEN, mount) as url,
            httpx.Client(base_url=url, timeout=60, auth=("", TOKEN)) as http,
        ):
            yield http


def test_the_page_is_for_those_who_have_the_token(http):
    for path in ("/", f"{PATH}/", f"{PATH}/config"):
        assert httpx.get(http.base_url.join(path)).status_code == 401
    answer = http.get("/", follow_redirects=True)
    assert answer.status_code == 200 and answer.url.path == f"{PATH}/"
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    config = http.get(f"{PATH}/config").json()
    assert config["analytics_enabled"] is False and not config.get("is_colab")
    assert http.get("/v1/models").status_code == 200


def test_no_file_beside_the_page_is_served(http, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    files = [tmp_path / "secret.txt", "/etc/hostname", "pyproject.toml", "../pyproject.toml"]
    for file in files:
        answer = http.get(f"{PATH}/gradio_api/file={file}")
        assert answer.status_code in (403, 404), file


def test_an_upload_is_limited(http):
    def upload(size):
        files = {"files": ("a.png", bytes(size), "image/png")}
        return http.post(f"{PATH}/gradio_api/upload", files=files)

    assert upload(1000).status_code == 200
    assert upload(6000).status_code == 413
    chunks = http.post(f"{PATH}/gradio_api/queue/join", content=iter([b"x" * 6000]))
    assert chunks.status_code == 413


def generate(http, images=(), mode="text", **changes):
    """Press the button of the page, with images of these sizes; the last message of the server.

    `changes` has values of options by their labels, with _ for what is no letter.
    """
    config = http.get(f"{PATH}/config").json()
    of_id = {component["id"]: component["props"] for component in config["components"]}
    call = max(config["dependencies"], key=lambda each: len(each["inputs"]))
    _, _, *options = [
        changes.pop(re.sub(r"\W", "_", of_id[each].get("label") or ""), of_id[each].get("value"))
        for each in call["inputs"]
    ]
    assert not changes
    prompt = {"text": "the", "files": [upload_image(http, size) for size in images]}
    session = {"session_hash": "a session"}
    body = {"data": [prompt, mode, *options], "fn_index": call["id"], **session}
    assert http.post(f"{PATH}/gradio_api/queue/join", json=body).status_code == 200
    with http.stream("GET", f"{PATH}/gradio_api/queue/data", params=session) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:") or "{}")
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("no answer")


def upload_image(http, size):
    file = BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    files = {"files": ("a.png", file.getvalue(), "image/png")}
    (path,) = http.post(f"{PATH}/gradio_api/upload", files=files).json()
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def test_an_answer_of_the_page_is_limited(http):
    message = generate(http, [(20, 20)])
    page, *_ = message["output"]["data"]
    assert message["success"] and f"+ {LIMITS.tokens} tokens" in page
    assert page.endswith("the limit of tokens is reached</div>")


OPTIONS: dict[str, Any] = {
    "Temperature": 1.3, "Top_p": 0.85, "Top_k": 40, "Min_p": 0.02, "Repetition_penalty": 1.5,
    "New_tokens": 30, "Images": 2, "Text_guidance": 3.0, "Image_guidance": 1.2, "Seed": 7,
}  # fmt: skip


@pytest.mark.parametrize("mode", ["text", "image", "mixed"])
def test_every_option_of_the_page_reaches_the_model(http, monkeypatch, mode):
    given, submit = [], Engine.submit

    def record(self, prompt, settings, *rest):
        given.append((prompt, settings))
        return submit(self, prompt, settings, *rest)

    monkeypatch.setattr(Engine, "submit", record)
    assert generate(http, [(20, 20)], mode, **OPTIONS)["success"]
    (((image, text), settings),) = given
    assert isinstance(image, Path) and text == "the"
    sampling = Sampling(1.3, 0.85, 7, top_k=40, min_p=0.02)
    of_text = sampling if mode == "image" else replace(sampling, repetition_penalty=1.5)
    images, guidance = (2, Guidance(3, 1.2)) if mode == "image" else (1, None)
    assert settings == [Settings(mode, of_text, 30, sampling, images, guidance)]


def test_an_image_of_the_page_is_limited(http):
    message = generate(http, [(21, 20)])
    assert not message["success"]
    assert "a.png" in message["output"]["error"] and "400" in message["output"]["error"]


@pytest.mark.parametrize(
    ("text", "images", "expected"),
    [
        ("a", [], ["a"]),
        ("a", [A], [A, "a"]),
        ("", [A, B], [A, B]),
        ("a <image> b<image>", [A, B], ["a ", A, " b", B]),
        ("a <image>b", [A, B], [A, "a ", B, "b"]),
        ("<image><image>", [A, B], [A, B]),
    ],
)
def test_images_stand_where_the_text_has_a_mark(text, images, expected):
    assert arrange(text, images) == expected


@pytest.mark.parametrize(
    ("text", "message"), [("", "write a text"), ("a <image>", "<image> 1 times, but there are 0")]
)
def test_a_prompt_without_content_or_images_for_its_marks_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        arrange(text, [])


def test_only_the_newest_rows_of_an_unfinished_image_are_shown():
    rows = ImagePart(A.crop((0, 0, 16, 4)), False), ImagePart(A.crop((0, 0, 16, 8)), False)
    page = answer_html([TextPiece("<b>"), *rows])
    assert "&lt;b&gt;" in page
    assert page.count("<img") == 1 and "16/8" in page and "growing" in page
    page = answer_html([*rows, ImagePart(A, True), TextPiece("end")])
    assert page.count("<img") == 1 and "complete" in page and page.index("<img") < page.index("end")


def test_the_curves_of_a_run_follow_its_log(run):
    from moma.serve.page_run import RunView

    view = RunView(run)
    status, curves, sheets, shown = view.update(None)
    assert "no log record" in status and len(curves) == 0 and sheets == []
    write_records(run, 1, 2)
    with run.metrics.open("a") as log:
        log.write('{"step": 3, "lo')
    status, curves, _, shown = view.update(shown)
    assert "Step 2" in status and "text 1.0" in status and "images" not in status
    text = curves[curves["loss of"] == "text"]
    assert text["step"].tolist() == [1, 2] and text["loss"].tolist() == [2, 1]
    assert view.update(shown)[3] == shown
    run.metrics.write_text("")  # started anew
    write_records(run, *range(1, 2001))
    (run.path / "validation").mkdir()
    Image.new("RGB", (4, 2)).save(run.path / "validation" / "step-00000010.png")
    status, curves, sheets, _ = view.update(shown)
    assert "Step 2,000" in status and len(curves) == 2 * 400
    assert [(image.size, name) for image, name in sheets] == [((4, 2), "step-00000010")]


def test_the_ids_of_an_answer_are_those_of_its_document(mixed):
    with Engine(mixed) as engine:
        answer = ask(engine, ["the", A], Settings(new_tokens=3, mode="text"))
        for _ in answer:
            pass
        prompt = mixed.encode(["the", A])
        assert answer.ids[: len(prompt)] == prompt
        assert len(answer.ids) == len(prompt) + answer.new_tokens


def test_a_function_is_called_between_passes(mixed):
    with Engine(mixed) as engine:
        assert engine.call(lambda model: model.context).result() == mixed.context
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda model: 1 / 0).result()
        assert engine.call(lambda model: 2).result() == 2
    with pytest.raises(EngineStoppedError):
        engine.call(lambda model: 3)
