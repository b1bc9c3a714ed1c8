"""SAM 3 in the real program, on a small checkpoint: texts answered, not ready before it is loaded, and starts that say what they
lack."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from support.daemons import launch, running, wait_ready, wait_until
from support.sam3_checkpoints import folder, meta_file, needs_sam3
from support.site import Site

needs_sam3()

ASK = "insert into public.segmentation_results (project_id, source_image_url, text_prompt) values (%s, %s, %s) returning id::text"


def asked(site: Site, text: str) -> str:
    """A row as the Edge inserts it: no kind, a text."""
    return str(site.queue.one(ASK, site.queue.project, site.photo, text))


@pytest.mark.parametrize("path", [folder, meta_file], ids=["hub", "meta"])
def test_a_row_with_a_text_is_done_by_the_checkpoint_that_was_named(site: Site, tmp_path: Path, path: object) -> None:
    settings = site.settings(SAM3_WEIGHTS_PATH=str(path()), SAM3_DEVICE="cpu", MASKD_CPU_THREADS="1")  # type: ignore[operator]
    with running(settings, tmp_path) as daemon:
        first, second = asked(site, "the cup"), asked(site, "the cup")
        visual = site.queue.insert("segment_visual", {"boxes": [[60, 10, 380, 290]]}, site.photo)
        rows = site.queue.finished([first, second, *visual])
        health = json.loads(daemon.get("/health")[1])
        assert daemon.stop() == 0
    assert [row["status"] for row in rows] == ["done"] * 3, rows
    assert [(row["kind"], row["metadata"]["engine"]) for row in rows] == [
        ("segment_concept", "sam3"),
        ("segment_concept", "sam3"),
        ("segment_visual", "classical"),
    ]
    assert health["models"]["concept"]["model_id"] == rows[0]["metadata"]["model_id"]
    assert {row["metadata"]["embedding_cached"] for row in rows[:2]} == {False, True}
    read_by_pycocotools(site, rows[0], tmp_path)


def read_by_pycocotools(site: Site, row: dict[str, object], tmp_path: Path) -> None:
    """The row's JSON is a dataset whose masks are those of the labels."""
    file = tmp_path / "masks.json"
    file.write_bytes(site.blobs.get(str(row["masks_url"]), 10_000_000))
    dataset = COCO(str(file))
    annotations = dataset.loadAnns(dataset.getAnnIds())
    assert annotations
    assert [category["name"] for category in dataset.loadCats(dataset.getCatIds())] == ["the cup"]
    (image,) = dataset.loadImgs(dataset.getImgIds())
    for annotation, label in zip(annotations, row["labels"], strict=True):  # type: ignore[call-overload]
        mask_hw = dataset.annToMask(annotation)
        assert mask_hw.shape == (image["height"], image["width"])
        assert (mask_hw.sum(), label["label"]) == (annotation["area"], "the cup")
        assert (label["id"], label["score"]) == (annotation["id"], annotation["score"])


def test_it_is_alive_but_not_ready_while_the_network_is_loaded(site: Site, tmp_path: Path) -> None:
    daemon = launch(site.settings(SAM3_WEIGHTS_PATH=str(folder()), MASKD_CPU_THREADS="1"), tmp_path)
    try:
        wait_until("it listens", lambda: bool(daemon.events("server.listening")), 30)
        daemon.port = int(daemon.events("server.listening")[0]["port"])
        early = daemon.get("/ready"), daemon.get("/health")
        assert not daemon.events("engine.loaded"), "importing torch takes longer than two requests"
        assert (early[0][0], early[1][0], json.loads(early[1][1])["status"]) == (503, 200, "starting")
        wait_ready(daemon)
        assert daemon.get("/ready")[0] == 200
        assert daemon.stop() == 0
    finally:
        if daemon.process.poll() is None:
            daemon.kill()


def test_a_text_that_cannot_be_read_ends_in_words_and_the_worker_goes_on(site: Site, tmp_path: Path) -> None:
    with running(site.settings(SAM3_WEIGHTS_PATH=str(folder()), MASKD_CPU_THREADS="1"), tmp_path):
        asks = [asked(site, text) for text in ("빨간 자동차", "very " * 40 + "red car", " ", "a cup")]
        rows = site.queue.finished(asks)
    assert [(row["error"] or {}).get("code") for row in rows] == ["prompt_language", "prompt_invalid", "prompt_invalid", None]
    assert "and 32 are read" in rows[1]["error"]["message"]


def test_texts_wait_for_a_worker_that_reads_them(site: Site, tmp_path: Path) -> None:
    task = asked(site, "the cup")
    with running(site.settings(), tmp_path):
        done = site.queue.insert("segment_visual", {"boxes": [[60, 10, 380, 290]]}, site.photo)
        site.queue.finished(done)
        assert site.queue.row(task)["status"] == "pending", "no engine here reads texts, so it is not claimed"
        with running(site.settings(SAM3_WEIGHTS_PATH=str(folder()), MASKD_CPU_THREADS="1"), tmp_path):
            assert site.queue.finished([task])[0]["status"] == "done"


def test_texts_that_nobody_reads_end_as_engine_unavailable(site: Site, tmp_path: Path) -> None:
    task = asked(site, "the cup")
    with running(site.settings(MASKD_UNSERVED_SECONDS="1"), tmp_path):
        row = site.queue.finished([task], 60)[0]
    assert row["error"]["code"] == "engine_unavailable"


BROKEN_TORCHVISION = 'raise RuntimeError("operator torchvision::nms does not exist")'


def refused(site: Site, tmp_path: Path, **settings: str) -> str:
    """What the program says before it ends with 78."""
    daemon = launch(site.settings(**settings), tmp_path)
    assert daemon.process.wait(60) == 78, daemon.log.read_text()
    said = daemon.log.read_text()
    assert "Traceback" not in said
    return said


def test_a_broken_torchvision_is_named_before_transformers_stumbles_over_it(site: Site, tmp_path: Path) -> None:
    package = tmp_path / "broken" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN_TORCHVISION)
    said = refused(site, tmp_path, SAM3_WEIGHTS_PATH=str(folder()), MASKD_CPU_THREADS="1", PYTHONPATH=str(package.parent))
    assert "torchvision is broken (operator torchvision::nms does not exist)" in said
    assert "pip uninstall torchvision" in said


def test_without_torch_the_command_that_brings_it_is_named(site: Site, tmp_path: Path) -> None:
    # A finder that denies torch, as its absence would: put there by the interpreter's own start-up file.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [type('Without', (), {'find_spec': staticmethod(\n"
        "    lambda name, path=None, target=None, finder=finder: None if name.split('.')[0] == 'torch'\n"
        "    else finder.find_spec(name, path, target))}) for finder in sys.meta_path]\n"
    )
    said = refused(site, tmp_path, SAM3_WEIGHTS_PATH=str(folder()), MASKD_CPU_THREADS="1", PYTHONPATH=str(tmp_path))
    assert re.search(r"torch is not installed; run: make torch", said), said


def test_without_weights_the_way_to_them_is_named(site: Site, tmp_path: Path) -> None:
    said = refused(site, tmp_path, MASKD_CONCEPT="sam3", MASKD_WEIGHTS_DIR=str(tmp_path))
    assert "maskd weights pull sam3" in said
    assert "https://huggingface.co/facebook/sam3" in said
    assert "HF_TOKEN" in said
