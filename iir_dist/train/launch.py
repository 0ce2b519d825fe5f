"""The only Ray Train code: start N workers, show their progress, restart them when one dies, bring errors back."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from iir_dist import session
from iir_dist.errors import IirError, TrainingError
from iir_dist.progress import Progress

log = logging.getLogger(__name__)

Body = Callable[[dict[str, Any], Callable[[int, str], None]], None]
"""(arguments, on_step) -> None, run on every worker inside a process group."""

MAX_FAILURES = 3


class _Board:
    """An actor where worker 0 writes how far it is, and any worker an error that no retry can mend."""

    def __init__(self) -> None:
        self.step, self.note, self.error = 0, "", None

    def put(self, step: int, note: str) -> None:
        self.step, self.note = step, note

    def fail(self, error: Exception) -> None:
        self.error = self.error or error  # type: ignore[assignment]

    def get(self) -> tuple[int, str, Exception | None]:
        return self.step, self.note, self.error


Workers = int | tuple[int, int] | None
"""Number of workers; (fewest, most): as many as there is room for, and another number when that changes; None: all GPUs,
else one."""


def launch(body: Body, arguments: dict[str, Any], *, what: str, steps: int, workers: Workers, done: int = 0) -> None:
    """Run `body` on workers and return when it is done.

    A worker that dies is replaced, together with the others, up to three times, and any number of times where its
    machine was taken away (preemption); the loop continues from its checkpoint. An `IirError` (a loss that is not
    finite, say) is raised here at once.

    Args:
        steps, done: for the progress that is shown: of the training, and of an earlier run.
    """
    ray = session.connect()
    from ray import train as ray_train
    from ray.train.torch import TorchConfig, TorchTrainer

    gpus = session.cluster_gpus()
    cpus = session.cluster_cpus()
    fewest, most = workers if isinstance(workers, tuple) else (workers or gpus or 1,) * 2
    if fewest > (gpus or cpus):
        raise IirError(
            f"{what}.workers = {fewest}, but the cluster has {cpus} CPUs and {gpus} GPUs; ask for at most {gpus or cpus}"
        )
    threads = session.threads_of(min(most, cpus))  # of a worker without a GPU
    # On another node it would be lost with that node, and the training with it.
    board = ray.remote(num_cpus=0, scheduling_strategy=session.here())(_Board).remote()

    def worker(config: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(threads if not gpus else 1)
        context = ray_train.get_context()

        def on_step(step: int, note: str) -> None:
            if context.get_world_rank() == 0:
                board.put.remote(step, note)

        if ray.get(board.get.remote())[2] is not None:
            return  # started again after an error that would come again
        try:
            body(config, on_step)
        except IirError as error:
            ray.get(board.fail.remote(error))
            raise  # so that the others, who wait for this worker, are ended too

    # State of Ray Train's own; checkpoints are ours and go to the output folder.
    with tempfile.TemporaryDirectory(prefix="iir-train-") as scratch:
        trainer = TorchTrainer(
            worker,
            train_loop_config=arguments,
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=_hang_sec()),
            scaling_config=ray_train.ScalingConfig(
                num_workers=fewest if fewest == most else (fewest, most),
                use_gpu=gpus > 0,
                resources_per_worker=({"GPU": 1} if gpus else {"CPU": threads}) | session.accelerator(),
            ),
            run_config=ray_train.RunConfig(
                name=what,
                storage_path=scratch,
                failure_config=ray_train.FailureConfig(max_failures=MAX_FAILURES),
                logging_config=ray_train.LoggingConfig(log_level="ERROR"),
            ),
        )
        _fit(trainer, board, what, steps, done, ray)


def _fit(trainer: Any, board: Any, what: str, steps: int, done: int, ray: Any) -> None:
    failure: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # carried to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=fit, name="iir-fit", daemon=True)
    seen = done
    with Progress(what, steps, "steps", done) as progress:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.5)
            step, note, error = ray.get(board.get.remote())
            progress.advance(max(0, step - seen), note)
            seen = max(seen, step)
            if error is not None:
                thread.join()
                raise error
        if failure:
            raise TrainingError(f"{what} failed {MAX_FAILURES + 1} times, last: {_last_line(failure[0])}") from failure[
                0
            ]


def _hang_sec() -> int:
    """`IIR_HANG_SEC`: so long the workers wait for one that neither answers nor dies; then all are started again."""
    text = os.environ.get("IIR_HANG_SEC", "1800")
    if not text.isdigit() or int(text) == 0:
        raise IirError(f"IIR_HANG_SEC = {text!r}; expected whole seconds, for example 1800")
    return int(text)


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
