"""What this worker is doing, in one line, for `systemctl status`.

Enters: a pipeline. Leaves: STATUS= to the service manager whenever the line has changed. Silent without one.
"""

from __future__ import annotations

import anyio

from daemon import systemd
from daemon.pipeline import Pipeline

TELL_EVERY_SECONDS = 2.0


def line(pipeline: Pipeline) -> str:
    """How work is learned of or why none is taken, what is held and run, and what hangs."""
    parts = pipeline.parts
    held = len(parts.held)
    running = sum(work.begun for work in parts.held)
    tasks = f"{held} task{'' if held == 1 else 's'} held, {running} running" if held else "no task held"
    if pipeline.draining:
        return f"stopping; {tasks}"
    away = sorted(parts.gate.failing)
    doing = f"no claims while failing: {', '.join(away)}" if away else f"claiming, by {parts.wake.mode}"
    hung = "".join(f"; pool {name}: {pool.lost} hung" for name, pool in sorted(parts.pools.items()) if pool.lost)
    return f"{doing}; {tasks}{hung}"


async def tell(pipeline: Pipeline) -> None:
    """Tell the service manager for ever."""
    told = ""
    while True:
        if (now := line(pipeline)) != told:
            told = now
            systemd.notify(f"STATUS={now}")
        await anyio.sleep(TELL_EVERY_SECONDS)
