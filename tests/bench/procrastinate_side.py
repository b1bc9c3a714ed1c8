"""procrastinate beside them: fewer jobs, since it takes them one by one; its rate is what counts."""

from __future__ import annotations

import procrastinate

JOBS = 2_000
CONCURRENCY = 30
NAME = f"procrastinate, concurrency {CONCURRENCY}, {JOBS:,} jobs"

INTERVAL = """select
    extract(epoch from max(at) filter (where type = 'succeeded') - min(at) filter (where type = 'started'))::float8 as seconds,
    count(*) filter (where type = 'succeeded') as done from procrastinate_events"""


def application(dsn: str) -> procrastinate.App:
    """An application with one task that does nothing."""
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn, min_size=10, max_size=10))

    @app.task(name="noop")
    async def noop() -> None:
        return None

    return app


async def install(dsn: str) -> None:
    """Its tables, in a database of its own."""
    async with application(dsn).open_async() as app:
        await app.schema_manager.apply_schema_async()


async def rate(dsn: str) -> float:
    """Jobs a second, from the first start to the last success by its own events."""
    async with application(dsn).open_async() as app:
        await app.connector.execute_query_async("truncate procrastinate_jobs, procrastinate_events cascade")
        await app.configure_task("noop").batch_defer_async(*([{}] * JOBS))
        await app.connector.execute_query_async("analyze procrastinate_jobs")
        await app.run_worker_async(concurrency=CONCURRENCY, wait=False, install_signal_handlers=False, listen_notify=False)
        found = await app.connector.execute_query_one_async(INTERVAL)
    assert found["done"] == JOBS, f"{found['done']} of {JOBS} jobs succeeded"
    return JOBS / float(found["seconds"])
