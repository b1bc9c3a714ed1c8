"""`maskd demo`: the whole of maskd on this machine alone, with an embedded Postgres and a local folder.

The daemon is made by the same `build()` as in production and runs in this process. Everything is temporary but the gallery.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.commands.run import serve, set_up_log
from daemon.commands.submit import CONTENT_TYPES, RESULT_BYTES_MAX, RESULT_COLUMNS, upload
from daemon.config import Config, load
from daemon.examples import CREDITS, EXAMPLES, PHOTOS, Example
from daemon.gallery import Card, File, page
from daemon.keys import prefixes_of
from daemon.main import Daemon, build, build_keys
from daemon.progress import Said
from models import ort, weights
from storage import migrate as migrations
from storage.client import FINAL, Owner, TaskClient
from storage.embedded import EmbeddedPostgres, EmbeddedPostgresError

GALLERY = Path("out") / "demo"
READY_SECONDS_MAX = 60.0
TASKS_SECONDS_MAX = 300.0
LOOK_SECONDS = 0.1
COLUMNS = 110
FETCH_SECONDS_MAX = 20.0
NETWORK = "mobile-sam"


@dataclass(frozen=True, slots=True)
class Sent:
    """An example that was inserted as a task; `number` counts from 1."""

    number: int
    example: Example
    task_id: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A task at its end, with its files by the row's column."""

    sent: Sent
    row: dict[str, Any]
    files: dict[str, File]

    @property
    def well(self) -> bool:
        return self.sent.example.ended_well(self.row)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the daemon up until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: one JSON document on standard output.")] = False,
) -> None:
    """Photos in, masks out, on this machine alone; the results are shown on a page."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the daemon listens: clean up as after Ctrl-C
    try:
        with Said(Console(stderr=True)) as said, tempfile.TemporaryDirectory(prefix="maskd-demo-") as scratch:
            fetch_weights(said, Path(Config.model_fields["weights_dir"].default), FETCH_SECONDS_MAX)
            said.step("starting an embedded Postgres")
            with EmbeddedPostgres.start() as postgres:
                code = anyio.run(Demo(configuration(postgres.dsn, Path(scratch)), said, keep, as_json).run)
    except EmbeddedPostgresError as error:
        typer.echo(f"maskd: {error}", err=True)
        code = 1
    except KeyboardInterrupt:
        code = 1
    raise typer.Exit(code)


def fetch_weights(said: Said, folder: Path, seconds_max: float) -> None:
    """Try for MobileSAM's files, for so long; without them the classical engine answers."""
    wanted = weights.network(NETWORK)
    if not ort.available() or weights.in_place(wanted, folder):
        return
    said.step("fetching MobileSAM")
    until = time.monotonic() + seconds_max
    reasons = ["the hub did not answer in time"]

    def fetch() -> None:
        try:
            for file in wanted.files:
                weights.pull(file, folder, seconds_max=until - time.monotonic())
            reasons.clear()
        except weights.WeightsError as error:
            reasons[0] = str(error)

    thread = threading.Thread(target=fetch, name="maskd-weights", daemon=True)  # a name that does not resolve may take minutes
    thread.start()
    thread.join(seconds_max)
    if reasons:
        said.note(f"{reasons[0]}: the classical engine answers")


def configuration(dsn: str, scratch: Path) -> Config:
    """What a machine with nothing configured gets; neither the environment nor a .env has a say."""
    settings = {
        "DATABASE_URL": dsn,
        "MASKD_BLOB_DIR": str(scratch / "blobs"),
        "MASKD_STATE_DIR": str(scratch / "state"),
        "MASKD_PORT": "0",
        "MASKD_LOG_LEVEL": "warning",
        "MASKD_DRAIN_SECONDS": "5",
        "MASKD_PAGE": "true",
    }
    return load(settings, env_file=Path(os.devnull))


