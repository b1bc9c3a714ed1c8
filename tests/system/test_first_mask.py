"""A row goes in, a mask comes out: through the real program, a real Postgres and real blobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pycocotools import mask as coco
from support.daemons import environment, running
from support.database import Database

from storage.client import TaskClient
from storage.files import FileBlobs

pytestmark = pytest.mark.anyio
PHOTO = Path(__file__).resolve().parents[2] / "daemon" / "photos" / "chelsea.jpg"


async def test_a_plain_insert_becomes_done_with_a_mask_that_pycocotools_reads(database: Database, tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path / "blobs")
    client = await TaskClient.connect(database.dsn)
    owner = await client.owner(None)
    blobs.put(f"uploads/{owner.user_id}/cat.jpg", PHOTO.read_bytes(), "image/jpeg")
    with running(environment(database.dsn, tmp_path), tmp_path) as daemon:
        task = await client.insert(owner, "segment_visual", f"uploads/{owner.user_id}/cat.jpg", {"boxes": [[60, 10, 380, 290]]})
        (row,) = await client.finished([task], 60)
        assert daemon.get("/ready")[0] == 200
        assert daemon.stop() == 0
    await client.close()

    assert row["status"] == "done", row["error"]
    assert row["metadata"]["engine"] == "classical"
    dataset = json.loads(blobs.get(row["masks_url"], 10_000_000))
    (annotation,) = dataset["annotations"]
    assert coco.decode(annotation["segmentation"]).sum() == annotation["area"] > 10_000
    assert blobs.get(row["mask_image_url"], 10_000_000).startswith(b"\x89PNG")
