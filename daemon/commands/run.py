"""`maskd run`: the daemon itself, until SIGTERM."""

from __future__ import annotations

import os
import sys
from urllib.parse import unquote, urlsplit

import anyio
import structlog

from daemon import log
from daemon.config import Config, load
from daemon.infer import DeviceDiedError, PoolDiedError
from daemon.main import Daemon, build, watch_signals
from storage.base import ConfigurationError

EXIT_RESTART = 75
EXIT_DEVICE = 76
EXIT_CONFIGURATION = 78


def run() -> None:
    """Claim and serve tasks until SIGTERM; a second signal ends at once."""
    config = load()
    set_up_log(config)
    code = anyio.run(serve, build(config), backend_options={"use_uvloop": True})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that hangs in a handler would hold a plain exit for ever


def set_up_log(config: Config) -> None:
    """Logging with this configuration's secrets redacted."""
    log.set_up(config.log_level, config.log_format, secrets_of(config))


def secrets_of(config: Config) -> list[str]:
    """What of a configuration must never be shown."""
    keys = (
        config.supabase_service_key,
        config.r2_access_key_id,
        config.r2_secret_access_key,
        config.api_secret_key,
        config.hf_token,
        config.redis_url,
    )
    secrets = [key.get_secret_value() for key in keys if key is not None]
    urls = [url.get_secret_value() for url in (config.database_url, config.redis_url) if url is not None]
    for password in [urlsplit(url).password for url in urls]:
        if password is not None:
            secrets += [password, unquote(password)]
    return secrets


async def serve(daemon: Daemon) -> int:
    """Run the daemon under signals; the exit code."""
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch_signals, daemon.drain)
            await daemon.run()
            tasks.cancel_scope.cancel()
    except Exception as error:
        return exit_code(_leaves(error))
    return 0


def exit_code(errors: list[BaseException]) -> int:
    """What the end of the process tells systemd; the reason goes to the log, to the operator as a sentence where there is one."""
    logger = structlog.get_logger(__name__)
    if all(isinstance(error, ConfigurationError) for error in errors):
        print("\n".join(str(error) for error in errors), file=sys.stderr)
        return EXIT_CONFIGURATION
    if any(isinstance(error, PoolDiedError) for error in errors):
        logger.error("daemon.restart", reason="; ".join(map(str, errors)))
        return EXIT_DEVICE if any(isinstance(error, DeviceDiedError) for error in errors) else EXIT_RESTART
    for error in errors:
        logger.error("daemon.crashed", exc_info=error)
    return 1


def _leaves(error: BaseException) -> list[BaseException]:
    """The errors inside groups of groups."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
