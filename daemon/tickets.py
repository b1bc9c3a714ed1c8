"""Tickets: what a browser may show instead of the key, for an hour at most. The Edge mints them with the key.

Enters: the key and a time. Leaves: text, and whether a text is such. Pure.
"""

from __future__ import annotations

import hashlib
import hmac

AHEAD_SECONDS_MAX = 3600
LENGTH_MAX = 100


def ticket(key: str, expiry: int) -> str:
    """A ticket that is good until `expiry`, in seconds since 1970: "<expiry>.<hmac-sha256 of that, in hex>"."""
    return f"{expiry}.{hmac.new(key.encode(), str(expiry).encode(), hashlib.sha256).hexdigest()}"


def is_good(given: str, key: str, now: float) -> bool:
    """Whether this key made that ticket, and it is neither over nor good for longer than an hour."""
    expiry = given.partition(".")[0]
    if len(given) > LENGTH_MAX or not (expiry.isascii() and expiry.isdigit()):
        return False
    made = ticket(key, int(expiry))
    return (
        hmac.compare_digest(made.encode(), given.encode("utf-8", "surrogateescape"))
        and 0 < int(expiry) - now <= AHEAD_SECONDS_MAX
    )
