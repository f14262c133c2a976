"""A page for people: generation that grows, the routing of its tokens, and a run's curves.

It is a Gradio page that is mounted beside the HTTP endpoint. Everybody who has opened it has an
answer and a gallery of their own. Uploads and images lie in a temporary folder, the only one of
which Gradio serves files.
"""

import asyncio
import html
import zipfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple, get_args

from moma.serve.page_folder import FOLDER  # isort: skip
import gradio as gr
import numpy as np
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from PIL import Image
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moma.errors import UserError, quote
from moma.evaluate.token_routing import first_tokens, route_document
from moma.generate.grammar import Mode
from moma.generate.guidance import Guidance
from moma.generate.mixed import MixedModel
from moma.generate.sampling import MAX_SEED, Sampling
from moma.generate.settings import Settings
from moma.generate.stream import Content, Event, collect
from moma.images import read_image
from moma.serve.answer import Answer
from moma.serve.app import Limits
from moma.serve.engine import BusyError, Engine, EngineStoppedError
from moma.serve.errors import ApiError, error_response
from moma.serve.page_html import MARK, PATH, STYLE, answer_html, arrange
from moma.serve.page_run import RunView
from moma.study.routing_drawing import STYLE as ROUTING_STYLE
from moma.study.routing_drawing import draw_routing

_KEPT_IMAGES = 24
# Two options in a row, also on a phone.
_HALF: dict[str, Any] = {"min_width": 130}
# Seconds until a file of the temporary folder is deleted.
_KEPT_SECONDS = 3600
# Gradio compiles templates, and writes styles into the page.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"


def mount_page(app: FastAPI, engine: Engine, view: RunView, limits: Limits) -> Callable[[], None]:
    """Mount the page at `PATH` of the endpoint's app, to which `/` leads.

    Args:
        app: the endpoint; what guards it guards the page.
        engine: a running engine.

    Returns:
        A function that ends the connections of open pages, to be called in the server's thread.
    """
    app.add_api_route("/", lambda: RedirectResponse(f"{PATH}/"), response_model=None)
    app.add_middleware(_Contained, max_bytes=limits.body_bytes)
    system = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
    gr.mount_gradio_app(
        app,
        _Page(engine, view, limits).blocks(),
        PATH,
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        max_file_size=limits.body_bytes,
        theme=gr.themes.Default(primary_hue="indigo", font=system[0], font_mono=system[1]),
        css=STYLE,
    )
    (mounted,) = (each.app for each in app.routes if isinstance(each, Mount) and each.path == PATH)
    assert isinstance(mounted, gr.routes.App)
    return lambda: mounted.stop_event.set()


class _Values(NamedTuple):
    """What the options are set to, in the order in which they are shown."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    penalty: float
    tokens: int
    seed: int
    images: int
    text_scale: float
    image_scale: float


class _Contained:
    """Refuses large requests, and lets the page load nothing from elsewhere."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse a request."""

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _POLICY
            await send(message)

        if scope["type"] != "http" or not scope["path"].startswith(PATH):
            await self._app(scope, receive, send)
            return
        length = Headers(scope=scope).get("content-length", "0" if scope["method"] == "GET" else "")
        if not length.isdecimal() or int(length) > self._max_bytes:
            refused = ApiError(413, f"a request has at most {self._max_bytes} bytes")
            await error_response(refused)(scope, receive, send)
            return
        await self._app(scope, receive, send_with_policy)


