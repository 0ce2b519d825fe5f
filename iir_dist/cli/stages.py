"""The stages, in the order in which they are used."""

from __future__ import annotations

from typing import Any

import click

from iir_dist.cli.skin import main, out, report_done, stage


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
    report_done(out, manifest, "in", "out", "rejected", "rows", "queries", "duplicates")
    if manifest.counts["rejected"]:
        click.echo(
            f"{manifest.counts['rejected']} images were rejected; see {out.rstrip('/')}/rejected.parquet", err=True
        )


@stage("encoder", "iir_dist.models.encoder:EncoderConfig")
@out
def encoder(config: Any, out: str, force: bool) -> None:
    """Write an off-the-shelf encoder."""
    from iir_dist.models.encoder import run

    report_done(out, run(out, config, force=force), "parameters")


@stage("pretrain", "iir_dist.train.pretrain_config:PretrainConfig")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--init", metavar="ENCODER", help="Encoder to go on from, in place of [pretrain.encoder].")
@click.option("--probe", metavar="IMAGES", help="Photos with ground truth or labels to search while training.")
@out
def pretrain(config: Any, images: tuple[str, ...], init: str | None, probe: str | None, out: str, force: bool) -> None:
    """Self-supervised pretraining (SimCLR, MoCo, BYOL, SwAV, DINO, ...) on images/; labels are not used."""
    from iir_dist.mine import neighbours
    from iir_dist.train.pretrain import run

    manifest = run(list(images), out, config, init=init, probe=probe, find=neighbours, force=force)
    report_done(out, manifest, "images", "steps")


@stage("finetune", "iir_dist.train.finetune_config:FinetuneConfig")
@click.argument("images", nargs=-1, required=True, metavar="IMAGES...")
@click.option("--init", required=True, metavar="ENCODER", help="Encoder to start from.")
@click.option(
    "--test",
    "tests",
    multiple=True,
    metavar="IMAGES|GROUNDTRUTH",
    help="Test set that must not overlap; may be repeated.",
)
@out
def finetune(config: Any, images: tuple[str, ...], init: str, tests: tuple[str, ...], out: str, force: bool) -> None:
    """Fine-tune an encoder on labelled images/ with an AP loss, or another one."""
    from iir_dist.mine import mine
    from iir_dist.train.finetune import run

    report_done(out, run(list(images), init, out, config, mine=mine, tests=tests, force=force), "images", "steps")


@stage("embed", "iir_dist.embed:EmbedConfig")
@click.argument("images", metavar="IMAGES")
@click.option("--encoder", required=True, metavar="ENCODER")
@out
def embed(config: Any, images: str, encoder: str, out: str, force: bool) -> None:
    """Embed images/ (or whiten finished embeddings/ of the same network)."""
    from iir_dist.embed import run

    manifest = run(images, encoder, out, config, force=force)
    report_done(out, manifest, "in", "out", "rejected")


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
    report_done(out, manifest, "vectors", "pairs", "classes", "alone", "unlabelled", "images", "rejected", "regions")


