"""`iir submit` and `iir jobs`: what is checked here, what is packed, what is passed on, and what is said when it fails."""

from __future__ import annotations

import io
import json
import os
import shlex
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from job_server import JobServer

from iir_dist import credentials, session
from iir_dist.cli import main
from iir_dist.errors import ConfigError, IirError, InputError, UnreachableError
from iir_dist.submit import jobs as jobs_module
from iir_dist.submit.command import parse
from iir_dist.submit.jobs import Jobs
from iir_dist.submit.package import LIMIT_BYTES, pack, pinned

ROOT = Path(__file__).parents[2]
EMBED = ["embed", "s3://b/images", "--encoder", "s3://b/encoder", "--out", "s3://b/vectors"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with JobServer() as running:
        yield running


def submit(server: JobServer, *line: str) -> Result:
    return CliRunner().invoke(main, ["submit", "--address", server.url, "--detach", *line])


# ------------------------------------------------------------------------------------------------ the command line


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_entry_points_are_the_commands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = path.read_text()
    assert len(text.splitlines()) <= 40
    assert "ray job submit" in text
    assert f"iir submit {path.stem}" in text
    assert path.stem in main.commands
    # The line in the docstring is one that `iir` takes.
    line = text.split(f"python jobs/{path.stem}.py ")[1].splitlines()[0]
    assert parse(main, [path.stem, *shlex.split(line)]).script == f"jobs/{path.stem}.py"


def test_an_entry_point_takes_what_the_command_takes(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "jobs" / "embed.py"), str(tmp_path / "none"), "--encoder", "x", "--out", "y"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert "x has no manifest.json; expected the output of encoder" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (["embed", "photos", "--encoder", "s3://b/e", "--out", "s3://b/v"], "'photos' is a path on this machine"),
        (["embed", "/data/photos", "--encoder", "s3://b/e", "--out", "s3://b/v"], "--shared FOLDER"),
        (["embed", "file:///data/photos", "--encoder", "s3://b/e", "--out", "s3://b/v"], "path on this machine"),
        (["ingest", "s3://b/x", "--labels", "labels.csv", "--out", "s3://b/v"], "'labels.csv' is a path"),
        (["demo"], "'demo' is a path"),
        (["index", "--out", "s3://b/i", "--delete", "gone.csv"], "'gone.csv' is a path"),
        (
            ["rerank", "qe", "s3://b/r", "--database", "i", "--queries", "s3://b/q", "--out", "s3://b/v"],
            "'i' is a path",
        ),
    ],
)
def test_paths_of_this_machine_are_refused(line: list[str], part: str) -> None:
    with pytest.raises(InputError, match=part):
        parse(main, line)


