"""`iir`: parse, call one stage, print what it gave; errors of ours become one sentence and exit code 1.

Nothing heavy is imported here: each command imports its stage when it runs, so that `iir --help` is quick.
"""

from __future__ import annotations

import logging
import sys
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


def stage(name: str, config: str) -> Callable[[F], click.Command]:
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
        command: Stage = main.command(name, cls=Stage)(call)  # type: ignore[assignment]
        command.config = config
        return command

    return decorate


@click.group(cls=Main, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="iir")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(verbose: bool) -> None:
    """Instance-level image retrieval at scale.

    Stages meet through folders, on local disk or s3://: ingest, then pretrain, finetune or encoder, then embed, whiten,
    index, search, evaluate and report. Each is resumable: after an interruption run the same command again.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logging.getLogger("iir_dist").setLevel(logging.DEBUG if verbose else logging.INFO)


out = click.option("--out", required=True, metavar="DIR", help="Output folder or s3:// address.")


def _list_known(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        from iir_dist.data.catalog import format_table

        click.echo(format_table())
        ctx.exit()


@stage("ingest", "iir_dist.ingest:IngestConfig")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@out
@click.option(
    "--list", is_flag=True, is_eager=True, expose_value=False, callback=_list_known, help="Show the known sets."
)
@click.option("--groundtruth", metavar="PATH", help="gnd_*.pkl, a JSON of that structure, or a folder of *_query.txt.")
@click.option("--labels", metavar="FILE", help="CSV or Parquet with name and label; before other labels.")
@click.option("--split", type=click.Choice(["db", "query", "train", "distractor"]), help="Split of the rows.")
@click.option("--dedupe", is_flag=True, help="Leave out images whose bytes an earlier one has.")
@click.option("--max-rejected", type=click.FloatRange(0, 1), help="Fraction with which it still succeeds; 0.01.")
@click.option(
    "--retry-rejected", is_flag=False, flag_value="unreadable,changed", metavar="[REASON,...]",
    help="Try again what a finished run rejected; unreadable,changed where no reason is given.",
)  # fmt: skip
def ingest(
    config: Any,
    sources: tuple[str, ...],
    out: str,
    groundtruth: str | None,
    labels: str | None,
    retry_rejected: str | None,
    force: bool,
    **given: Any,
) -> None:
    """Pack raw photos into images/.

    SOURCE is a folder, an archive (.tar, .tar.gz, .tar.zst, .zip, …) or a list (.csv, .parquet with a column uri),
    local, s3:// or http(s)://; or the name of a known set (--list).
    """
    from iir_dist.ingest import run

    config = config.model_copy(
        update={key: value for key, value in given.items() if value is not None and value is not False}
    )
    retry = tuple(retry_rejected.split(",")) if retry_rejected else ()
    manifest = run(list(sources), out, config, groundtruth_uri=groundtruth, labels_uri=labels, retry=retry, force=force)
    _done(out, manifest, "in", "out", "rejected", "rows", "queries", "duplicates")
    if manifest.counts["rejected"]:
        click.echo(
            f"{manifest.counts['rejected']} images were rejected; see {out.rstrip('/')}/rejected.parquet", err=True
        )


@stage("encoder", "iir_dist.models.encoder:EncoderConfig")
@out
def encoder(config: Any, out: str, force: bool) -> None:
    """Write an off-the-shelf encoder."""
    from iir_dist.models.encoder import run

    _done(out, run(out, config, force=force), "parameters")


@stage("pretrain", "iir_dist.train.pretrain:PretrainConfig")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@out
def pretrain(config: Any, images: tuple[str, ...], out: str, force: bool) -> None:
    """Contrastive pretraining (SimCLR) on images/; labels are not used."""
    from iir_dist.train.pretrain import run

    _done(out, run(list(images), out, config, force=force), "images", "steps")


@stage("finetune", "iir_dist.train.finetune:FinetuneConfig")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--init", required=True, metavar="ENCODER", help="Encoder to start from.")
@out
def finetune(config: Any, images: tuple[str, ...], init: str, out: str, force: bool) -> None:
    """Fine-tune an encoder on labelled images/ with the AP loss."""
    from iir_dist.train.finetune import run

    _done(out, run(list(images), init, out, config, force=force), "images", "steps")


@stage("embed", "iir_dist.embed:EmbedConfig")
@click.argument("images", metavar="IMAGES")
@click.option("--encoder", required=True, metavar="ENCODER")
@out
def embed(config: Any, images: str, encoder: str, out: str, force: bool) -> None:
    """Embed images/ (or whiten finished embeddings/ of the same network)."""
    from iir_dist.embed import run

    manifest = run(images, encoder, out, config, force=force)
    _done(out, manifest, "in", "out", "rejected")


@stage("whiten", "iir_dist.whiten:WhitenConfig")
@click.argument("inputs", metavar="EMBEDDINGS|IMAGES")
@click.option("--encoder", required=True, metavar="ENCODER", help="Encoder to whiten; it made the embeddings.")
@click.option(
    "--images",
    metavar="IMAGES",
    help="Images that the embeddings were made of; their labels are the pairs of method=lw.",
)
@out
def whiten(config: Any, inputs: str, encoder: str, images: str | None, out: str, force: bool) -> None:
    """Learn whitening on a training set and store it in the encoder.

    By PCA (method=pca) or from matching pairs (method=lw) of EMBEDDINGS; or PCA of each region of R-MAC (method=regions),
    learnt on a sample of IMAGES, which can be followed by one of the others.
    """
    from iir_dist.whiten import run

    manifest = run(inputs, encoder, out, config, images_uri=images, force=force)
    _done(out, manifest, "vectors", "pairs", "classes", "alone", "unlabelled", "images", "rejected", "regions")


@stage("index", "iir_dist.index.plan:IndexConfig")
@click.argument("embeddings", nargs=-1, required=True, metavar="EMBEDDINGS...")
@out
def index(config: Any, embeddings: tuple[str, ...], out: str, force: bool) -> None:
    """Build a sharded IVF-PQ index over one or more embeddings/."""
    from iir_dist.index.build import run

    _done(out, run(list(embeddings), out, config, force=force), "rows")


@stage("search", "iir_dist.index.search:SearchConfig")
@click.argument("database", nargs=-1, required=True, metavar="INDEX...")
@click.option("--queries", required=True, multiple=True, metavar="EMBEDDINGS", help="Repeatable.")
@click.option("-k", type=click.IntRange(min=1), help="List depth; all for exact search, 1000 for an index.")
@out
def search(
    config: Any, database: tuple[str, ...], queries: tuple[str, ...], k: int | None, out: str, force: bool
) -> None:
    """Rank an index, or embeddings/ exactly, for every query."""
    from iir_dist.index.search import run

    config = config.model_copy(update={"k": k}) if k else config
    _done(out, run(list(database), list(queries), out, config, force=force), "queries", "rows")


@stage("evaluate", "iir_dist.evaluate:EvaluateConfig")
@click.argument("rankings", metavar="RANKINGS")
@click.option("--groundtruth", required=True, metavar="PATH", help="As for ingest, or an images/ folder that has one.")
@click.option("--protocol", type=click.Choice(["revisited", "original"]), help="Insist on a protocol.")
@out
def evaluate(config: Any, rankings: str, groundtruth: str, protocol: str | None, out: str, force: bool) -> None:
    """Score rankings by the original or revisited protocol."""
    from iir_dist.evaluate import run

    config = config.model_copy(update={"protocol": protocol}) if protocol else config
    manifest = run(rankings, groundtruth, out, config, force=force)
    _done(out, manifest, "queries")
    for level, m in manifest.info["metrics"].items():
        if m["num_queries"]:
            precision = "  ".join(f"mP@{k} {m[f'mp@{k}']:.4f}" for k in (1, 5, 10))
            click.echo(f"{level:<9} mAP {m['map']:.4f}  {precision}  over {m['num_queries']} queries")


@stage("report", "iir_dist.report:ReportConfig")
@click.argument("metrics", nargs=-1, required=True, metavar="METRICS...")
@click.option("--images", multiple=True, metavar="IMAGES", help="images/ to show thumbnails from; repeatable.")
@out
def report(config: Any, metrics: tuple[str, ...], images: tuple[str, ...], out: str, force: bool) -> None:
    """One self-contained HTML page about finished evaluations."""
    from iir_dist.report import run

    _done(out, run(list(metrics), list(images), out, config, force=force), "evaluations")


@main.command()
@click.argument("folder", metavar="DIR")
def verify(folder: str) -> None:
    """Recompute every checksum of an artifact."""
    from iir_dist.artifact import verify as check

    manifest = check(folder)
    click.echo(f"{folder}: {manifest.stage}, {len(manifest.files)} files as written")


@stage("demo", "iir_dist.demo:DemoConfig")
@click.option("--data", metavar="DIR", help="Real photos; the procedural landmark world where not given.")
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Working folder.")
def demo(config: Any, data: str | None, out: str, force: bool) -> None:
    """The whole chain on this machine: raw photos to a report, in minutes."""
    from iir_dist.demo import run

    rows, page = run(out, config, data=data, force=force)
    click.echo(f"\n{'run':<30} {'level':<8} {'mAP':>6} {'mP@10':>6}  {'database':>8}  search")
    for row in rows:
        score = row["scores"]
        figures = f"{score['mAP']:>6.3f} {score['mP@10']:>6.3f}  {row['database']:>8}"
        click.echo(f"{row['label']:<30} {row['level']:<8} {figures}  {row['search']}")
    click.echo(f"\nreport: {page}")


@main.command()
@click.option("--store", metavar="s3://BUCKET", help="An object store to try.")
def doctor(store: str | None) -> None:
    """Versions, cores, memory, GPUs, Ray, object store, and what is wrong."""
    from iir_dist.doctor import examine

    findings = examine(store)
    for finding in findings:
        click.echo(f"{finding.what:<24} {finding.found}")
        if finding.problem:
            click.echo(f"{'':<24} PROBLEM: {finding.problem}")
    if any(finding.problem for finding in findings):
        sys.exit(1)
    click.echo("nothing is wrong")


def _done(uri: str, manifest: Manifest, *counts: str) -> None:
    """One line about a finished stage."""
    shown = ", ".join(f"{manifest.counts[key]} {key}" for key in counts if key in manifest.counts)
    click.echo(f"{uri}: {manifest.stage} {manifest.fingerprint[:12]}, {shown}")
