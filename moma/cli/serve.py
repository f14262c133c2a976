"""`moma serve`: a run behind an HTTP endpoint."""

from pathlib import Path
from typing import Annotated

from typer import Option

from moma.cli.arguments import COUNT_LIMIT, App, CausalRouting, RunFolder
from moma.errors import UserError

app = App()


Host = Annotated[str, Option(help="address to listen on; any but a loopback one needs a token")]
Port = Annotated[int, Option(min=0, max=65535, help="0: any that is free")]
TokenFile = Annotated[
    Path | None, Option(help="file with the token that clients send; otherwise from MOMA_TOKEN")
]
Name = Annotated[str | None, Option(help="name of the model; the run's, if omitted")]
MaxActive = Annotated[int, Option(min=1, max=4096, help="requests to generate together")]
MaxQueued = Annotated[int, Option(min=0, max=COUNT_LIMIT, help="requests that may wait")]
MaxTokens = Annotated[
    int | None,
    Option(min=1, max=COUNT_LIMIT, help="new tokens of an answer  [default: the context]"),
]
MaxBody = Annotated[int, Option(min=1, max=COUNT_LIMIT, help="bytes of a request")]
MaxPixels = Annotated[int, Option(min=1, max=COUNT_LIMIT, help="pixels of an image in a request")]
HasPage = Annotated[bool, Option("--page/--no-page", help="serve a web page beside the endpoint")]


@app.command()
def serve(
    run: RunFolder,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    name: Name = None,
    max_active: MaxActive = 8,
    max_queued: MaxQueued = 64,
    max_tokens: MaxTokens = None,
    max_body: MaxBody = 16 * 2**20,
    max_pixels: MaxPixels = 16_000_000,
    page: HasPage = True,
    routing: CausalRouting = "causal",
) -> None:
    """Serve a run: a web page and an OpenAI-compatible endpoint. Ctrl-C or SIGTERM ends it."""
    try:
        from moma.serve.app import Limits, create_app
        from moma.serve.guard import read_token
        from moma.serve.server import listen, run_server

        if page:
            from moma.serve.page import mount_page
            from moma.serve.page_html import PATH
            from moma.serve.page_run import RunView
    except ModuleNotFoundError as error:
        raise UserError(f"moma serve: {error}; run pip install 'moma[serve]'") from error
    import moma
    from moma.runs import Run
    from moma.serve.engine import Engine

    token = read_token(token_file, host)
    limits = Limits(body_bytes=max_body, pixels=max_pixels, tokens=max_tokens)
    with listen(host, port) as listener:
        model = moma.load(run, routing)
        with Engine(model, max_active, max_queued) as engine:
            served = create_app(engine, name or run.resolve().name, limits, token)
            end = mount_page(served, engine, RunView(Run(run)), limits) if page else lambda: None
            address = f"[{host}]" if ":" in host else host
            url = f"http://{address}:{listener.getsockname()[1]}"
            print(f"{url}/v1", *([f"{url}{PATH}"] if page else []), sep="\n", flush=True)
            run_server(served, engine, listener, end)