@dataclass(frozen=True, slots=True)
class Demo:
    """One run on a server that is there: migrate, serve, send, wait, show."""

    config: Config
    said: Said
    keep: bool
    as_json: bool

    async def run(self) -> int:
        """The exit code: 0 when every task ended as it must."""
        set_up_log(self.config)
        self.said.step("applying the migrations")
        await migrations.migrate(self.config.database_dsn(), plain=True, dry_run=False, said=lambda line: None)
        self.said.step("starting the daemon")
        daemon = build(self.config)
        return await beside(daemon, partial(self._work, daemon), self.keep)

    async def _work(self, daemon: Daemon) -> bool:
        with anyio.move_on_after(READY_SECONDS_MAX) as waiting:
            await daemon.ready.wait()
        if waiting.cancelled_caught:
            raise TimeoutError(f"the daemon was not ready within {READY_SECONDS_MAX:.0f} s")
        client = await TaskClient.connect(self.config.database_dsn())
        try:
            owner = await client.owner(None)
            begun = time.monotonic()
            sent = await self._send(daemon, client, owner)
            rows = await self._finished(client, sent)
            seconds = time.monotonic() - begun
        finally:
            await client.close()
        ended = await anyio.to_thread.run_sync(self._collect, daemon, owner, sent, rows)
        path = await anyio.to_thread.run_sync(write_gallery, ended, seconds)
        self.said.end()
        self._show(daemon, ended, path)
        return bool(ended) and all(each.well for each in ended)

    async def _send(self, daemon: Daemon, client: TaskClient, owner: Owner) -> list[Sent]:
        """Upload the photos and insert one row per example whose kind this host serves."""
        assert daemon.pipeline is not None, "it is ready"
        kinds = {kind for pool in daemon.pipeline.parts.pools.values() for kind in pool.kinds}
        served = [example for example in EXAMPLES if example.kind in kinds]
        photos = sorted({example.photo for example in served})
        self.said.step("uploading the photos", len(photos))
        keys = {}
        for photo in photos:
            keys[photo] = await upload(daemon.blobs, owner, PHOTOS / photo)
            self.said.part(photo)
        self.said.step("working", len(served))
        sent: list[Sent] = []
        ids: dict[str, str] = {}
        for number, each in enumerate(served, 1):
            key, after = keys[each.photo] if each.own_photo else None, None if each.after is None else ids[each.after]
            ids[each.title] = await client.insert(owner, each.kind, key, each.asked(ids), each.text, after=after)
            sent.append(Sent(number, each, ids[each.title]))
        return sent

    async def _finished(self, client: TaskClient, sent: Sequence[Sent]) -> list[dict[str, Any]]:
        """The rows when all are final, or as they are when the time is over."""
        names = {each.task_id: each.example.title for each in sent}
        until = time.monotonic() + TASKS_SECONDS_MAX
        while True:
            rows = await client.rows([each.task_id for each in sent])
            for row in rows:
                if row["status"] in FINAL and (name := names.pop(row["id"], None)) is not None:
                    self.said.part(f"{row['kind']}: {name}: {row['status']}")
            if not names or time.monotonic() > until:
                return rows
            await anyio.sleep(LOOK_SECONDS)

    def _collect(self, daemon: Daemon, owner: Owner, sent: Sequence[Sent], rows: Sequence[dict[str, Any]]) -> list[Ended]:
        """The tasks with their files, named by the task's number."""
        keys = build_keys(self.config)
        prefixes = prefixes_of(["masks/{project_id}/"], owner.user_id, owner.project_id)
        ended = []
        for each, row in zip(sent, rows, strict=True):
            found = {column: keys.key_of(row[column], prefixes) for column in RESULT_COLUMNS if row[column] is not None}
            files = {
                column: result_file(each.number, key, daemon.blobs.get(key, RESULT_BYTES_MAX)) for column, key in found.items()
            }
            ended.append(Ended(each, row, files))
        return ended

    def _show(self, daemon: Daemon, ended: Sequence[Ended], path: Path) -> None:
        if self.as_json:
            typer.echo(json.dumps(document(ended, path), ensure_ascii=False))
        else:
            console = Console(soft_wrap=True)
            if not console.is_terminal:
                console.width = COLUMNS  # a file or a pipe has no width of its own
            console.print(*report(ended, path), sep="\n")
        if self.keep:
            typer.echo(farewell(self.config, daemon), err=self.as_json)


