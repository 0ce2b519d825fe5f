"""Commands that run the others as jobs on a Ray cluster, and that clean up after jobs that were killed."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from iir_dist.cli.skin import main

if TYPE_CHECKING:
    from iir_dist.submit.jobs import Jobs

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

address = click.option("--address", metavar="http://HEAD:8265", help="Job server; RAY_ADDRESS where not given.")


@main.command("submit", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@address
@click.option("--pip", is_flag=True, help="Install the pinned dependencies on the nodes, which else have them.")
@click.option("--shared", multiple=True, metavar="FOLDER", help="All nodes mount it under this path; repeatable.")
@click.option("--no-credentials", is_flag=True, help="Pass no AWS_* and IIR_* variable on; the nodes have a role.")
@click.option("--detach", is_flag=True, help="Return when it is submitted, do not follow.")
@click.argument("line", nargs=-1, required=True, metavar="COMMAND [ARGS]...", type=click.UNPROCESSED)
def submit(
    address: str | None, pip: bool, shared: tuple[str, ...], no_credentials: bool, detach: bool, line: tuple[str, ...]
) -> None:
    """Run a command of iir as a job on a Ray cluster: iir submit embed s3://…

    What is submitted twice runs once: while a job of the same command, config and folders is under way, it is followed.
    Stages go on where an interrupted one stopped. The exit code is that of the job.
    """
    import os

    from iir_dist import credentials
    from iir_dist.submit.command import parse
    from iir_dist.submit.jobs import Jobs, package_note
    from iir_dist.submit.package import pack, runtime_env
    from iir_dist.telemetry import RUN

    work = parse(main, line, shared)
    variables = {} if no_credentials else credentials.found(os.environ)
    with tempfile.TemporaryDirectory(prefix="iir-submit-") as scratch:
        folder = Path(scratch)
        size = pack(folder, work, variables | {RUN: work.submission_id})
        click.echo(package_note(size, folder, list(variables)), err=True)
        jobs = Jobs(address)
        entrypoint = shlex.join(["python", work.script, *work.words[1:], *work.arguments])
        name, begun = jobs.submit(work.submission_id, entrypoint, lambda: runtime_env(folder, pip=pip))
    click.echo(f"{name}: {'submitted' if begun else 'is running already, joined'}", err=True)
    if not detach:
        _follow(jobs, name)


@main.group("jobs")
def jobs_group() -> None:
    """Jobs of a Ray cluster: list, logs, stop."""


@jobs_group.command("list")
@address
def list_jobs(address: str | None) -> None:
    """Every job that the cluster remembers, the newest first."""
    from datetime import datetime

    from iir_dist.submit.jobs import Jobs

    for job in Jobs(address).list():
        started = datetime.fromtimestamp((job.start_time or 0) / 1000).strftime("%Y-%m-%d %H:%M:%S")
        seconds = f"{(job.end_time - job.start_time) / 1000:.0f} s" if job.end_time and job.start_time else ""
        click.echo(f"{job.submission_id:<40} {job.status.value:<10} {started}  {seconds:>8}  {job.entrypoint}")


@jobs_group.command("logs")
@address
@click.option("-f", "--follow", is_flag=True, help="Go on until it ends; the exit code is that of the job.")
@click.argument("job", metavar="ID")
def logs(address: str | None, follow: bool, job: str) -> None:
    """What a job printed."""
    from iir_dist.submit.jobs import Jobs

    jobs = Jobs(address)
    if follow:
        jobs.get(job)
        _follow(jobs, job)
    else:
        click.echo(jobs.logs(job), nl=False)


@jobs_group.command("stop")
@address
@click.argument("job", metavar="ID")
def stop(address: str | None, job: str) -> None:
    """Stop a job; what it has finished is kept, and the same command goes on."""
    from iir_dist.submit.jobs import Jobs

    click.echo(f"{job}: {'stopped' if Jobs(address).stop(job) else 'had ended before'}")


def _follow(jobs: Jobs, name: str) -> None:
    """Show what a job prints and exit as it does; on Ctrl-C ask what is to become of it."""
    try:
        code = jobs.follow(name, lambda text: click.echo(text, nl=False))
    except KeyboardInterrupt:
        if _is_asked() and click.confirm(f"\n{name} is running. Stop it?", default=False, err=True):
            jobs.stop(name)
            click.echo(f"{name}: stopped; submitted again it continues from what is finished", err=True)
        else:
            click.echo(f"\n{name} goes on: iir jobs logs -f {name}; iir jobs stop {name}", err=True)
        sys.exit(INTERRUPTED)
    if code:
        click.echo(f"{name}: failed with exit code {code}", err=True)
    sys.exit(code)


def _is_asked() -> bool:
    """Whether there is somebody to answer a question."""
    return sys.stdin.isatty()


@main.command("gc")
@click.option("--dry-run", is_flag=True, help="Show what would be removed.")
@click.argument("folder", metavar="DIR")
def gc(folder: str, dry_run: bool) -> None:
    """Remove what killed processes have left below DIR: _work/ of finished artifacts, files not written to their end."""
    from iir_dist.leftovers import collect

    found, busy = collect(folder, remove=not dry_run)
    for address in found:
        click.echo(address)
    for address in busy:
        click.echo(f"{address} is being written, passed over", err=True)
    click.echo(f"{len(found)} files {'to remove' if dry_run else 'removed'}", err=True)
