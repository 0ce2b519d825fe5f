"""What every command of `iir` shares: the group, errors as one sentence, a config, one line about a finished stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from iir_dist import __version__
from iir_dist.errors import IirError

if TYPE_CHECKING:
    from iir_dist.artifact import Manifest

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
F = TypeVar("F", bound=Callable[..., Any])


class Main(click.Group):
    """Turns errors into one sentence, whichever command they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IirError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(f"{error.strerror or error}: {error.filename or 'unknown file'}") from error


class Stage(click.Command):
    """A command with a config: `-h` lists the keys that --config and --set take."""

    config: str = ""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        keys = _keys(self.config)
        with formatter.section(f"Keys of [{self.name}] for --config and --set, with defaults"):
            formatter.write_dl(keys)


def _keys(path: str) -> list[tuple[str, str]]:
    """Dotted keys of a config and their defaults."""
    from pydantic import BaseModel

    def walk(value: BaseModel, prefix: str) -> list[tuple[str, str]]:
        rows = []
        for name in type(value).model_fields:
            inner = getattr(value, name)
            rows += walk(inner, f"{prefix}{name}.") if isinstance(inner, BaseModel) else [(prefix + name, f"{inner!r}")]
        return rows

    return walk(_model(path)(), "")


def _model(path: str) -> Any:
    import importlib

    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def stage(name: str, config: str, group: click.Group | None = None) -> Callable[[F], click.Command]:
    """A stage's command: --config, --set, --force, and the checked config as first argument."""

    def decorate(function: F) -> click.Command:
        def call(config_file: str | None, settings: tuple[str, ...], **arguments: Any) -> None:
            from iir_dist.config import load
            from iir_dist.storage import StorageConfig

            shared = [s.removeprefix("storage.") for s in settings if s.startswith("storage.")]
            load(StorageConfig, "storage", config_file, shared).to_environment()
            own = [s for s in settings if not s.startswith("storage.")]
            function(load(_model(config), name, config_file, own), **arguments)

        call.__doc__ = function.__doc__
        call.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        for option in (
            click.option("--force", is_flag=True, help="Replace what the output folder holds."),
            click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set one key; repeatable."),
            click.option("--config", "config_file", metavar="FILE.toml", help=f"Read the table [{name}] of a file."),
        ):
            call = option(call)
        command: Stage = (group or main).command(name, cls=Stage)(call)  # type: ignore[assignment]
        command.config = config
        return command

    return decorate


@click.group(cls=Main, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="iir")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", envvar="IIR_LOG_FORMAT",
    help="Progress and log lines: text, or a JSON object each, with the id of the run.",
)  # fmt: skip
def main(verbose: bool, log_format: str) -> None:
    """Instance-level image retrieval at scale.

    Stages meet through folders, on local disk or s3://: ingest, then pretrain, finetune or encoder, then embed, whiten,
    index, search, evaluate and report. Each is resumable: after an interruption run the same command again.
    """
    from iir_dist.telemetry import log_to_stderr

    log_to_stderr(log_format, logging.DEBUG if verbose else logging.INFO)


out = click.option("--out", required=True, metavar="DIR", help="Output folder or s3:// address.")


def report_done(uri: str, manifest: Manifest, *counts: str) -> None:
    """One line about a finished stage."""
    shown = ", ".join(f"{manifest.counts[key]} {key}" for key in counts if key in manifest.counts)
    click.echo(f"{uri}: {manifest.stage} {manifest.fingerprint[:12]}, {shown}")
