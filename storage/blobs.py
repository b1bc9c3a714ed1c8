"""What every blob store agrees on: which keys it takes, and what it says of a blob that is too large."""

from __future__ import annotations

import re

from storage.base import InvalidImageError

KEY_BYTES_MAX = 1024
"""S3's limit on a key in UTF-8."""

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\\ufffe\uffff]")
"""Characters that XML cannot carry or a file system reads as something else."""


def key_fault(key: str) -> str | None:
    """What is wrong with a key, as one sentence, or None.

    A key is a relative path of 1 to 1024 bytes in UTF-8, without '..' and the like, that means the same to every store.
    """
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "The key is not valid Unicode."
    if not 0 < size <= KEY_BYTES_MAX:
        return f"The key has {size} bytes; 1 to {KEY_BYTES_MAX} are accepted."
    if _FORBIDDEN.search(key):
        return "The key contains a control character or a backslash."
    if any(part in ("", ".", "..") for part in key.split("/")):
        return "The key is absolute, or has an empty, '.' or '..' part."
    return None


def too_large(size: int, bytes_max: int) -> InvalidImageError:
    """The error for a file of `size` bytes, or of at least so many, where `bytes_max` are accepted."""
    sentence = f"The file has {_amount(size)}; at most {_amount(bytes_max)} are accepted: send a smaller one."
    return InvalidImageError("image_too_large", sentence)


def _amount(size: int) -> str:
    return f"{size / 1_000_000:.1f} MB" if size >= 1_000_000 else f"{size:,} bytes"
