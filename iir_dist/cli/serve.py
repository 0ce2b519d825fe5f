"""Search by photo: a server with its page, and a query to one."""

from __future__ import annotations

from typing import Any

import click

from iir_dist.cli.skin import Stage, main

EXTRA = "iir serve needs packages that are not installed ({}); pip install 'iir-dist[serve]'"


@main.command(cls=Stage)
@click.argument("index", metavar="INDEX")
@click.option("--images", multiple=True, metavar="IMAGES", help="Where the photos of the index are; repeatable.")
@click.option(
    "--encoder", metavar="ENCODER", help="The encoder of the index; without it only stored photos can be asked with."
)
@click.option("--local", is_flag=True, help="One process on this machine, without Ray.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Any but this machine's own needs a token.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one.")
@click.option("--token", envvar="IIR_SERVE_TOKEN", help="Made and shown once where one is needed and none is given.")
@click.option("--config", "config_file", metavar="FILE.toml", help="Read the table [serve] of a file.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set one key; repeatable.")
def serve(
    index: str, images: tuple[str, ...], encoder: str | None, local: bool, host: str, port: int, token: str | None,
    config_file: str | None, settings: tuple[str, ...],
) -> None:  # fmt: skip
    """Search by photo: an HTTP API, and a page for people."""
    import contextlib
    import secrets
    import signal

    from iir_dist.config import load
    from iir_dist.errors import ConfigError
    from iir_dist.storage import StorageConfig

    try:
        from iir_dist.serve import app, deploy
        from iir_dist.serve import local as one
        from iir_dist.serve.config import ServeConfig
        from iir_dist.serve.limits import LOCAL, check_token
        from iir_dist.serve.service import Service
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("iir_dist"):
            raise
        raise ConfigError(EXTRA.format(error.name)) from error
    shared = [s.removeprefix("storage.") for s in settings if s.startswith("storage.")]
    load(StorageConfig, "storage", config_file, shared).to_environment()
    config = load(ServeConfig, "serve", config_file, [s for s in settings if not s.startswith("storage.")])
    if token is not None:
        check_token(token)
    elif host not in LOCAL:
        token = secrets.token_urlsafe(24)
    shown = f"[{host}]" if ":" in host else host
    if local:
        with one.listen(host, port) as sock:
            service = Service(index, config, images, encoder)
            _announce(service.info().model_dump(), f"http://{shown}:{sock.getsockname()[1]}/", token)
            with contextlib.suppress(KeyboardInterrupt):  # it has ended as it should
                one.server(app.build(service, token), config.upload_sec).run(sockets=[sock])
        return
    if port == 0:
        with one.listen(host, 0) as sock:
            port = sock.getsockname()[1]
    deploy.run(index, config, images, encoder, token, host, port)
    try:
        _announce(None, f"http://{shown}:{port}/", token)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
    finally:
        deploy.stop()


serve.config = "iir_dist.serve.config:ServeConfig"  # type: ignore[attr-defined]


def _announce(info: dict[str, Any] | None, address: str, token: str | None) -> None:
    from urllib.parse import quote

    if info:
        photos = "" if info["photos"] == info["rows"] else f", {info['photos']:,} of them with photos"
        click.echo(f"{info['name']} {info['fingerprint'][:12]}: {info['rows']:,} rows{photos}")
    click.echo(f"ready: {address}" + (f"#token={quote(token, safe='')}" if token else ""))
    if token:
        click.echo("the address holds the token: who has it can search. It is not shown again.")


@main.command()
@click.argument("image", metavar="IMAGE")
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where `iir serve` is.")
@click.option("--token", envvar="IIR_SERVE_TOKEN", help="Where it needs one.")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1, 1000), help="Length of the list.")
@click.option("--box", metavar="X1,Y1,X2,Y2", help="px of the upright photo: search with this part of it.")
@click.option(
    "--recall", type=click.FloatRange(0, 1, min_open=True), help="The cheapest operating point that reaches it."
)
@click.option(
    "--rerank", type=click.Choice(["qe", "dba", "diffusion", "superglobal"]), help="Re-rank the first of the list."
)
@click.option("--json", "as_json", is_flag=True, help="The whole answer, as the server gave it.")
def query(
    image: str,
    url: str,
    token: str | None,
    k: int,
    box: str | None,
    recall: float | None,
    rerank: str | None,
    as_json: bool,
) -> None:
    """Search a running `iir serve` with a photo, or with a stored one: id:42."""
    import json

    from iir_dist.client import Client
    from iir_dist.errors import InputError

    sides = None
    if box is not None:
        try:
            sides = [float(side) for side in box.split(",")]
        except ValueError:
            raise InputError(f"--box {box}: expected four numbers, such as 10,20,300,240") from None
    given: dict[str, Any] = {"k": k, "box": sides, "recall": recall, "rerank": rerank}
    stored = image.removeprefix("id:")
    what: int | str = int(stored) if stored != image and stored.isdecimal() else image
    answer = Client(url, token).answer(what, **given)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for hit in answer["hits"]:
        click.echo(f"{hit['rank'] + 1:>4}  {hit['score']:.4f}  {hit['id']:>8}  {hit['name']}")
    steps = ", ".join(f"{step} {ms:.1f}" for step, ms in answer["steps_ms"].items())
    click.echo(f"{answer['used']['rows']:,} rows in {answer['total_ms']:.1f} ms ({steps})", err=True)
