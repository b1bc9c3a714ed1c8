"""Addresses in rows and keys in the bucket. Pure. No address of a row is ever opened as a URL: it must lead to a key of our own.

Accepted: a key, R2_PUBLIC_URL/key, R2_ENDPOINT/bucket/key, s3://bucket/key; written: R2_PUBLIC_URL/key, or the bare key.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from handlers.base import RejectedError

KEY_LENGTH_MAX = 1024
FORBIDDEN = re.compile(r"(^|/)\.\.?(/|$)|[%\\\x00-\x1f\x7f]|^/|//|://")


@dataclass(frozen=True, slots=True)
class Keys:
    """Turns addresses into keys and back. `bases` are the address prefixes that mean our bucket, each ending in a slash."""

    bases: tuple[str, ...] = ()
    public_url: str | None = None

    def key_of(self, address: str, prefixes: Sequence[str]) -> str:
        """The key that `address` means; RejectedError("image_url_forbidden") unless it lies under one of `prefixes`."""
        base = next((base for base in self.bases if address.startswith(base)), None)
        key = address if base is None else _decoded(address[len(base) :].partition("?")[0].partition("#")[0])
        allowed = any(key.startswith(prefix) and len(key) > len(prefix) for prefix in prefixes)
        if not allowed or len(key) > KEY_LENGTH_MAX or FORBIDDEN.search(key):
            wanted = " or ".join(prefixes)
            raise RejectedError(
                "image_url_forbidden", f'The address "{address[:200]}" is not an image of this project; use a key under {wanted}.'
            )
        return key

    def address_of(self, key: str) -> str:
        """What is written into a row for `key`."""
        return key if self.public_url is None else f"{self.public_url.rstrip('/')}/{key}"


def _decoded(path: str) -> str:
    """%XX decoded once; what is not UTF-8 gives the empty key, which is nobody's."""
    try:
        return unquote(path, errors="strict")
    except UnicodeDecodeError:
        return ""


def bases_of(public_url: str | None, endpoint: str | None, bucket: str) -> tuple[str, ...]:
    """Every address prefix that means our bucket."""
    found = [f"s3://{bucket}/"]
    if public_url is not None:
        found.append(public_url.rstrip("/") + "/")
    if endpoint is not None:
        found.append(f"{endpoint.rstrip('/')}/{bucket}/")
    return tuple(found)


def prefixes_of(templates: Sequence[str], user_id: str | None, project_id: str) -> tuple[str, ...]:
    """The prefixes of one owner. A template that names the user gives nothing for a row without one."""
    return tuple(
        template.replace("{user_id}", user_id or "").replace("{project_id}", project_id)
        for template in templates
        if user_id is not None or "{user_id}" not in template
    )