async def beside(daemon: Daemon, work: Callable[[], Awaitable[bool]], keep: bool) -> int:
    """Run the daemon, and `work` beside it; the exit code. A signal drains the daemon, and its end is the end of the work.

    With `keep` the daemon stays until a signal. Raises what `work` raised, when the daemon has stopped.
    """
    codes: list[int] = []
    errors: list[Exception] = []
    well = False
    async with anyio.create_task_group() as tasks:

        async def served() -> None:
            codes.append(await serve(daemon))
            tasks.cancel_scope.cancel()

        tasks.start_soon(served)
        try:
            well = await work()
        except Exception as error:
            errors.append(error)
        if errors or not keep:
            daemon.drain()
    if errors:
        raise errors[0]
    return max(codes, default=1) or int(not well)


def result_file(number: int, key: str, data: bytes) -> File:
    """A result under a name of its own in the gallery's folder."""
    name = key.rpartition("/")[2]
    content_type = "application/json" if name.endswith(".json") else CONTENT_TYPES.get(Path(name).suffix, "image/png")
    return File(f"{number:02}-{name}", content_type, data)


def write_gallery(ended: Sequence[Ended], seconds: float) -> Path:
    """Write the page and the files of the results under the current folder; the page's path."""
    GALLERY.mkdir(parents=True, exist_ok=True)
    cards = []
    for each in ended:
        example = each.sent.example
        photo = File(example.photo, "image/jpeg", (PHOTOS / example.photo).read_bytes())
        cards.append(Card(example.title, photo, example.params, example.text, each.row, each.files))
        for file in each.files.values():
            (GALLERY / file.name).write_bytes(file.data)
    path = GALLERY / "index.html"
    path.write_text(page(cards, seconds, CREDITS), encoding="utf-8")
    return path.absolute()


def document(ended: Sequence[Ended], path: Path) -> dict[str, Any]:
    """What --json prints."""
    tasks = []
    for each in ended:
        row = each.row
        result = {name: row[name] for name in (*RESULT_COLUMNS, "labels", "metadata", "error")}
        result["files"] = [str(path.with_name(file.name)) for file in each.files.values()]
        facts = {"id": row["id"], "kind": row["kind"], "title": each.sent.example.title, "status": row["status"]}
        tasks.append({**facts, "engine": engine(row), "seconds": row["seconds"], "result": result})
    return {"ok": bool(ended) and all(each.well for each in ended), "tasks": tasks, "gallery": str(path)}


def engine(row: dict[str, Any]) -> str | None:
    """Which engine answered."""
    return (row["metadata"] or {}).get("engine")


def report(ended: Sequence[Ended], path: Path) -> Iterator[RenderableType]:
    """What a person reads: one line per task, what the errors say, and where the gallery is."""
    table = Table("kind", "asked", "status", "engine", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("masks", justify="right")
    table.add_column("seconds", justify="right")
    for each in ended:
        row, facts = each.row, each.row["metadata"] or {}
        masks, seconds = facts.get("count", ""), "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        table.add_row(row["kind"], Text(each.sent.example.title), status(each), engine(row), str(masks), seconds)
    yield table
    for each in ended:
        if error := each.row["error"]:
            yield Text.assemble(f"  {each.sent.example.title}: ", (f"{error['code']}: {error['message']}", "yellow"))
    yield Text("  seconds: from the insert to the end, the queue included", style="dim")
    yield Text.assemble("\ngallery: ", (str(path), "bold"))


def status(ended: Ended) -> Text:
    """How it ended, and whether it had to."""
    word, wanted = ended.row["status"], ended.sent.example.ends
    if not ended.well:
        return Text(f"{word}, not {wanted}", style="bold red")
    return Text(word, style="green") if wanted == "done" else Text(f"{word}, as it must", style="yellow")


def farewell(config: Config, daemon: Daemon) -> str:
    """How to go on with a daemon that stays."""
    dsn, blobs = config.database_dsn(), str(config.blob_dir)
    photo = shlex.quote(str(PHOTOS / "chelsea.jpg"))
    settings = f"DATABASE_URL={shlex.quote(dsn)} MASKD_BLOB_DIR={shlex.quote(blobs)}"
    lines = (
        "\nthe daemon stays up until Ctrl-C",
        f"  page    http://{config.host}:{daemon.server.port}/",
        f"  health  http://{config.host}:{daemon.server.port}/health",
        f"  psql    psql {shlex.quote(dsn)}",
        f"  submit  {settings} maskd submit {photo} --box 20,0,405,299 --out out/",
    )
    return "\n".join(lines)
