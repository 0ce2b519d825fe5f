"""The job server of a cluster: submit once, follow to the end, stop; what goes wrong on the way is explained."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from iir_dist.errors import ConfigError, IirError, InputError, UnreachableError

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
PATIENCE_SEC = 120.0
"""A job server that does not answer while a job is followed is waited for so long; a head may be starting again."""
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


class Jobs:
    """The jobs of one cluster.

    Args:
        address: `http://head:8265`; else RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raises:
        ConfigError: no address, or it is not one of a job server.
        UnreachableError: nobody answers there.
        IirError: the cluster wants another token.
    """

    def __init__(self, address: str | None) -> None:
        self.address = _address(address)
        _choose_authentication()
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # Ray prefers its variables to what it is told.
        hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
        try:
            with _explained(self.address):
                self._client: Any = JobSubmissionClient(self.address)
        finally:
            os.environ.update(hidden)

    def list(self) -> list[Any]:
        """All jobs that were submitted, newest first, as Ray's `JobDetails`."""
        with _explained(self.address):
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: -(job.start_time or 0))

    def get(self, submission_id: str) -> Any:
        """One job. Raises `InputError` where there is none of that id."""
        for job in self.list():
            if job.submission_id == submission_id:
                return job
        raise InputError(f"{self.address} knows no job {submission_id!r}; `iir jobs list` shows those it knows")

    def submit(
        self, submission_id: str, entrypoint: str, environment: Callable[[], dict[str, Any]]
    ) -> tuple[str, bool]:
        """Run a command once: join the attempt that is under way, else begin the next one.

        Args:
            environment: makes the runtime environment; called only where a job is begun.

        Returns:
            The id of the attempt, and whether it was begun here.
        """
        while True:
            name = running = None
            taken = {job.submission_id: str(job.status.value) for job in self.list()}
            attempt = 1
            while name is None and running is None:
                candidate = submission_id if attempt == 1 else f"{submission_id}-{attempt}"
                if candidate not in taken:
                    name = candidate
                elif taken[candidate] not in ENDED:
                    running = candidate
                attempt += 1
            if running is not None:
                return running, False
            assert name is not None
            try:
                with _explained(self.address):
                    self._client.submit_job(entrypoint=entrypoint, submission_id=name, runtime_env=environment())
                return name, True
            except IirError as error:
                if "already exists" not in str(error):
                    raise  # else another submitted the same meanwhile: look again

    def follow(self, submission_id: str, write: Callable[[str], object]) -> int:
        """Pass on what a job prints until it ends; its exit code, 1 where it was stopped or never started."""
        seen, patience = 0, time.monotonic() + PATIENCE_SEC
        while True:
            whole, job = False, None
            with contextlib.suppress(UnreachableError):  # a head that starts again, a proxy that closes old connections
                for text in self._tail(submission_id, seen):
                    write(text)
                    seen += len(text)
                    patience = time.monotonic() + PATIENCE_SEC
                whole = True
            with contextlib.suppress(UnreachableError):  # a server that has forgotten the job refuses its log as well
                job = self._still_known(submission_id)
                patience = time.monotonic() + PATIENCE_SEC if whole else patience
            late = time.monotonic() > patience
            if job is not None and job.status.value in ENDED and (whole or late):
                break
            if late:
                raise UnreachableError(
                    f"{self.address} does not answer any more; the job may go on: iir jobs logs {submission_id}"
                )
            time.sleep(1)
        if job.status.value == "SUCCEEDED":
            return 0
        if job.status.value == "FAILED" and not seen:
            write(f"{job.message}\n")  # it has no log, as its environment could not be made
        return int(job.driver_exit_code or 0) or 1

    def _still_known(self, submission_id: str) -> Any:
        try:
            return self.get(submission_id)
        except InputError as error:
            raise IirError(
                f"{self.address} has forgotten {submission_id}: its head was started anew, and the job ended with the old one; "
                "submit it again, it continues from what is finished"
            ) from error

    def stop(self, submission_id: str, wait_sec: float = 30.0) -> bool:
        """Stop a job and wait until it has ended; false where it had before."""
        self.get(submission_id)
        with _explained(self.address):
            running = bool(self._client.stop_job(submission_id))
        deadline = time.monotonic() + wait_sec
        while running and self.get(submission_id).status.value not in ENDED and time.monotonic() < deadline:
            time.sleep(0.5)
        return running

    def logs(self, submission_id: str) -> str:
        """What a job has printed so far."""
        self.get(submission_id)
        with _explained(self.address):
            return str(self._client.get_job_logs(submission_id))

    def _tail(self, submission_id: str, skip: int) -> Iterator[str]:
        """What a job prints, from character `skip` on; the server begins each connection with the whole log."""
        loop = asyncio.new_event_loop()
        try:
            with _explained(self.address):
                lines = self._client.tail_job_logs(submission_id)
                while True:
                    try:
                        text = loop.run_until_complete(anext(lines))
                    except StopAsyncIteration:
                        return
                    passed = min(skip, len(text))
                    skip -= passed
                    if text[passed:]:
                        yield text[passed:]
        finally:
            with contextlib.suppress(Exception):
                loop.run_until_complete(lines.aclose())
            loop.close()


