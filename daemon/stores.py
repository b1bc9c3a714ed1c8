"""Which database adapters a configuration asks for: by DATABASE_URL asyncpg and LISTEN, else by SUPABASE_URL RPC and Realtime.

Enters: Config. Leaves: a TaskStore, the wake sources beside it, and the name that this database goes by in the journal.
"""

from __future__ import annotations

import structlog

from daemon.config import Config
from storage.base import TaskStore, WakeSource
from storage.notify import NotifyWake
from storage.postgres import PostgresStore, is_transaction_pooler

log = structlog.get_logger(__name__)


def build_store(config: Config) -> TaskStore:
    """The queue, not open yet."""
    timeout_seconds = config.database_timeout_seconds
    if config.database_url is None:
        from storage.supabase import SupabaseStore  # here: it loads a third of a second of libraries

        return SupabaseStore(*_supabase(config), timeout_seconds=timeout_seconds)
    return PostgresStore(config.database_dsn(), timeout_seconds=timeout_seconds, ca_file=_ca_file(config))


def build_sources(config: Config) -> list[WakeSource]:
    """What tells of work: none behind a pooler in transaction mode, which cannot LISTEN."""
    if config.database_url is None:
        from storage.realtime import RealtimeWake

        return [RealtimeWake(*_supabase(config))]
    if config.supabase_url is not None:
        log.info("store.chosen", by="DATABASE_URL", unused="SUPABASE_URL")
    dsn = config.database_dsn()
    return [] if is_transaction_pooler(dsn) else [NotifyWake(dsn, ca_file=_ca_file(config))]


def address(config: Config) -> str:
    """Where the database is, for the journal, which keeps a hash of host, port and path only."""
    return config.database_dsn() if config.database_url is not None else _supabase(config)[0]


def _supabase(config: Config) -> tuple[str, str]:
    assert config.supabase_url is not None and config.supabase_service_key is not None, "load() has asked for one of both"
    return config.supabase_url, config.supabase_service_key.get_secret_value()


def _ca_file(config: Config) -> str | None:
    return None if config.db_ca is None else str(config.db_ca)