class _Page:
    def __init__(self, engine: Engine, view: RunView, limits: Limits):
        self._engine, self._view, self._limits = engine, view, limits
        self._answers: dict[str, Answer] = {}  # by session

    def blocks(self) -> gr.Blocks:
        """Lay out the page."""
        title = f"moma · {self._view.name}"
        with gr.Blocks(False, title=title, delete_cache=(600, _KEPT_SECONDS)) as blocks:
            gr.Markdown(f"# {self._view.name}", elem_id="title")
            with gr.Tabs():
                with gr.Tab("Generate"):
                    self._add_generation()
                with gr.Tab("Training") as training:
                    self._add_training(training)
            blocks.unload(self._cancel)
        requests = self._engine.max_active + self._engine.max_queued
        return blocks.queue(
            max_size=2 * requests, default_concurrency_limit=requests, api_open=False
        )

    def _add_generation(self) -> None:
        has_images = self._engine.model.image_codec is not None
        modes = get_args(Mode) if has_images else ("text",)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                prompt = gr.MultimodalTextbox(
                    label="Prompt",
                    info=f"Drop images here. They precede the text, or stand where it has {MARK}."
                    if has_images
                    else "Text to continue.",
                    placeholder="a red circle above a blue square",
                    file_types=["image"],
                    file_count="multiple",
                    sources=["upload"] if has_images else [],
                    lines=3,
                    submit_btn=False,
                    autofocus=True,
                    elem_id="prompt",
                )
                mode = gr.Radio(modes, value=modes[-1], label="Output", elem_id="mode")
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=120, elem_id="start")
                    stop = gr.Button("Stop", min_width=120, elem_id="stop")
                shows = gr.Checkbox(
                    label="Show which experts process each token",
                    elem_id="experts",
                )
                options = _options(self._engine.model.context)
            with gr.Column(scale=3, min_width=320):
                answer, download, gallery = _answer_parts(has_images)
        routing = gr.HTML(elem_id="routing", apply_default_css=False, padding=False)
        images = gr.State([])
        outputs = [answer, download, gallery, images, routing]
        gr.on(
            [start.click, prompt.submit],
            self._generate,
            [prompt, mode, shows, images, *options],
            outputs,
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(self._cancel, api_visibility="private")

    def _add_training(self, tab: gr.Tab) -> None:
        status = gr.Markdown(elem_id="status")
        plot = gr.LinePlot(
            x="step",
            y="loss",
            color="loss of",
            height=360,
            x_title="step",
            y_title="nats per token",
            elem_id="curves",
        )
        sheets = gr.Gallery(
            label="Images for the prompts of [validation]",
            columns=2,
            height="auto",
            object_fit="contain",
            format="png",
            elem_id="sheets",
        )
        timer = gr.Timer(3, active=False)
        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        shown = gr.State(None)
        tab.select(lambda: gr.Timer(active=True), None, timer, **hidden)
        gr.on(
            [tab.select, timer.tick],
            self._view.update,
            shown,
            [status, plot, sheets, shown],
            **hidden,
        )

    async def _generate(
        self,
        request: gr.Request,
        prompt: dict[str, Any],
        mode: Mode,
        shows_routing: bool,
        images: list[tuple[Image.Image, str]],
        *options: Any,
    ) -> AsyncIterator[list[Any]]:
        """Answer a prompt; yields values of the outputs as the answer grows."""
        session, events = str(request.session_hash), list[Event]()
        answer: Answer | None = None
        try:
            answer = await asyncio.to_thread(self._submit, prompt, mode, _Values(*options))
            self._answers[session] = answer
            yield [answer_html([], "waiting in the queue …"), *_kept(3), ""]
            async for event in answer:
                events.append(event)
                yield [answer_html(events, f"{answer.new_tokens} tokens …"), *_kept(4)]
            content = collect(events)
            drawn = await asyncio.to_thread(self._draw, answer) if shows_routing else ""
        except (UserError, BusyError, EngineStoppedError) as error:
            message = html.escape(str(error))  # Gradio shows it as HTML
            raise gr.Error(message, duration=None, print_exception=False) from error
        finally:
            if answer is not None:
                answer.cancel()
                self._answers.pop(session, None)
        title = prompt["text"] or "image"
        new = [(part, title) for part in content if isinstance(part, Image.Image)]
        images = [*new, *images][:_KEPT_IMAGES]
        file = await asyncio.to_thread(_write_zip, content)
        download = gr.DownloadButton(value=file, interactive=True)
        yield [answer_html(events, _summary(answer)), download, images, images, drawn]

    def _submit(self, prompt: dict[str, Any], mode: Mode, values: _Values) -> Answer:
        parts = arrange(prompt["text"] or "", [Path(each) for each in prompt["files"]])
        sampling = Sampling(
            values.temperature, values.top_p, int(values.seed), int(values.top_k), values.min_p
        )
        penalized = replace(sampling, repetition_penalty=values.penalty)
        maxima = [each for each in (int(values.tokens), self._limits.tokens) if each]
        settings = Settings(
            mode,
            penalized if mode != "image" else sampling,
            min(maxima, default=None),
            sampling,
            int(values.images) if mode == "image" else 1,
            _guidance(mode, parts, values.text_scale, values.image_scale),
        )
        return self._engine.submit(parts, [settings], True, self._read_image)[0]

    def _read_image(self, file: Path) -> Image.Image:
        return read_image(file, quote(file.name), "choose another", self._limits.pixels)

    def _cancel(self, request: gr.Request) -> None:
        """End the answer of a session, if it has one."""
        if (answer := self._answers.get(str(request.session_hash))) is not None:
            answer.cancel()

    def _draw(self, answer: Answer) -> str:
        """The routing of a prompt and its answer."""

        def route(mixed: MixedModel) -> str:
            ids = first_tokens(np.array(answer.ids), mixed.context, mixed.model.vocabulary)
            return draw_routing(mixed, [route_document(mixed.model, ids, "causal")])

        drawn = self._engine.call(route).result()
        return f"<style>{ROUTING_STYLE}</style>{drawn}"


def _answer_parts(has_images: bool) -> tuple[gr.HTML, gr.DownloadButton, gr.Gallery]:
    """The answer, a button to save it, and the images of the session."""
    answer = gr.HTML(answer_html([]), elem_id="answer", apply_default_css=False, padding=False)
    download = gr.DownloadButton("Download", interactive=False, size="sm")
    gallery = gr.Gallery(
        label="Images of this session",
        columns=5,
        fit_columns=False,
        height=190,
        object_fit="contain",
        format="png",
        visible=has_images,
        elem_id="gallery",
        buttons=["download", "fullscreen"],
    )
    return answer, download, gallery


def _options(context: int) -> list[gr.components.Component]:
    """The components of `_Values`, two in a row."""
    # Label, lowest and highest value, default, step and hint.
    sliders: dict[str, tuple[str, float, float, float, float, str | None]] = {
        "temperature": ("Temperature", 0, 2, 0.7, 0.05, None),
        "top_p": ("Top-p", 0.05, 1, 0.9, 0.05, None),
        "top_k": ("Top-k", 0, 200, 0, 1, "0: all"),
        "min_p": ("Min-p", 0, 1, 0, 0.01, "0: off"),
        "penalty": ("Repetition penalty", 1, 2, 1, 0.05, "text; 1: off"),
        "tokens": ("New tokens", 0, context, 0, 1, "0: what fits"),
        "images": ("Images", 1, 8, 1, 1, "output: image"),
        "text_scale": ("Text guidance", 0, 8, 1, 0.1, "images; 1: off"),
        "image_scale": ("Image guidance", 0, 8, 1, 0.1, "images; 1: off"),
    }
    hidden: dict[str, Any] = {"render": False, **_HALF}
    components: dict[str, gr.components.Component] = {
        name: gr.Slider(low, high, value, step=step, label=label, info=info, **hidden)
        for name, (label, low, high, value, step, info) in sliders.items()
    }
    limits: dict[str, Any] = {"precision": 0, "minimum": 0, "maximum": MAX_SEED}
    components["seed"] = gr.Number(0, label="Seed", info="vary it for others", **limits, **hidden)
    options = [components[name] for name in _Values._fields]
    with gr.Accordion("Sampling and guidance", open=False):
        for first, second in zip(options[::2], options[1::2], strict=True):
            with gr.Row():
                first.render()
                second.render()
    return options


def _guidance(mode: Mode, prompt: Sequence[object], text: float, image: float) -> Guidance | None:
    """Guidance with the scales that have an effect; None if there is none."""
    has_text = any(isinstance(part, str) for part in prompt)
    has_image = any(not isinstance(part, str) for part in prompt)
    scales = text if has_text else 1.0, image if has_image else 1.0
    return None if mode != "image" or scales == (1.0, 1.0) else Guidance(*scales)


def _kept(count: int) -> list[Any]:
    """Outputs that stay as they are."""
    return [gr.skip()] * count


def _summary(answer: Answer) -> str:
    ends = {"stop": "complete", "length": "the limit of tokens is reached", "cancelled": "stopped"}
    seconds = (answer.ended or answer.submitted) - answer.submitted
    end = ends.get(str(answer.end), answer.end)
    return f"{answer.prompt_tokens} + {answer.new_tokens} tokens, {seconds:.1f} s, {end}"


def _write_zip(content: Sequence[Content]) -> str:
    """Write an answer as a file to download: its text, and its images by their numbers."""
    path = Path(mkdtemp(dir=FOLDER)) / "answer.zip"
    text, images = "", 0
    with zipfile.ZipFile(path, "w") as archive:
        for part in content:
            if isinstance(part, str):
                text += part
                continue
            images += 1
            text += f"[image_{images}.png]"
            with archive.open(f"image_{images}.png", "w") as file:
                part.save(file, "PNG")
        archive.writestr("answer.txt", text)
    return str(path)
