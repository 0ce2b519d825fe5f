"""One frozen config a stage, read from TOML and `--set`; unknown keys are refused with the known ones listed.

A file holds one table a stage (`[embed]`, `[index]`, …), so one file describes a whole chain. Each model lives
beside the stage that owns it; this module only reads, merges and explains what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from iir_dist.errors import ConfigError

STAGES = (
    "ingest", "encoder", "pretrain", "finetune", "embed", "whiten", "index", "search", "qe", "dba", "diffusion", "superglobal",
    "evaluate", "distractors", "report", "demo", "serve",
)  # fmt: skip


TABLES = (*STAGES, "study", "storage")
"""Of a config file."""


class StageConfig(BaseModel):
    """Base of every stage's config.

    `execution` names the fields that change how fast a stage runs but not what it writes; they are left out of
    the fingerprint, so that a run may be continued with another number of workers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    execution: ClassVar[frozenset[str]] = frozenset()

    def resolved(self) -> dict[str, Any]:
        """Everything that decides the output, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in self.execution}


Config = TypeVar("Config", bound=StageConfig)


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of `value` as canonical JSON.

    >>> fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file, refused if one is not a stage's."""
    try:
        with open(path, "rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(path)!r} is not valid TOML: {error}") from error
    for name, table in tables.items():
        if name not in TABLES or not isinstance(table, dict):
            raise ConfigError(f"{path}: {name!r} is not a table of a stage; known tables: {', '.join(TABLES)}")
    return tables


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """`a.b=c` as (path, value); the value is read as TOML, and as a plain string where it is not.

    >>> parse_setting("index.nlist=64"), parse_setting("backbone=resnet18")
    ((['index', 'nlist'], 64), (['backbone'], 'resnet18'))
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, for example --set size=320; got {setting!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip().split("."), value


def merge(values: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """`values` with each `a.b=c` of `settings` written over it; the input is not changed."""
    merged: dict[str, Any] = json.loads(json.dumps(values))
    for setting in settings:
        path, value = parse_setting(setting)
        table = merged
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {setting}: {part!r} is a value, not a table")
        table[path[-1]] = value
    return merged


def load(model: type[Config], stage: str, file: str | Path | None = None, settings: Iterable[str] = ()) -> Config:
    """The stage's config: its table of `file`, then `settings` on top, checked."""
    values = read_toml(file).get(stage, {}) if file is not None else {}
    return build(model, merge(values, settings), stage)


def build(model: type[Config], values: Mapping[str, Any], stage: str) -> Config:
    """Check `values` against `model`; a wrong one becomes a `ConfigError` that names key, value and what is known."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problems = [_explain(model, stage, problem) for problem in error.errors()]
        raise ConfigError("; ".join(problems)) from error


def _explain(model: type[BaseModel], stage: str, problem: Any) -> str:
    keys, table = _walk(model, [str(part) for part in problem["loc"]])
    key = ".".join([stage, *keys])
    if problem["type"] == "extra_forbidden":
        return f"{key} is not a known key; known: {', '.join(sorted(table.model_fields))}"
    if problem["type"] == "missing":
        return f"{key} must be set, for example with --set {'.'.join(keys)}=…"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} = {problem['input']!r}: {message}"


def _walk(model: type[BaseModel], location: list[str]) -> tuple[list[str], type[BaseModel]]:
    """Keys of a location, without the names that chose one of several tables, and the innermost table."""
    keys: list[str] = []
    choices: dict[str, type[BaseModel]] = {}
    for part in location:
        if part in choices:
            model, choices = choices[part], {}
            continue
        keys.append(part)
        field = model.model_fields.get(part)
        choices = _tables(field.annotation) if field is not None else {}
        if len(choices) == 1:
            (model,), choices = choices.values(), {}
    return keys, model


def _tables(annotation: Any) -> dict[str, type[BaseModel]]:
    """Tables that a field may hold, by the name that chooses one."""
    kinds = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
    return {str(t.model_fields["name"].default) if "name" in t.model_fields else "": t for t in kinds}
