"""`maskd submit`: upload an image, insert one task, and with --wait bring the results back."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import anyio.to_thread
import typer

from daemon.config import Config, load
from daemon.keys import prefixes_of
from daemon.main import build_blobs, build_keys
from daemon.progress import plain
from daemon.stores import open_client
from storage.base import BlobStore
from storage.client import Owner

RESULT_BYTES_MAX = 256 * 1024 * 1024
RESULT_COLUMNS = ("mask_image_url", "masks_url", "result_image_url")
CONTENT_TYPES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the options ask for."""

    kind: str
    text: str | None
    params: dict[str, Any]
    project: str | None
    after: str | None


def submit(
    image: Annotated[Path, typer.Argument(help="The photo.", exists=True, dir_okay=False, readable=True)],
    kind: Annotated[str | None, typer.Option(help="What is asked (see README); by itself what fits the other options.")] = None,
    text: Annotated[str | None, typer.Option(help="text_prompt")] = None,
    point: Annotated[list[str] | None, typer.Option(help="X,Y or X,Y,LABEL (0 = background); repeat for more.")] = None,
    box: Annotated[list[str] | None, typer.Option(help="X0,Y0,X1,Y1; repeat for more.")] = None,
    params: Annotated[str, typer.Option(help="Further params as JSON.")] = "{}",
    after: Annotated[str | None, typer.Option(help="The task that this one waits for.")] = None,
    project: Annotated[str | None, typer.Option(help="The project; not needed when there is only one.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the result.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait.")] = 300.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; means --wait.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Send one photo through the queue, exactly as the Edge does."""
    asked = asked_params(params, point or [], box or [])
    kind = kind or ("segment_concept" if text and not (point or box) else "segment_visual")
    sent = Wanted(kind, text, asked, project, after)
    row = anyio.run(_submit, load(), image, sent, wait or out is not None, timeout, out)
    if as_json:
        typer.echo(json.dumps(row, default=str))
    else:
        typer.echo(describe(row))
    if row.get("status") in ("error", "canceled"):
        raise typer.Exit(1)


def asked_params(text: str, points: list[str], boxes: list[str]) -> dict[str, Any]:
    """The task's params from the options; typer.BadParameter for what cannot be read."""
    try:
        params = json.loads(text)
        if not isinstance(params, dict):
            raise ValueError("not an object")
        if points:
            params["points"] = [[float(part) for part in point.split(",")] for point in points]
        if boxes:
            params["boxes"] = [[float(part) for part in box.split(",")] for box in boxes]
    except ValueError as error:
        raise typer.BadParameter(f"points are X,Y, boxes X0,Y0,X1,Y1, params a JSON object: {error}") from error
    return params


def describe(row: dict[str, Any]) -> str:
    """One or a few lines for a person."""
    if row["status"] == "error":
        return plain(f"{row['id']}: error {row['error']['code']}: {row['error']['message']}")
    lines = [f"{row['id']}: {row['status']}"]
    if row["status"] == "done":
        metadata = row["metadata"] or {}
        lines[0] += plain(f", {metadata.get('count', 0)} masks by {metadata.get('engine', '?')} in {row['seconds']:.2f} s")
        lines += [f"  {file}" for file in row.get("files", [])]
    return "\n".join(lines)


async def _submit(config: Config, image: Path, wanted: Wanted, wait: bool, timeout: float, out: Path | None) -> dict[str, Any]:
    blobs = build_blobs(config)
    client = await open_client(config)
    try:
        owner = await client.owner(wanted.project)
        key = await upload(blobs, owner, image)
        task_id = await client.insert(owner, wanted.kind, key, wanted.params, wanted.text, after=wanted.after)
        if not wait:
            return (await client.rows([task_id]))[0]
        row = (await client.finished([task_id], timeout))[0]
        if out is not None and row["status"] == "done":
            row["files"] = [str(path) for path in await download(config, blobs, row, owner, out)]
        return row
    finally:
        await client.close()


async def upload(blobs: BlobStore, owner: Owner, image: Path) -> str:
    """Store a photo under its owner's prefix; the key."""
    key = f"uploads/{owner.user_id}/{uuid.uuid4()}{image.suffix.lower()}"
    content_type = CONTENT_TYPES.get(image.suffix.lower(), "application/octet-stream")
    await anyio.to_thread.run_sync(lambda: blobs.put(key, image.read_bytes(), content_type))
    return key


async def download(config: Config, blobs: BlobStore, row: dict[str, Any], owner: Owner, out: Path) -> list[Path]:
    """Write the files of a finished task into `out`."""
    keys = build_keys(config)
    prefixes = prefixes_of(["masks/{project_id}/"], owner.user_id, owner.project_id)
    wanted = [keys.key_of(row[column], prefixes) for column in RESULT_COLUMNS if row[column] is not None]
    return await anyio.to_thread.run_sync(
        lambda: [_save(blobs, key, out / f"{row['id']}-{key.rpartition('/')[2]}") for key in wanted]
    )


def _save(blobs: BlobStore, key: str, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(blobs.get(key, RESULT_BYTES_MAX))
    return path
