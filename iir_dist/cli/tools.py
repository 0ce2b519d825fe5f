"""Commands about artifacts and this machine, and the demo."""

from __future__ import annotations

import sys
from typing import Any

import click

from iir_dist.cli.skin import main, stage


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
