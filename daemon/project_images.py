"""Images of projects, for sessions: an address that a client names to the bytes of a blob of that project's owner.

Enters: a project and an address. Leaves: bytes, or a RejectedError. Bounded in bytes, downloads and seconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio
import anyio.to_thread

from daemon.keys import Keys, prefixes_of
from handlers.base import RejectedError
from storage.base import BlobStore, MissingBlobError, TaskStore, UnavailableError


class ProjectImages:
    """Reads blobs under the prefixes of a project's owner, and no others."""

    def __init__(
        self, store: TaskStore, blobs: BlobStore, keys: Keys, templates: Sequence[str], io_threads: int, timeout_seconds: float
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._keys = keys
        self._templates = templates
        self._timeout = timeout_seconds
        self._io = anyio.CapacityLimiter(io_threads)

    async def bring(self, project_id: str, address: str, bytes_max: int) -> bytes:
        """The blob's bytes. Raises RejectedError (image_missing, image_url_forbidden), InvalidImageError, UnavailableError."""
        user_id = await self._store.owner_of(project_id)
        if user_id is None:
            raise RejectedError("image_missing", "There is no such project.")
        key = self._keys.key_of(address, prefixes_of(self._templates, user_id, project_id))
        try:
            with anyio.fail_after(self._timeout):
                data: bytes = await anyio.to_thread.run_sync(
                    self._blobs.get, key, bytes_max, limiter=self._io, abandon_on_cancel=True
                )
        except MissingBlobError:
            raise RejectedError("image_missing", "There is no image under that key.") from None
        except TimeoutError:
            raise UnavailableError("the blob store did not answer in time") from None
        return data
