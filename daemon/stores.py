"""Which database adapters a configuration asks for: by DATABASE_URL asyncpg and LISTEN, else by SUPABASE_URL RPC and Realtime.

Enters: Config. Leaves: a TaskStore whose calls are timed, the wake sources beside it, the client that inserts, and the name that
this database goes by in the journal.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import structlog

from daemon import metrics
from daemon.config import Config
from storage.base import TaskStore, WakeSource
from storage.client import Client, TaskClient
from storage.notify import NotifyWake
from storage.postgres import PostgresStore, translate
from storage.way import LISTEN_HINT, Seen, Way, is_transaction_pooler, look, tls

log = structlog.get_logger(__name__)


def build_store(config: Config) -> TaskStore:
    """The queue, not open yet."""
    timeout_seconds = config.database_timeout_seconds
    if config.database_url is None:
        from storage.supabase import SupabaseStore  # here: it loads a third of a second of libraries

        return timed(SupabaseStore(*_supabase(config), timeout_seconds=timeout_seconds))
    return timed(PostgresStore(config.database_dsn(), timeout_seconds=timeout_seconds, way=way_of(config)))


def timed(store: TaskStore) -> TaskStore:
    """The same store, each of its calls timed from now on."""
    for call in metrics.CALLS:
        setattr(store, call, _timed(call, getattr(store, call)))
    return store


def _timed(call: str, ask: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    seconds, failures = metrics.DATABASE.labels(call), metrics.DATABASE_FAILED.labels(call)

    async def asked(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return await ask(*args)
        except Exception:
            failures.inc()
            raise
        finally:
            seconds.observe(time.perf_counter() - began)

    return asked


def build_sources(config: Config) -> list[WakeSource]:
    """What tells of work: none behind a pooler in transaction mode, which cannot LISTEN."""
    if config.database_url is None:
        from storage.realtime import RealtimeWake

        return [RealtimeWake(*_supabase(config))]
    if config.supabase_url is not None:
        log.info("store.chosen", by="DATABASE_URL", unused="SUPABASE_URL")
    dsn, way = config.database_dsn(), way_of(config)
    if is_transaction_pooler(dsn, way):
        reason = f"a pooler in transaction mode cannot LISTEN: rows are found every {config.poll_unproven_seconds:g} s"
        log.warning("wake.poll_only", reason=reason, instead=LISTEN_HINT.partition(", or ")[2])
        return []
    return [NotifyWake(dsn, way=way)]


def way_of(config: Config) -> Way:
    """How to reach DATABASE_URL. Raises ConfigurationError when MASKD_DB_CA is no certificate."""
    return Way(None if config.db_ca is None else tls(str(config.db_ca.expanduser())), config.db_pooler)


async def look_at_way(config: Config) -> Seen:
    """What the way to the database is like. Raises UnavailableError, ConfigurationError."""
    if config.database_url is None:
        url = urlsplit(_supabase(config)[0])
        https = url.scheme == "https"
        return Seen(False, url.hostname in ("127.0.0.1", "localhost", "::1"), "HTTPS" if https else None, https, 0.0)
    try:
        return await look(config.database_dsn(), way_of(config), config.database_timeout_seconds)
    except Exception as error:
        raise translate(error) from error


async def open_client(config: Config) -> Client:
    """The inserting side of the same queue, connected."""
    if config.database_url is None:
        from storage.client_rpc import RpcClient

        return await RpcClient.connect(*_supabase(config), config.database_timeout_seconds)
    return await TaskClient.connect(config.database_dsn(), config.database_timeout_seconds, way=way_of(config))


def address(config: Config) -> str:
    """Where the database is, for the journal, which keeps a hash of host, port, path and a pooler's tenant only."""
    return config.database_dsn() if config.database_url is not None else _supabase(config)[0]


def place_of(url: str) -> str:
    """Host, port and name of a database, to be shown: neither user nor password."""
    parts = urlsplit(url)
    query = parse_qs(parts.query)
    host = parts.hostname or query.get("host", [""])[0]
    port = parts.port or query.get("port", ["5432"])[0]
    return f"{f'[{host}]' if ':' in host else host}:{port}/{parts.path.removeprefix('/') or 'postgres'}"


def _supabase(config: Config) -> tuple[str, str]:
    assert config.supabase_url is not None and config.supabase_service_key is not None, "load() has asked for one of both"
    return config.supabase_url, config.supabase_service_key.get_secret_value()
