"""The site of a test of the whole: a fresh database, blobs in a folder, daemons as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.database import Database
from support.site import Site, site_on


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Site]:
    """A site on a database of the shared server."""
    with site_on(database, tmp_path) as made:
        yield made


@pytest.fixture
def private_site(private_database: Database, tmp_path: Path) -> Iterator[Site]:
    """A site on a server that the test may restart."""
    with site_on(private_database, tmp_path) as made:
        yield made
