"""Redaction: no secret in any line, whoever wrote it."""

from __future__ import annotations

import pytest

from daemon.log import redactor

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