@stage("index", "iir_dist.index.plan:IndexConfig")
@click.argument("embeddings", nargs=-1, metavar="[EMBEDDINGS...]")
@out
@click.option("--add", is_flag=True, help="Append the embeddings to a finished index.")
@click.option(
    "--delete", multiple=True, metavar="NAME|FILE",
    help="Never return these rows again: a name, or a .txt, .csv or .parquet list of name or id; repeatable.",
)  # fmt: skip
@click.option("--delete-id", multiple=True, type=int, metavar="ID", help="The same by id; repeatable.")
@click.option(
    "--compact", is_flag=False, flag_value="0.2", type=click.FloatRange(0, 1), metavar="[FRACTION]",
    help="Rewrite the shards with more than this fraction of deleted rows; 0.2 where none is given.",
)  # fmt: skip
@click.option("--info", is_flag=True, help="Show what an index is.")
@click.option("--export", metavar="FILE", help="Write all shards as one plain faiss file.")
@click.option("--measure", is_flag=True, help="Measure the operating points of an index that has changed.")
@click.option("--queries", multiple=True, metavar="EMBEDDINGS", help="Queries to measure recall with; repeatable.")
def index(
    config: Any, embeddings: tuple[str, ...], out: str, queries: tuple[str, ...], force: bool, **change: Any
) -> None:
    """Build a sharded IVF-PQ index over one or more embeddings/; or change or show a finished one.

    EMBEDDINGS may be any folder of Parquet files with the columns name and embedding (and id and split, if there).
    """
    wanted = [name for name, value in change.items() if not (value is None or value is False or value == ())]
    if {*wanted} == {"delete", "delete_id"}:
        wanted = ["delete"]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in wanted)
    if len(wanted) > 1:
        raise click.UsageError(f"{flags} exclude each other")
    if wanted and force:
        raise click.UsageError(f"--force builds an index from nothing; it does not go with {flags}")
    if queries and wanted not in ([], ["measure"]):
        raise click.UsageError(f"--queries does not go with {flags}")
    if bool(embeddings) == bool(wanted and wanted != ["add"]):
        raise click.UsageError(f"{flags} takes no EMBEDDINGS" if embeddings else "Missing argument 'EMBEDDINGS...'.")
    if not wanted:
        from iir_dist.index.build import run

        report_done(out, run(list(embeddings), out, config, queries=queries, force=force), "rows")
        return
    from iir_dist.index import living
    from iir_dist.index.export import export
    from iir_dist.index.rows import named

    if wanted == ["info"]:
        click.echo(living.describe(out))
    elif wanted == ["export"]:
        click.echo(f"{change['export']}: {export(out, change['export'])} vectors, a plain faiss file")
    else:
        if wanted == ["add"]:
            manifest = living.add(embeddings, out)
        elif wanted == ["measure"]:
            manifest = living.measure(out, queries)
        elif wanted == ["compact"]:
            manifest = living.compact(out, change["compact"])
        else:
            names, ids = named(change["delete"])
            manifest = living.delete(out, names, [*ids, *change["delete_id"]])
        report_done(out, manifest, "rows", "deleted")


@stage("search", "iir_dist.index.search:SearchConfig")
@click.argument("database", nargs=-1, required=True, metavar="INDEX...")
@click.option("--queries", required=True, multiple=True, metavar="EMBEDDINGS", help="Repeatable.")
@click.option(
    "--recall", type=click.FloatRange(0, 1, min_open=True), help="Cheapest setting of an index that reaches it."
)
@click.option("-k", type=click.IntRange(min=1), help="List depth; all for exact search, 1000 for an index.")
@click.option("--only", metavar="FILE", help="Search only these rows: a .txt, .csv or .parquet list of name or id.")
@click.option("--verify", is_flag=True, help="Check every file of an index first, not each shard before its use.")
@click.option("--allow-partial", is_flag=True, help="Answer without shards that are lost; say which rows are missing.")
@out
def search(
    config: Any,
    database: tuple[str, ...],
    queries: tuple[str, ...],
    recall: float | None,
    k: int | None,
    only: str | None,
    out: str,
    force: bool,
    **flags: bool,
) -> None:
    """Rank an index, or embeddings/ exactly, for every query."""
    from iir_dist.index.search import run

    given = {**flags, "k": k, "recall": recall}
    config = config.model_copy(update={key: value for key, value in given.items() if value})
    manifest = run(list(database), list(queries), out, config, only=only, force=force)
    report_done(out, manifest, "queries", "rows")
    for start, stop in manifest.info.get("missing", ()):
        click.echo(f"database rows {start} to {stop - 1} are missing")


