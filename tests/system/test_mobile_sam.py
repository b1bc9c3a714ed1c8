"""MobileSAM in the real program: rows answered by it, its image kept for the next task, and a start that says what it lacks."""

from __future__ import annotations

import json
from pathlib import Path

from pycocotools import mask as coco
from support.checkpoints import exported
from support.daemons import launch, running
from support.site import PHOTO_BOX, Site

KINDS = {"segment_visual": {"boxes": [PHOTO_BOX]}, "segment_everything": {"points_per_side": 3}}


def test_rows_of_both_kinds_are_done_by_the_network_that_lies_in_the_folder(site: Site, tmp_path: Path) -> None:
    settings = site.settings(MASKD_WEIGHTS_DIR=str(exported()), MASKD_CPU_THREADS="1")
    with running(settings, tmp_path) as daemon:
        (loaded,) = [event for event in daemon.events("engine.loaded") if event["engine"] == "mobilesam"]
        tasks = [site.queue.insert(kind, params, site.photo)[0] for kind, params in KINDS.items()]
        rows = site.queue.finished(tasks)
        models = json.loads(daemon.get("/health")[1])["models"]
        assert daemon.stop() == 0
    assert [(row["status"], row["metadata"]["engine"]) for row in rows] == [("done", "mobilesam")] * 2, rows
    assert (
        {row["metadata"]["model_id"] for row in rows}
        == {loaded["model_id"]}
        == {models[role]["model_id"] for role in ("visual", "everything")}
    )
    assert sorted(row["metadata"]["embedding_cached"] for row in rows) == [False, True]
    for row in rows:
        annotations = json.loads(site.blobs.get(row["masks_url"], 10_000_000))["annotations"]
        assert annotations
        assert all(coco.decode(each["segmentation"]).sum() == each["area"] for each in annotations)


def test_a_network_that_was_named_and_is_not_there_ends_the_program_with_the_command_that_mends_it(
    site: Site, tmp_path: Path
) -> None:
    daemon = launch(site.settings(MASKD_EVERYTHING="mobilesam", MASKD_WEIGHTS_DIR=str(tmp_path)), tmp_path)
    assert daemon.process.wait(30) == 78
    said = daemon.log.read_text()
    assert "MASKD_EVERYTHING=mobilesam needs mobile_sam_image_encoder.onnx and sam_mask_decoder_multi.onnx in" in said
    assert "maskd weights pull mobile-sam" in said
    assert "Traceback" not in said
