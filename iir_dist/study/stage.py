"""A study from its config to its page."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from iir_dist.storage import open_folder
from iir_dist.study import estimate
from iir_dist.study.config import StudyConfig
from iir_dist.study.execute import Place, execute, model_of
from iir_dist.study.plan import Plan, plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """What to print; `problems` is empty where everything was done."""

    text: str
    problems: str


def preview(config: StudyConfig) -> str:
    """What `run` would do, without doing any of it. Settings of stages are checked as far as they can be here."""
    planned = plan(config)
    unchecked = check(planned)
    note = f"\n\nNot installed here, so the settings of {', '.join(unchecked)} are not checked." if unchecked else ""
    return estimate.describe(planned, config) + note


def check(planned: Plan) -> list[str]:
    """Build the config of every stage; the stages whose packages are not installed.

    Raises:
        ConfigError: a key or value is wrong.
    """
    unchecked: dict[str, None] = {}
    for node in planned.nodes:
        try:
            model_of(node)
        except ImportError:
            unchecked.setdefault(node.stage)
    return list(unchecked)


def run(config: StudyConfig, out: str, *, data: str | None = None, jobs: int = 1) -> Result:
    """Run what is not finished, and write `study.json` and `index.html`.

    Args:
        data: where paths of the config begin.
        jobs: stages at a time.

    Raises:
        ConfigError: the config of a stage is wrong; nothing has been run then.
    """
    from iir_dist.study import page, result

    planned = plan(config)
    check(planned)
    place = Place(out, data)
    log.info("study: %d stages, about %s", len(planned.nodes), estimate.total(planned, config.machine))
    outcome = execute(planned, place, jobs=jobs)
    found = result.gather(config, planned, place)
    folder = open_folder(out)
    folder.write("study.json", result.to_json(config, planned, found, outcome).encode())
    folder.write("index.html", page.page(config, planned, found, outcome, place).encode())
    problems = ""
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        problems = (
            f"{len(outcome.failed)} of {len(planned.nodes)} stages failed and {len(outcome.skipped)} that need them were not run; "
            f"first {first}: {why}"
        )
    return Result(f"{result.table(found)}\n\nreport: {place.of('index.html')}", problems)
