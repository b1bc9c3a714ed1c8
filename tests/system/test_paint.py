"""The kinds that need no model, in the real program: the masks of one row are combined by another and painted by a third."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from support.daemons import running
from support.site import PHOTO_BOX, Site

BOX = {"polygon": [[0, 0], [200, 0], [200, 150], [0, 150]]}


def test_masks_are_found_combined_without_the_photo_painted_and_the_painting_converted(site: Site, tmp_path: Path) -> None:
    def done(kind: str, params: Any, key: str | None) -> dict[str, Any]:
        (row,) = site.queue.finished(site.queue.insert(kind, params, key))
        assert row["status"] == "done", row["error"]
        return row

    def opened(row: dict[str, Any]) -> Image.Image:
        return Image.open(io.BytesIO(site.blobs.get(row["result_image_url"], 10_000_000)))

    with running(site.settings(), tmp_path) as daemon:
        found = done("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo)
        masks = [{"task_id": found["id"]}, BOX]
        combined = done("combine_masks", {"masks": masks, "op": "difference"}, None)
        layers = [{"mask": {"task_id": combined["id"]}, "color": "#00FF00"}, {"mask": BOX, "opacity": 1}]
        painted = done("paint_masks", {"layers": layers, "format": "jpg"}, site.photo)
        converted = done("convert_image", {"format": "webp", "max_side": 100}, painted["result_image_url"])
        (missing,) = site.queue.finished(
            site.queue.insert("combine_masks", {"masks": [{"task_id": found["id"], "mask_ids": [9]}]}, None)
        )
        assert daemon.stop() == 0

    assert 0 < combined["labels"][0]["area"] < found["labels"][0]["area"]
    assert painted["labels"][0]["area"] == combined["labels"][0]["area"]
    red, green, blue = opened(painted).convert("RGB").getpixel((100, 75))  # type: ignore[misc]
    assert (red > 240, green < 16, blue < 16) == (True, True, True)
    assert (opened(painted).format, opened(converted).format, max(opened(converted).size)) == ("JPEG", "WEBP", 100)
    assert missing["error"]["code"] == "mask_missing"
    assert site.stored() == site.published()
