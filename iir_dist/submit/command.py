"""A command line of `iir`, checked on this machine before a cluster is troubled with it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import click

from iir_dist.config import fingerprint, read_toml
from iir_dist.errors import ConfigError, InputError

CONFIG = "config.toml"
"""Name of the config file in the package."""
_ADDRESSES = re.compile(
    r"\b(DIR|EMBEDDINGS|ENCODER|FILE|GROUNDTRUTH|IMAGES|INDEX|METRICS|PATH|RANKINGS|SOURCE)\b(?!\.toml)"
)
"""Words in the help of a parameter that mean a folder or file."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be run.

    Args:
        words: the command's name, `("rerank", "qe")`.
        arguments: what follows it, as the cluster gets it.
        config: the file that --config named.
        fingerprint: of the command, its resolved config and where it reads and writes.
    """

    words: tuple[str, ...]
    arguments: tuple[str, ...]
    config: Path | None
    fingerprint: str

    @property
    def script(self) -> str:
        """The entry point below the package."""
        return f"jobs/{self.words[0]}.py"

    @property
    def submission_id(self) -> str:
        """Of the first attempt."""
        return f"iir-{'-'.join(self.words)}-{self.fingerprint[:12]}"


def parse(main: click.Group, line: Sequence[str], shared: Sequence[str] = ()) -> Work:
    """Check a command line.

    Args:
        main: `iir` itself.
        line: `["embed", "s3://…", "--encoder", …]`.
        shared: folders that all nodes have under the same path.

    Raises:
        click.UsageError: it is not a command line of `iir`.
        ConfigError: a key or value of its config is wrong.
        InputError: a folder is one of this machine.
    """
    words, command, arguments = _command(main, list(line))
    # A command remembers the names of its help option from the first context that it sees.
    parent = click.Context(main, info_name="iir", **main.context_settings)
    context = command.make_context(" ".join(words), list(arguments), parent=parent)
    given = dict(context.params)
    for address in _addresses(command, given):
        _check_address(address, shared)
    name = given.pop("config_file", None)
    settings = given.pop("settings", ())
    given.pop("force", None)
    config = _resolved(command, words[-1], name, settings)
    text = {"command": words, "config": config, "arguments": given}
    path = Path(name) if name else None
    if path is not None:
        arguments = [_renamed(argument, name, words) for argument in arguments]
    return Work(tuple(words), tuple(arguments), path, fingerprint(text))


def _command(main: click.Group, line: list[str]) -> tuple[list[str], click.Command, list[str]]:
    """The command that the first words of a line name, and what follows them."""
    words: list[str] = []
    command: click.Command = main
    while isinstance(command, click.Group):
        known = ", ".join(sorted(command.commands))
        if not line:
            raise click.UsageError(f"a command of iir {' '.join(words)} is missing; known: {known}")
        if line[0] not in command.commands:
            raise click.UsageError(f"{line[0]!r} is not a command of iir {' '.join(words)}; known: {known}".strip())
        command = command.commands[line[0]]
        words.append(line.pop(0))
    return words, command, line


def _addresses(command: click.Command, given: dict[str, Any]) -> Iterator[str]:
    """Values of the parameters that name folders or files."""
    for parameter in command.params:
        value = given.get(parameter.name or "")
        metavar = getattr(parameter, "metavar", None) or ""
        if value and _ADDRESSES.search(metavar):
            values = value if isinstance(value, tuple) else (value,)
            yield from (v for v in values if not _is_name(v, metavar))


def _is_name(value: str, metavar: str) -> bool:
    """Whether a value, where a file may be given, is something else: a known set, or the name of a row."""
    from iir_dist.index.rows import LISTS

    return ("SOURCE" in metavar and _is_known_set(value)) or (
        metavar.startswith("NAME") and PurePosixPath(value).suffix not in LISTS
    )


def _is_known_set(name: str) -> bool:
    from iir_dist.data.catalog import DATASETS

    return name.lower() in DATASETS


def _check_address(address: str, shared: Sequence[str]) -> None:
    scheme, separator, rest = address.partition("://")
    if separator and scheme != "file":
        return
    path = PurePosixPath(rest if separator else address)
    if path.is_absolute() and any(path.is_relative_to(folder) for folder in shared):
        return
    raise InputError(
        f"{address!r} is a path on this machine, and the nodes of a cluster have disks of their own: use an s3:// address, "
        "or, if every node mounts the folder under the same absolute path, say so with --shared FOLDER"
    )


def _resolved(command: click.Command, table: str, file: str | None, settings: Sequence[str]) -> Any:
    """The checked config of a stage; of a command that has none, what was given."""
    model = getattr(command, "config", None)
    if not model:
        return {"file": read_toml(file) if file else {}, "settings": list(settings)}
    import importlib

    from iir_dist.config import load
    from iir_dist.storage import StorageConfig

    module, _, name = model.partition(":")
    shared = [s.removeprefix("storage.") for s in settings if s.startswith("storage.")]
    load(StorageConfig, "storage", file, shared)
    own = [s for s in settings if not s.startswith("storage.")]
    return load(getattr(importlib.import_module(module), name), table, file, own).resolved()


def _renamed(argument: str, name: str, words: Sequence[str]) -> str:
    if argument == name:
        return CONFIG
    if argument == f"--config={name}":
        return f"--config={CONFIG}"
    if argument.startswith("--config="):
        raise ConfigError(f"iir {' '.join(words)}: --config is given twice; one file holds the tables of all stages")
    return argument
