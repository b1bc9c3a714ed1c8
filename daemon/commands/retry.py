"""`maskd retry`: put failed tasks back into the queue."""

from __future__ import annotations

from typing import Annotated

import anyio
import typer

from daemon.config import store_config
from daemon.stores import open_client


def retry(
    ids: Annotated[list[str] | None, typer.Argument(help="Tasks to retry; all failed ones of --error when left out.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="Only tasks that ended with this error code.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, newest first.")] = 1000,
) -> None:
    """Put failed tasks back; their attempts start anew, nothing is charged again."""
    if not ids and error is None:
        raise typer.BadParameter("name tasks, or an error code with --error")

    async def go() -> int:
        client = await open_client(store_config())
        try:
            return await client.retry(ids or None, error, limit)
        finally:
            await client.close()

    typer.echo(f"{anyio.run(go)} put back")