@stage("evaluate", "iir_dist.evaluate:EvaluateConfig")
@click.argument("rankings", metavar="RANKINGS")
@click.option("--groundtruth", required=True, metavar="PATH", help="As for ingest, or an images/ folder that has one.")
@click.option("--protocol", type=click.Choice(["revisited", "original", "custom"]), help="Insist on a protocol.")
@out
def evaluate(config: Any, rankings: str, groundtruth: str, protocol: str | None, out: str, force: bool) -> None:
    """Score rankings by the original or revisited protocol, or by labels or pairs of your own."""
    from iir_dist.evaluate import run

    config = config.model_copy(update={"protocol": protocol}) if protocol else config
    manifest = run(rankings, groundtruth, out, config, force=force)
    report_done(out, manifest, "queries")
    for level, m in manifest.info["metrics"].items():
        if m["num_queries"]:
            scores = {n: v for n, v in m.items() if n.startswith(("mp@", "recall@", "micro")) and v is not None}
            text = "  ".join(f"{n.replace('mp@', 'mP@')} {v:.4f}" for n, v in scores.items())
            figure = manifest.info["protocol"]["figure"]
            click.echo(f"{level:<9} {figure} {m['map']:.4f}  {text}  over {m['num_queries']} queries")
    for d in manifest.info["protocol"]["differences"]:
        click.echo(f"not as published: {d['choice']}: {d['here']} (published: {d['published']})")


@main.command("compare")
@click.argument("a", metavar="METRICS")
@click.argument("b", metavar="METRICS")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compare(a: str, b: str, as_json: bool) -> None:
    """Two evaluations side by side: paired differences, and where the protocols differ."""
    from iir_dist.compare import run

    found = run(a, b)
    click.echo(found.to_json() if as_json else found.table())


@stage("report", "iir_dist.report:ReportConfig")
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--images", multiple=True, metavar="IMAGES", help="images/ to show photos from; repeatable.")
@out
def report(config: Any, folders: tuple[str, ...], images: tuple[str, ...], out: str, force: bool) -> None:
    """One self-contained HTML page about finished evaluations and distractor benchmarks.

    DIR is what evaluate or bench distractors wrote. Evaluations are compared with the first one given; they have to be over
    the same queries.
    """
    from iir_dist.report import run

    report_done(out, run(list(folders), list(images), out, config, force=force), "evaluations", "benchmarks")
    click.echo(f"report: {out.rstrip('/')}/index.html")


@main.group()
def rerank() -> None:
    """Order the first of each list anew, by vectors of the whole neighbourhood."""


def _rerank(name: str, config: str, text: str) -> None:
    @stage(name, f"iir_dist.rerank.{config}", rerank)
    @click.argument("rankings", metavar="RANKINGS")
    @click.option("--database", required=True, multiple=True, metavar="INDEX", help="What was searched; repeatable.")
    @click.option("--queries", required=True, multiple=True, metavar="EMBEDDINGS", help="Repeatable.")
    @out
    def command(
        config: Any, rankings: str, database: tuple[str, ...], queries: tuple[str, ...], out: str, force: bool
    ) -> None:
        from iir_dist.rerank.stage import run

        manifest = run(rankings, database, queries, out, config, force=force)
        report_done(out, manifest, "queries", "rows")
        click.echo(f"{manifest.info['rerank_ms_per_query']} ms a query")

    command.help = text


_rerank("qe", "expansion:QueryExpansion", "Alpha query expansion, and a second search.")
_rerank("dba", "augmentation:Augmentation", "Database-side augmentation of the list.")
_rerank("diffusion", "diffusion:Diffusion", "Diffusion on the graph of mutual neighbours in the list.")
_rerank("superglobal", "superglobal:SuperGlobal", "SuperGlobal re-ranking.")


@main.group()
def bench() -> None:
    """Benchmarks of retrieval."""


@stage("distractors", "iir_dist.bench.stage:BenchConfig", bench)
@click.argument("database", metavar="EMBEDDINGS")
@click.option("--groundtruth", required=True, metavar="PATH", help="As for ingest, or an images/ folder that has one.")
@click.option("--distractors", multiple=True, metavar="EMBEDDINGS", help="Embeddings of distractors; repeatable.")
@out
def bench_distractors(
    config: Any, database: str, groundtruth: str, distractors: tuple[str, ...], out: str, force: bool
) -> None:
    """mAP and cost of search among 0, 10^3, … 10^6 distractors."""
    from iir_dist.bench.stage import run

    report_done(out, run(database, groundtruth, distractors, out, config, force=force), "steps")
    click.echo(f"report: {out}/report.html")
