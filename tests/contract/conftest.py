"""The queue over each implementation of TaskStore."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from support.database import Database
from support.stores import Queue


@pytest.fixture
async def queue(database: Database) -> AsyncIterator[Queue]:
    opened = await Queue.open(database)
    yield opened
    await opened.close()
