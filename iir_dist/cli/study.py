"""`iir study`."""

from __future__ import annotations

import sys

import click

from iir_dist.cli.skin import main


@main.command("study")
@click.option("--config", "config_file", required=True, metavar="FILE.toml", help="Its table [study]; docs/study.md.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set one key; repeatable.")
@click.option("--data", metavar="DIR", help="Where paths of the config begin; the present folder where not given.")
@click.option("--out", default="study", show_default=True, metavar="DIR", help="Output folder or s3:// address.")
@click.option("--fast", is_flag=True, help="With the table [study.fast] on top: a quick look.")
@click.option(
    "--dry-run", is_flag=True, help="Show every stage, its inputs and cost, and what is downloaded; run nothing."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=1, help="Stages at a time, on the cluster of RAY_ADDRESS; 1."
)
def study(
    config_file: str, settings: tuple[str, ...], data: str | None, out: str, fast: bool, dry_run: bool, jobs: int
) -> None:
    """Compare ways to make a network: arms, seeds, data sets and questions of a config, to one page.

    Stages that arms share run once; run the same command again to go on, also with a changed config.
    """
    from iir_dist.config import load
    from iir_dist.storage import StorageConfig
    from iir_dist.study import read_config
    from iir_dist.study.stage import preview, run

    own = [s for s in settings if not s.startswith("storage.")]
    config = read_config(config_file, own, fast=fast)
    if dry_run:
        click.echo(preview(config))
        return
    shared = [s.removeprefix("storage.") for s in settings if s.startswith("storage.")]
    load(StorageConfig, "storage", config_file, shared).to_environment()
    result = run(config, out, data=data, jobs=jobs)
    click.echo(result.text)
    if result.problems:
        click.echo(f"Error: {result.problems}", err=True)
        sys.exit(1)
