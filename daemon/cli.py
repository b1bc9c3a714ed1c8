"""The `maskd` program: one command per file in `daemon/commands/`. Exit codes: 0, 1 failed, 2 no such command line, 75 and 76
restart me, 78 configuration."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import typer

from daemon.commands import cancel, demo, doctor, migrate, pause, prune, retry, run, status, submit, watch, weights
from daemon.progress import plain
from models.weights import WeightsError
from storage.base import ConfigurationError, RefusedError, UnavailableError

EXIT_FAILED = 1
EXIT_CONFIGURATION = 78

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="The mask daemon.")
COMMANDS: tuple[Callable[..., None], ...] = (
    *(run.run, demo.demo, migrate.migrate, submit.submit, status.status, watch.watch),
    *(cancel.cancel, pause.pause, pause.resume, retry.retry, prune.prune, doctor.doctor),
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(weights.app, name="weights")


def main() -> None:
    """Run a command; what the user can mend is said in sentences, never as a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no such letter shows a question mark
    try:
        app()
    except ConfigurationError as error:
        _tell(str(error))
        sys.exit(EXIT_CONFIGURATION)
    except (UnavailableError, RefusedError, TimeoutError, WeightsError) as error:
        _tell(f"maskd: {error}")
        sys.exit(EXIT_FAILED)


def _tell(sentences: str) -> None:
    print(*map(plain, sentences.splitlines()), sep="\n", file=sys.stderr)
