"""Fixtures of all tests: the event loop's backend and the databases."""

from __future__ import annotations

import pytest
from support.database import database, database_template, empty_database, module_database, postgres_server, private_database

__all__ = ["database", "database_template", "empty_database", "module_database", "postgres_server", "private_database"]


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """asyncio only: asyncpg, aiohttp and realtime know no other loop."""
    return "asyncio"
