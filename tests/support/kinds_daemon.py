"""`maskd run` with kinds made for tests beside the real ones: the production `build()`, only handlers are added.

MASKD_TEST_KINDS names the kinds to serve (all when it is empty). Start it with `launch(…, program=PROGRAM)`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio

from daemon.commands.run import serve, set_up_log
from daemon.config import load
from daemon.main import build
from handlers.base import Handler, Inputs, Job, Limits, Request, Result, ResultBlob, progress_of
from handlers.registry import discover
from models.base import DeviceLostError, Models, Role, Stop, StoppedError

KINDS_VARIABLE = "MASKD_TEST_KINDS"
PROGRAM = ("-m", "tests.support.kinds_daemon")


@dataclass(frozen=True, slots=True)
class Noop:
    """Does nothing; with `blob` in its params it leaves a file behind."""

    BATCH_MAX: int = 250
    with_image: bool = False
    ROLES: frozenset[Role] = frozenset()
    TIMEOUT_FACTOR: float = 1.0

    def parse(self, request: Request, limits: Limits) -> Mapping[str, Any]:
        return request.params

    def inputs(self, params: Mapping[str, Any]) -> Inputs:
        return Inputs(source=self.with_image)

    def prepare(self, job: Job, models: Models) -> Job:
        return job

    def run(self, prepared: Sequence[Job], models: Models, stop: Stop) -> Sequence[Any]:
        return [self.work(job, stop) for job in prepared]

    def work(self, job: Job, stop: Stop) -> str:
        return job.task_id

    def finish(self, job: Job, raw: str) -> Result:
        if not job.params.get("blob"):
            return Result()
        blobs = [ResultBlob("masks_url", f"{number}.json", "application/json", raw.encode()) for number in range(2)]
        return Result((ResultBlob("mask_image_url", "mask.png", "image/png", raw.encode()), *blobs[1:]))


class Kill(Noop):
    """Ends its own process, as a crash in native code would, when its params say `kill`."""

    def work(self, job: Job, stop: Stop) -> str:
        if job.params.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        return job.task_id


class Lose(Noop):
    """Loses its device, as a poisoned CUDA context does, when its params say `lose`."""

    def work(self, job: Job, stop: Stop) -> str:
        if job.params.get("lose"):
            raise DeviceLostError("CUDA error: an illegal memory access was encountered")
        return job.task_id


class Hold(Noop):
    """Says in `folder` that it began and waits for the file `go` there; with `deaf` it never asks whether to stop, with
    `share` it tells that so much is done."""

    def run(self, prepared: Sequence[Job], models: Models, stop: Stop) -> Sequence[Any]:
        for job in prepared:
            (Path(job.params["folder"]) / f"begun-{job.task_id}").touch()
        return super().run(prepared, models, stop)

    def work(self, job: Job, stop: Stop) -> str:
        folder = Path(job.params["folder"])
        if "share" in job.params:
            progress_of(stop)(job.params["share"])
        while not (folder / "go").exists():
            try:
                if not job.params.get("deaf"):
                    stop()
            except StoppedError:
                (folder / f"stopped-{job.task_id}").touch()
                raise
            threading.Event().wait(0.01)
        return job.task_id


KINDS: Mapping[str, Handler] = {
    "noop": Noop(),
    "kill": Kill(BATCH_MAX=8, with_image=True),
    "lose": Lose(BATCH_MAX=8),
    "hold": Hold(BATCH_MAX=4),
    "hold_alone": Hold(BATCH_MAX=1),
    "hold_many": Hold(BATCH_MAX=250),
}


def main() -> None:
    """Run until SIGTERM, as `maskd run` does."""
    config = load()
    set_up_log(config)
    kinds: dict[str, Handler] = {**discover(), **KINDS}
    wanted = os.environ.get(KINDS_VARIABLE, "").split() or list(kinds)
    os._exit(anyio.run(serve, build(config, {kind: kinds[kind] for kind in wanted})))


if __name__ == "__main__":
    main()
