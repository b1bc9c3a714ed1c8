"""structlog, set up once: JSON lines for machines, readable lines on a terminal, secrets redacted everywhere.

Standard-library loggers (httpx, websockets, botocore, asyncio) go through the same processors, tracebacks included.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import structlog

EventDict = MutableMapping[str, Any]
URL_SECRETS = re.compile(r"(://[^:/@\s]*:)[^@\s]+@")
QUERY_SECRETS = re.compile(r"(?i)((?:apikey|token|signature|x-amz-[a-z-]+|key|password)=)[^&\s\"']+")
BEARER = re.compile(r"(?i)(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")


def redactor(secrets: Iterable[str]) -> Callable[[str], str]:
    """A function that replaces the given secrets, passwords in URLs, keys in queries and bearer tokens by ***."""
    known = sorted((secret for secret in secrets if len(secret) >= 6), key=len, reverse=True)

    def redact(text: str) -> str:
        for secret in known:
            text = text.replace(secret, "***")
        return BEARER.sub(r"\1***", QUERY_SECRETS.sub(r"\1***", URL_SECRETS.sub(r"\1***@", text)))

    return redact


def hashed(secret: str) -> str:
    """A few characters that tell lines of one session from others, but open none."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def set_up(level: str, form: str, secrets: Iterable[str]) -> None:
    """Configure structlog and the standard library for this process. `form`: auto (text on a terminal), json or text."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    redact = redactor(secrets)

    def render(_logger: object, _name: str, event: EventDict) -> EventDict:
        return {key: redact(value) if isinstance(value, str) else value for key, value in event.items()}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        render,
    ]
    renderer = (
        structlog.dev.ConsoleRenderer() if text else structlog.processors.JSONRenderer(default=lambda value: redact(repr(value)))
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("realtime").setLevel(
        logging.CRITICAL
    )  # it tells of each end twice, and frames of a megabyte; we tell it once
    for package in ("daemon", "handlers", "models", "storage"):
        logging.getLogger(package).setLevel(level.upper())