def test_known_sets_stores_and_shared_folders_are_taken() -> None:
    parse(main, ["ingest", "roxford5k", "https://example.org/a.tar", "--out", "s3://b/i"])
    parse(main, ["embed", "/mnt/nfs/i", "--encoder", "/mnt/nfs/e", "--out", "s3://b/v"], ["/mnt/nfs"])
    parse(main, ["index", "--out", "s3://b/i", "--delete", "all_souls_000001.jpg", "--delete", "s3://b/list.csv"])
    with pytest.raises(InputError, match="/mnt/nfs2/i"):
        parse(main, ["embed", "/mnt/nfs2/i", "--encoder", "/mnt/nfs/e", "--out", "s3://b/v"], ["/mnt/nfs"])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (["embde"], "'embde' is not a command"),
        (["rerank"], "a command of iir rerank is missing; known: dba, diffusion, qe, superglobal"),
        (["embed", "s3://b/i", "--encoder", "s3://b/e"], "Missing option '--out'"),
        ([*EMBED, "--fast"], "No such option"),
    ],
)
def test_what_is_no_command_line_is_not_submitted(line: list[str], part: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        parse(main, line)
    assert part in caught.value.format_message()


def test_configs_are_checked_before_they_are_submitted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed\.sise is not a known key"):
        parse(main, [*EMBED, "--set", "sise=3"])
    (tmp_path / "c.toml").write_text("[embed]\ndtype = 'float99'\n")
    with pytest.raises(ConfigError, match=r"embed\.dtype"):
        parse(main, [*EMBED, "--config", str(tmp_path / "c.toml")])


def test_the_same_work_has_the_same_id(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[embed]\ndtype = 'float16'\nworkers = 3\n")
    same = [
        [*EMBED, "--set", "dtype=float16"],
        [*EMBED, "--set", "workers=7", "--set", "dtype=float16"],  # how fast, not what
        ["embed", "--out", "s3://b/vectors", "s3://b/images", "--encoder=s3://b/encoder", "--config", str(config)],
        [*EMBED, f"--config={config}", "--force"],
    ]
    ids = {parse(main, line).submission_id for line in same}
    assert len(ids) == 1
    others = [EMBED, [*EMBED[:-1], "s3://b/other"], [*EMBED, "--set", "dtype=float16", "--set", "precision=bfloat16"]]
    assert len(ids | {parse(main, line).submission_id for line in others}) == 4
    work = parse(main, same[2])
    assert work.arguments[-1] == "config.toml"
    assert work.config == config
    assert parse(main, same[3]).arguments[-2:] == ("--config=config.toml", "--force")


# ------------------------------------------------------------------------------------------------ the package


def test_only_what_is_needed_is_packed(tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("[embed]\ndtype = 'float16'\n")
    folder = tmp_path / "package"
    folder.mkdir()
    size = pack(folder, parse(main, [*EMBED, "--config", str(config)]), {"AWS_ACCESS_KEY_ID": "key"})
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"iir_dist/__init__.py", "iir_dist/report/templates/base.html.j2", "iir_dist/report/published.csv"} <= names
    assert {"jobs/embed.py", "jobs/configs/ap_gem_resnet50.toml", "config.toml", "constraints.txt"} <= names
    assert {name.split("/")[0] for name in names} == {
        "iir_dist", "jobs", "config.toml", "constraints.txt", credentials.FILE,
    }  # fmt: skip
    assert not any("__pycache__" in name or "/." in name or name.endswith(".pyc") for name in names)
    assert size < 4e6
    assert stat.S_IMODE((folder / credentials.FILE).stat().st_mode) == 0o600


def test_a_package_that_grew_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("iir_dist", "jobs"):
        (root / name).mkdir(parents=True)
    (root / "constraints.txt").touch()
    (root / "jobs" / "embed.py").touch()
    with open(root / "iir_dist" / "weights.bin", "wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(InputError, match=r"20\.0 MB, at most 20 MB .*iir_dist/weights\.bin \(20\.0 MB\)"):
        pack(tmp_path / "package", parse(main, EMBED), {}, root)
    (root / "jobs" / "embed.py").unlink()
    with pytest.raises(InputError, match="submit from a checkout"):
        pack(tmp_path / "package", parse(main, EMBED), {}, root)


def test_commands_that_are_no_jobs_say_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"iir verify does not run as a job; .*embed"):
        pack(tmp_path, parse(main, ["verify", "s3://b/x"]), {})


def test_pip_gets_pins() -> None:
    packages = pinned((ROOT / "constraints.txt").read_text())
    assert all("==" in package for package in packages)
    names = {package.split("==")[0] for package in packages}
    assert {"torch", "pyarrow", "boto3"} <= names
    assert not names & {"ray", "pytest", "efficientnet-lite-pytorch"}  # the cluster's own; extras
    with pytest.raises(InputError, match="does not pin"):
        pinned("torch==2.14.1\n")


# ------------------------------------------------------------------------------------------------ credentials


def test_variables_go_by_a_file_and_not_by_ray(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    monkeypatch.setenv("AWS_PROFILE", "profile-of-this-machine")
    monkeypatch.setenv("IIR_STORAGE_PATIENCE_SEC", "7")
    result = submit(server, *EMBED)
    assert result.exit_code == 0, result.output
    assert "AWS_SECRET_ACCESS_KEY" in result.output
    (job,) = server.jobs.values()
    for text in (result.output, json.dumps(job)):
        assert "secret-of-a-test" not in text
        assert "key-of-a-test" not in text
    assert "env_vars" not in job["runtime_env"]
    (package,) = server.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        passed = json.loads(archive.read(credentials.FILE))
    assert passed["AWS_SECRET_ACCESS_KEY"] == "secret-of-a-test"
    assert passed["IIR_STORAGE_PATIENCE_SEC"] == "7"
    assert not passed.keys() & credentials.OF_THIS_MACHINE


def test_a_job_takes_them_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of the node")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the node")
    credentials.adopt()  # no file: nothing happens
    assert os.environ["AWS_ACCESS_KEY_ID"] == "of the node"
    credentials.write(tmp_path, {"AWS_ACCESS_KEY_ID": "of the job"})
    credentials.adopt()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "of the job"
    assert "AWS_SESSION_TOKEN" not in os.environ  # it belonged to the other key


def test_what_the_driver_gives_its_workers_goes_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    credentials.write(tmp_path, {"AWS_ENDPOINT_URL": "http://localhost:8333", "AWS_DEFAULT_REGION": "here"})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:8333")  # --set storage.endpoint=
    monkeypatch.setenv("AWS_DEFAULT_REGION", "of the node")
    monkeypatch.setenv(credentials.KEPT, "AWS_ENDPOINT_URL,IIR_CACHE")
    credentials.adopt()
    assert os.environ["AWS_ENDPOINT_URL"] == "http://store:8333"
    assert os.environ["AWS_DEFAULT_REGION"] == "here"


def test_a_role_of_this_machine_and_other_tokens_stay_here() -> None:
    names = ("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "IIR_SERVE_TOKEN")
    assert credentials.found(dict.fromkeys((*names, "IIR_HANG_SEC", "HOME"), "x")) == {"IIR_HANG_SEC": "x"}


def test_no_credentials_passes_nothing_on(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    assert submit(server, "--no-credentials", *EMBED).exit_code == 0
    (package,) = server.packages.values()
    assert b"secret-of-a-test" not in package
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        passed = json.loads(archive.read(credentials.FILE))
    (name,) = server.jobs
    assert passed == {"IIR_RUN": name}  # of the job's metrics and log lines


def test_a_variable_of_the_job_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"runtime_env": {"env_vars": {"AWS_ENDPOINT_URL": "http://store"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert session._set_by_job() == {"AWS_ENDPOINT_URL"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": None}))
    assert session._set_by_job() == set()


# ------------------------------------------------------------------------------------------------ the job server


def test_the_same_work_twice_joins_and_then_tries_again(server: JobServer) -> None:
    first = submit(server, *EMBED)
    assert "submitted" in first.output
    (name,) = server.jobs
    job = server.jobs[name]
    assert job["entrypoint"] == "python jobs/embed.py s3://b/images --encoder s3://b/encoder --out s3://b/vectors"
    assert job["runtime_env"]["worker_process_setup_hook"] == "iir_dist.credentials.adopt"
    assert f"{name}: is running already, joined" in submit(server, *EMBED).output
    assert list(server.jobs) == [name]
    server.end(name, "FAILED", 1)
    assert f"{name}-2: submitted" in submit(server, *EMBED).output
    assert f"{name}-2: is running already" in submit(server, *EMBED).output
    server.end(f"{name}-2", "SUCCEEDED", 0)
    assert f"{name}-3: submitted" in submit(server, *EMBED).output
    assert list(server.jobs) == [name, f"{name}-2", f"{name}-3"]


def test_two_that_submit_at_once_begin_one_job(server: JobServer) -> None:
    jobs = Jobs(server.url)

    def environment() -> dict[str, Any]:
        submit(server, *EMBED)  # another is faster
        return {}

    work = parse(main, EMBED)
    assert jobs.submit(work.submission_id, "python x.py", environment) == (work.submission_id, False)
    assert len(server.jobs) == 1


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", None, 1)]
)
def test_the_exit_code_is_that_of_the_job(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, status: str, code: int | None, expected: int
) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs

    def tail(self: Jobs, submission_id: str, skip: int) -> Iterator[str]:
        yield "line\n"
        server.end(submission_id, status, code)

    monkeypatch.setattr(Jobs, "_tail", tail)
    result = CliRunner().invoke(main, ["jobs", "logs", "-f", name, "--address", server.url])
    assert result.exit_code == expected
    assert "line\n" in result.output


def test_a_connection_that_breaks_is_made_again(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs
    skips = []

    def tail(self: Jobs, submission_id: str, skip: int) -> Iterator[str]:
        skips.append(skip)
        if len(skips) == 1:
            yield "first\n"
            raise UnreachableError("a head starts again")
        yield "second\n"
        server.end(submission_id, "SUCCEEDED", 0)

    monkeypatch.setattr(Jobs, "_tail", tail)
    monkeypatch.setattr("iir_dist.submit.jobs.time.sleep", lambda _: None)
    written: list[str] = []
    assert Jobs(server.url).follow(name, written.append) == 0
    assert written == ["first\n", "second\n"]
    assert skips == [0, len("first\n")]


def test_a_server_that_stays_away_is_given_up(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs

    def tail(self: Jobs, submission_id: str, skip: int) -> Iterator[str]:
        raise UnreachableError("gone")

    monkeypatch.setattr(Jobs, "_tail", tail)
    monkeypatch.setattr(jobs_module, "PATIENCE_SEC", -1.0)
    with pytest.raises(UnreachableError, match=f"iir jobs logs {name}"):
        Jobs(server.url).follow(name, lambda _: None)


def test_a_log_that_cannot_be_had_does_not_hide_the_exit_code(
    server: JobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs
    server.end(name, "FAILED", 3)

    def tail(self: Jobs, submission_id: str, skip: int) -> Iterator[str]:
        raise UnreachableError("its node is gone")

    monkeypatch.setattr(Jobs, "_tail", tail)
    monkeypatch.setattr(jobs_module, "PATIENCE_SEC", -1.0)
    assert Jobs(server.url).follow(name, lambda _: None) == 3


def test_a_head_that_forgot_says_so(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs

    def tail(self: Jobs, submission_id: str, skip: int) -> Iterator[str]:
        yield "line\n"
        server.jobs.clear()
        raise UnreachableError("404")  # it has no log of such a job

    monkeypatch.setattr(Jobs, "_tail", tail)
    with pytest.raises(IirError, match=f"has forgotten {name}.*submit it again"):
        Jobs(server.url).follow(name, lambda _: None)


@pytest.mark.parametrize(("answer", "stopped"), [("y\n", True), ("n\n", False)])
def test_ctrl_c_asks(server: JobServer, monkeypatch: pytest.MonkeyPatch, answer: str, stopped: bool) -> None:
    def follow(self: Jobs, submission_id: str, write: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Jobs, "follow", follow)
    monkeypatch.setattr("iir_dist.cli.cluster._is_asked", lambda: True)
    result = CliRunner().invoke(main, ["submit", "--address", server.url, *EMBED], input=answer)
    assert result.exit_code == 130
    (job,) = server.jobs.values()
    assert (job["status"] == "STOPPED") == stopped
    assert ("goes on" in result.output) != stopped


def test_ctrl_c_without_anybody_to_ask_leaves_the_job(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(self: Jobs, submission_id: str, write: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Jobs, "follow", follow)
    result = CliRunner().invoke(main, ["submit", "--address", server.url, *EMBED])
    (name,) = server.jobs
    assert result.exit_code == 130
    assert f"iir jobs stop {name}" in result.output
    assert server.jobs[name]["status"] == "RUNNING"


def test_jobs_are_listed_shown_and_stopped(server: JobServer) -> None:
    submit(server, *EMBED)
    (name,) = server.jobs

    def iir(*line: str) -> Result:
        return CliRunner().invoke(main, ["jobs", *line, "--address", server.url])

    assert f"{name}" in iir("list").output
    assert "RUNNING" in iir("list").output
    assert iir("logs", name).output == f"log of {name}\n"
    assert "stopped" in iir("stop", name).output
    assert "had ended before" in iir("stop", name).output
    for command in ("logs", "stop"):
        result = iir(command, "nobody")
        assert result.exit_code == 1
        assert "knows no job 'nobody'" in result.output


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_nobody_answers(server: JobServer) -> None:
    result = CliRunner().invoke(main, ["submit", "--address", "http://127.0.0.1:9", *EMBED])
    assert result.exit_code == 1
    assert "no job server answers at http://127.0.0.1:9" in result.output
    assert "port-forward" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("address", "part"),
    [
        (None, "give --address http://HEAD:8265"),
        ("ray://head:10001", "expected http://HEAD:8265"),
        ("head", "expected"),
    ],
)
def test_addresses_are_checked(address: str | None, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Jobs(address)


def test_the_address_that_is_given_wins(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    assert submit(server, *EMBED).exit_code == 0
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:9"
    monkeypatch.setenv("RAY_ADDRESS", server.url)
    assert "joined" in CliRunner().invoke(main, ["submit", "--detach", *EMBED]).output


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "wants a token and none was sent: set RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_TOKEN": "not-the-token"}, "refuses the token (taken from RAY_AUTH_TOKEN)"),
        ({"RAY_AUTH_TOKEN": "the-token"}, "submitted"),
        ({"RAY_AUTH_TOKEN_PATH": "FILE"}, "submitted"),
    ],
)
def test_tokens(tmp_path: Path, variables: dict[str, str], part: str) -> None:
    """In a process of its own: Ray reads how to authenticate once."""
    (tmp_path / "token").write_text("the-token")
    given = {k: v.replace("FILE", str(tmp_path / "token")) for k, v in variables.items()}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    with JobServer(token="the-token") as server:
        command = [sys.executable, "-m", "iir_dist", "submit", "--address", server.url, "--detach", *EMBED]
        result = subprocess.run(command, env=kept | given | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert part in output
    assert (result.returncode == 0) == (part == "submitted")
    assert "the-token" not in output
    assert "Traceback" not in output


def test_placement_of_threads() -> None:
    """A worker lies on one node, so it can have no more threads than leave room for all."""
    assert session.most_threads(2, [1, 1]) == 1
    assert session.most_threads(2, [1, 1, 1, 1]) == 1  # not 4 // 2
    assert session.most_threads(3, [8, 8]) == 4  # not 16 // 3
    assert session.most_threads(5, [2]) == 1
    assert session.most_threads(1, []) == 1
