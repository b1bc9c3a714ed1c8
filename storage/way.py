"""How a Postgres is reached: TLS, and what a pooler in between cannot do. Every connection of maskd is made here.

Enters: a DSN and a `Way`. Leaves: connections of asyncpg, and what one sees of the way. Never logs a DSN.
"""

from __future__ import annotations

import ipaddress
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg

from storage.base import ConfigurationError

TRANSACTION_POOLER_PORT = 6543
LISTEN_HINT = "set MASKD_DB_POOLER=transaction, or take the session pooler or a direct connection (Supabase: port 5432)"


@dataclass(frozen=True, slots=True)
class Way:
    """What the DSN does not say: a context that verifies the server in full (None leaves TLS to the DSN), and which pooler is
    in between: `auto` goes by the port, `transaction`, `none`."""

    tls: ssl.SSLContext | None = None
    pooler: str = "auto"


BY_DSN = Way()
"""As the DSN says, and by its port."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a connection sees of its way. `tls` is the protocol's version, None in clear; `local` never leaves this host."""

    pooled: bool
    local: bool
    tls: str | None
    verified: bool
    round_trip_seconds: float


def tls(ca_file: str) -> ssl.SSLContext:
    """A context that verifies chain and host name against `ca_file` alone. Raises ConfigurationError."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigurationError("MASKD_DB_CA: the file holds no certificate in PEM (-----BEGIN CERTIFICATE-----)") from error
    except OSError as error:
        raise ConfigurationError(f"MASKD_DB_CA: the file cannot be read: {error.strerror}") from error


def is_transaction_pooler(dsn: str, way: Way) -> bool:
    """Whether the DSN leads to a pooler in transaction mode: no LISTEN, no prepared statements, nothing that a session keeps."""
    if way.pooler != "auto":
        return way.pooler == "transaction"
    parts = urlsplit(dsn)
    return TRANSACTION_POOLER_PORT in (parts.port, *map(int, parse_qs(parts.query).get("port", ())))


async def connect(
    dsn: str,
    way: Way,
    name: str,
    timeout_seconds: float,
    *,
    command_seconds: float | None = None,
    prepares: bool = False,
) -> asyncpg.Connection:
    """A connection that calls itself `name`. `prepares` keeps statements prepared, where no pooler forbids it; without, asyncpg
    sends each with its parameters in one go, which any pooler keeps on one server."""
    options: dict[str, Any] = {} if way.tls is None else {"ssl": way.tls}
    if not prepares or is_transaction_pooler(dsn, way):
        options["statement_cache_size"] = 0
    return await asyncpg.connect(
        dsn, timeout=timeout_seconds, command_timeout=command_seconds, server_settings={"application_name": name}, **options
    )


async def is_pooled(connection: asyncpg.Connection) -> bool:
    """Whether a pooler is in between: it tells clients a process of its own making, not the server's."""
    return bool(await connection.fetchval("select pg_backend_pid()") != connection.get_server_pid())


async def look(dsn: str, way: Way, timeout_seconds: float) -> Seen:
    """Connect, ask, and tell what the way is like. Raises as `connect` does."""
    connection = await connect(dsn, way, "maskd doctor", timeout_seconds, command_seconds=timeout_seconds)
    try:
        pooled = await is_pooled(connection)
        begun = time.monotonic()
        await connection.fetchval("select 1")
        seconds = time.monotonic() - begun
        transport = connection._transport  # type: ignore[attr-defined] # no public name leads to the socket
        wrapped, peer = transport.get_extra_info("ssl_object"), transport.get_extra_info("peername")
        context = None if wrapped is None else wrapped.context
        verified = context is not None and context.verify_mode is ssl.CERT_REQUIRED and bool(context.check_hostname)
        return Seen(pooled, _is_local(peer), None if wrapped is None else wrapped.version(), verified, seconds)
    finally:
        connection.terminate()


def _is_local(peer: Any) -> bool:
    """A unix socket, which has no name, or a loopback address."""
    return not isinstance(peer, tuple) or ipaddress.ip_address(str(peer[0]).partition("%")[0]).is_loopback
