"""Redaction: no secret in any line, whoever wrote it."""

from __future__ import annotations

import uuid

import pytest

from daemon.log import hashed, redactor

REDACT = redactor(["very-secret-key", "abc"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("key very-secret-key here", "key *** here"),
        ("postgresql://me:pass@host/db", "postgresql://me:***@host/db"),
        ("wss://x/realtime?apikey=eyJhbGci.x&vsn=1.0.0", "wss://x/realtime?apikey=***&vsn=1.0.0"),
        ("https://r2/x?X-Amz-Signature=abcdef&X-Amz-Date=1", "https://r2/x?X-Amz-Signature=***&X-Amz-Date=***"),
        ("Authorization: Bearer eyJhbGciOi.J9.sig", "Authorization: Bearer ***"),
        ("an abc of plain words", "an abc of plain words"),
    ],
)
def test_secrets_are_replaced_and_words_stay(text: str, expected: str) -> None:
    assert REDACT(text) == expected


def test_a_session_is_told_from_others_by_what_does_not_open_it() -> None:
    one, other = str(uuid.uuid4()), str(uuid.uuid4())
    assert hashed(one) == hashed(one) != hashed(other)
    assert len(hashed(one)) == 12
    assert hashed(one) not in one.replace("-", "")
