"""Replicas of the app on Ray Serve, as many as the load asks for."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from iir_dist import session
from iir_dist.config import build
from iir_dist.errors import ConfigError, IirError
from iir_dist.serve.config import ServeConfig
from iir_dist.serve.limits import check_token

NAME = "iir"
STARTING_SEC = 300
PATIENT = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30"}
"""On a busy machine Ray would give up its proxy before it has started, again and again."""
EVERY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
""""All addresses" to listen at, and one to ask at."""


def run(
    index: str,
    config: ServeConfig,
    images: Sequence[str],
    encoder: str | None,
    token: str | None,
    host: str,
    port: int,
) -> None:
    """Start the replicas and return when they answer; Ray's proxy listens at host:port.

    Each replica opens the index itself, from the disk or the store that all nodes see, and follows new versions of it. One
    that dies is replaced; what it was answering fails.

    Raises:
        IirError: the replicas do not start.
    """
    for key, value in PATIENT.items():
        os.environ.setdefault(key, value)
    ray = session.connect()
    from ray import serve

    try:
        with contextlib.suppress(TimeoutError):  # it goes on to start; what counts is whether it answers
            serve.start(http_options={"host": host, "port": port})
        serve.run(_bound(index, config, images, encoder, token), name=NAME, route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        why = [line for line in str(error).splitlines() if line.startswith("iir_dist.errors.")]
        raise IirError(why[-1].partition(": ")[2] if why else f"the replicas did not start: {error}") from error
    _wait(host, port)


def application(args: Mapping[str, Any]) -> Any:
    """For Serve's own configs (KubeRay's RayService): the application that `import_path` names.

    Args:
        args: `index`; `encoder` and `images` (a list) where wanted; other keys are those of `[serve]`. The token is that of
            IIR_SERVE_TOKEN; it has to be there, because the proxy listens for others, and a Host can be made up.

    Raises:
        ConfigError: a key or the token is wrong.
    """
    given = dict(args)
    if not given.get("index"):
        raise ConfigError("args of the application have no index; expected the folder or s3:// address of one")
    index, images, encoder = given.pop("index"), given.pop("images", ()), given.pop("encoder", None)
    config = build(ServeConfig, given, "serve")
    return _bound(index, config, images, encoder, check_token(os.environ.get("IIR_SERVE_TOKEN", "")))


def _bound(index: str, config: ServeConfig, images: Sequence[str], encoder: str | None, token: str | None) -> Any:
    from ray import serve

    def replica() -> Any:
        from iir_dist.serve import app
        from iir_dist.serve.service import Service

        one = config if config.threads else config.model_copy(update={"threads": 1})
        return app.build(Service(index, one, images, encoder), token)

    low, high = (config.replicas,) * 2 if isinstance(config.replicas, int) else config.replicas
    return serve.deployment(
        serve.ingress(replica)(),
        name=NAME,
        ray_actor_options={"num_cpus": 0},  # as much as it has threads; a stage that runs beside must not stop it
        max_ongoing_requests=2 * config.concurrent,
        autoscaling_config={
            "min_replicas": low, "max_replicas": high, "target_ongoing_requests": max(1, config.concurrent // 8)
        },
        graceful_shutdown_timeout_s=config.timeout_sec,
    ).bind()  # fmt: skip


def _wait(host: str, port: int) -> None:
    """Until the proxy answers."""
    deadline = time.monotonic() + STARTING_SEC
    while True:
        connection = http.client.HTTPConnection(EVERY.get(host, host), port, timeout=10)
        try:
            connection.request("GET", "/readyz", headers={"Host": "localhost"})
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        if time.monotonic() > deadline:
            raise IirError(
                f"{host}:{port} does not answer {STARTING_SEC} s after the start; see Ray's logs, or use --local"
            )
        time.sleep(0.2)


def stop() -> None:
    """End the replicas, and the proxy where it has no other application to serve."""
    from ray import serve

    serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()
