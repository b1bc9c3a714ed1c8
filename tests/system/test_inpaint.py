"""Kinds that paint, in the real program over small networks of random weights; and a chain of four that was sent in one go."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support.daemons import running
from support.inpaint_checkpoints import diffusion_folder, needs_diffusers, script
from support.site import PHOTO, PHOTO_BOX, Site

SQUARE = {"masks": [{"polygon": [[120, 100], [220, 100], [220, 180], [120, 180]]}]}
INSERT = """insert into public.segmentation_results (project_id, kind, source_image_url, text_prompt, params, after)
  values (%s, %s, %s, %s, %s::jsonb, %s) returning id::text"""
SOURCE_HWC = np.asarray(Image.open(PHOTO).convert("RGB"))


def insert(
    site: Site, kind: str, params: dict[str, Any], text: str | None = None, key: str | None = None, after: str | None = None
) -> str:
    return str(site.queue.one(INSERT, site.queue.project, kind, key, text, json.dumps(params), after))


def pixels(site: Site, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(site.blobs.get(row["result_image_url"], 50_000_000)))
    return np.asarray(image.convert("RGB"))


def used(site: Site, row: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The mask that was used, bool (height, width)."""
    (annotation,) = json.loads(site.blobs.get(row["masks_url"], 50_000_000))["annotations"]
    return coco_mask.decode(annotation["segmentation"]).astype(bool)  # type: ignore[no-any-return]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights folder with a small LaMa and a small pipeline of diffusion."""
    needs_diffusers()
    folder = tmp_path / "weights"
    (folder / "lama").mkdir(parents=True)
    shutil.copy(script(), folder / "lama" / "big-lama.pt")
    shutil.copytree(diffusion_folder(), folder / "diffusion")
    return folder


def test_rows_of_every_painting_kind_are_done_and_what_stays_is_untouched(site: Site, tmp_path: Path, weights: Path) -> None:
    words = {**SQUARE, "steps": 2, "seed": 5}
    with running(site.settings(MASKD_WEIGHTS_DIR=str(weights), MASKD_CPU_THREADS="1"), tmp_path) as daemon:
        ids = [
            insert(site, "remove_object", {"boxes": [[120, 100, 220, 180]]}, None, site.photo),
            insert(site, "fill_object", words, "a red rose", site.photo),
            insert(site, "fill_object", words, "a red rose", site.photo),
            insert(site, "replace_background", words, "a beach", site.photo),
            insert(site, "replace_background", {**SQUARE, "color": "#00FF00"}, None, site.photo),
            insert(site, "replace_background", {**SQUARE, "background_image_url": site.photo}, None, site.photo),
        ]
        rows = site.queue.finished(ids, 120)
        models = json.loads(daemon.get("/health")[1])["models"]
        assert daemon.stop() == 0
    assert [row["status"] for row in rows] == ["done"] * 6, rows
    engines = [row["metadata"]["engine"] for row in rows]
    assert engines == ["lama", "diffusion", "diffusion", "diffusion", "maskd", "maskd"]
    assert (models["inpaint"]["engine"], models["generate"]["engine"]) == ("lama", "diffusion")
    for row in rows:
        mask_hw = used(site, row)
        stays = mask_hw if row["kind"] == "replace_background" else ~mask_hw
        assert (pixels(site, row)[stays] == SOURCE_HWC[stays]).all()
    assert (pixels(site, rows[1]) == pixels(site, rows[2])).all(), "the same seed gives the same picture"
    assert rows[0]["metadata"]["segmenter"] == "classical"
    assert site.stored() == site.published()


def test_a_host_without_a_generator_tries_in_vain_and_says_so(site: Site, tmp_path: Path) -> None:
    with running(site.settings(MASKD_RETRY_SECONDS="0.1"), tmp_path) as daemon:
        row = site.queue.finished([insert(site, "replace_background", SQUARE, "a beach", site.photo)], 60)[0]
        (waiting,) = [insert(site, "fill_object", SQUARE, "a rose", site.photo)]
        removed = site.queue.finished([insert(site, "remove_object", SQUARE, None, site.photo)])[0]
        assert site.queue.row(waiting)["status"] == "pending", "no worker here serves it, so none takes it"
        assert daemon.stop() == 0
    assert (row["error"]["code"], row["attempts"]) == ("engine_unavailable", 3)
    assert removed["metadata"]["engine"] == "classical"


def test_a_chain_of_four_that_was_sent_in_one_go_is_done_without_a_poll(site: Site, tmp_path: Path) -> None:
    rarely = {"MASKD_POLL_SECONDS": "1000", "MASKD_POLL_UNPROVEN_SECONDS": "1000"}
    with running(site.settings(**rarely), tmp_path) as daemon:
        found = insert(site, "segment_everything", {}, None, site.photo)
        combined = insert(site, "combine_masks", {"masks": [{"task_id": found}]}, after=found)
        layers = [{"mask": {"task_id": combined}, "color": "#FF0000", "opacity": 1}]
        painted = insert(site, "paint_masks", {"layers": layers}, None, site.photo, after=combined)
        converted = insert(site, "convert_image", {"format": "webp", "max_side": 100}, after=painted)
        rows = site.queue.finished([found, combined, painted, converted], 60)
        assert daemon.stop() == 0
    assert [row["status"] for row in rows] == ["done"] * 4, rows
    small_hwc = pixels(site, rows[3])
    assert max(small_hwc.shape) == 100
    expected = np.asarray(Image.fromarray(pixels(site, rows[2])).resize(small_hwc.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(small_hwc.astype(int) - expected.astype(int)).mean() < 12, "it is the painted image that was converted"


def test_only_the_kinds_that_the_settings_name_are_claimed(site: Site, tmp_path: Path) -> None:
    with running(site.settings(MASKD_KINDS="segment_visual"), tmp_path):
        converted = insert(site, "convert_image", {}, None, site.photo)
        site.queue.finished(site.queue.insert("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo))
        assert site.queue.row(converted)["status"] == "pending"