def _address(address: str | None) -> str:
    chosen = address or next((os.environ[name] for name in _ADDRESS_VARIABLES if os.environ.get(name)), None)
    if not chosen:
        raise ConfigError(
            "no cluster is named; give --address http://HEAD:8265 or set RAY_ADDRESS (Kubernetes: "
            "kubectl port-forward service/CLUSTER-head-svc 8265)"
        )
    if not chosen.startswith(("http://", "https://")):
        raise ConfigError(f"{chosen!r} is not the address of a job server; expected http://HEAD:8265")
    return chosen.rstrip("/")


def _choose_authentication() -> None:
    """Ray sends a token only where RAY_AUTH_MODE asks for it; one that was given is meant to be sent."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Errors of Ray's client as ours, with a remedy."""
    import aiohttp
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (AuthenticationError, aiohttp.WSServerHandshakeError) as error:
        if isinstance(error, aiohttp.WSServerHandshakeError) and error.status not in (401, 403):
            raise UnreachableError(f"{address} closed the connection ({error.status})") from error
        raise IirError(_token_advice(address, getattr(error, "message", ""))) from None
    except (ConnectionError, requests.ConnectionError, requests.Timeout, aiohttp.ClientError) as error:
        raise UnreachableError(
            f"no job server answers at {address} ({type(error).__name__}); is the cluster up, the port that of the dashboard "
            "(8265), and reachable from here (`ray dashboard` or `kubectl port-forward` make a tunnel)?"
        ) from error
    except (RuntimeError, requests.RequestException) as error:
        text = str(error)
        if "WebSocket" in text or ("status code 5" in text and "already exists" not in text):
            raise UnreachableError(f"{address}: {text.splitlines()[0][:300]}") from error
        if "status code 401" in text or "status code 403" in text or "Unauthorized" in text:
            raise IirError(_token_advice(address, text)) from None
        first = next((line for line in text.splitlines() if line.strip()), type(error).__name__)
        if "already exists" in text:
            first = "a job of this id already exists"
        raise IirError(f"{address} refused: {first[:300]}") from error


def _token_advice(address: str, said: str) -> str:
    """What to do about a token, by what was sent; the token itself is never shown."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return (
            f"{address} wants a token and none was sent: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
            "where the token is not in ~/.ray/auth_token (on the head `ray get-auth-token` shows it)"
        )
    place = next(
        (name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token"
    )
    reason = "refuses the token" if "nvalid" in said else "found no token that it accepts"
    return (
        f"{address} {reason} (taken from {place}); it has to be that of the cluster: `ray get-auth-token` on the head"
    )


def package_note(size: int, folder: Path, names: list[str]) -> str:
    """One line about what is submitted; values of variables are not shown."""
    passed = (
        f"; variables passed on: {', '.join(names)}" if names else "; no variables of the object store are set here"
    )
    return f"package: {sum(1 for p in folder.rglob('*') if p.is_file())} files, {size / 2**20:.2f} MB{passed}"
