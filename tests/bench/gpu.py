"""SAM 3 at its full size on a GPU, with random weights: rows through the whole daemon by the bare model loop, and milliseconds.

A row is a 2 megapixel JPEG, one text and 20 instances: fetched, decoded, inferred, drawn and stored. Without a GPU nothing is
measured; MASKD_TEST_REHEARSE=1 runs the same steps on a CPU with a small network, and its figures mean nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from bench.ground import SECONDS_MAX, Ground, add_owner
from bench.noop import settings, settled
from bench.report import Report, ratios
from PIL import Image
from support.engines import never_stop
from support.photos import photo

from daemon import log
from daemon.config import load as load_config
from daemon.main import build
from handlers import segment_concept
from models.base import ConceptPrompt, ConceptQuestion
from storage.files import FileBlobs

REHEARSE = "MASKD_TEST_REHEARSE"
SIDE = 1414
BATCH = 8
IMAGES, IMAGES_OF_A_REHEARSAL = 256, 16
ROUNDS = 3
INSTANCES = 20
TEXT = "cup"
PARAMS = f'{{"threshold": 0, "max_instances": {INSTANCES}}}'
INSERT = """insert into public.segmentation_results (project_id, kind, source_image_url, text_prompt, params)
  select $1, 'segment_concept', 'uploads/' || $2 || '/' || n || '.jpg', $3, $4::jsonb from generate_series(1, $5::integer) n"""


def run(ground: Ground, report: Report) -> None:
    """Measure where there is a GPU, else say so."""
    report.title("gpu", f"segment_concept by SAM 3 at full size, random weights, {SIDE}x{SIDE} JPEG, {INSTANCES} instances")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        report.note("not run: it needs torch and transformers (make torch)")
        return
    import torch

    rehearsal = bool(os.environ.get(REHEARSE))
    if not torch.cuda.is_available() and not rehearsal:
        report.note("not run on a GPU: this host has no usable CUDA device")
        return
    device = "cpu" if rehearsal else "cuda:0"
    report.note(f"a rehearsal on {device}: no figures" if rehearsal else f"on {torch.cuda.get_device_name(0)}")
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoint(Path(folder), rehearsal)
        milliseconds(weights, device, report, rehearsal)
        asyncio.run(throughput(ground.database(), weights, Path(folder), report, rehearsal))


def checkpoint(folder: Path, rehearsal: bool) -> Path:
    """The released architecture with random weights in the hub's layout; a small one for a rehearsal."""
    from support import sam3_checkpoints

    if rehearsal:
        return sam3_checkpoints.folder()
    from safetensors.torch import save_file
    from transformers import Sam3VideoConfig, Sam3VideoModel

    made = folder / "sam3"
    made.mkdir()
    network = Sam3VideoModel(Sam3VideoConfig())
    network.config.save_pretrained(made)
    save_file({name: values.clone() for name, values in network.state_dict().items()}, made / "model.safetensors")
    sam3_checkpoints.save_vocabulary(made)
    return made


def milliseconds(weights: Path, device: str, report: Report, rehearsal: bool) -> None:
    """Per image at batch 8 and per further prompt, in bf16 and in fp32, both eager."""
    from models.sam3 import load
    from models.torch_device import Placement

    smalls: list[Any] = []
    figures: dict[bool, list[float]] = {}
    for half in (False, True):
        engine = load(weights, Placement(device, half and not rehearsal))
        smalls = smalls or [engine.shrink(image(number)) for number in range(BATCH)]
        embeddings = engine.embed(smalls)
        embed, one, more = (
            timed(device, call)
            for call in (
                partial(engine.embed, smalls),
                partial(engine.find, asks(embeddings[:1], 1), never_stop),
                partial(engine.find, asks(embeddings[:1], 1 + BATCH), never_stop),
            )
        )
        name = "bf16" if half else "fp32"
        figures[half] = [milli / BATCH for milli in embed]
        report.side(f"{name}: one image of {BATCH} through the encoder", figures[half], "ms")
        further = [(many - single) / BATCH for many, single in zip(more, one, strict=True)]
        report.side(f"{name}: each further prompt", further, "ms")
    report.note("the limit of one H200 is about 7 ms an image (5.5 TFLOP at 790 TFLOP/s)")
    if not rehearsal:
        report.at_most("bf16 ms an image at batch 8", figures[True], 30)
        report.at_most("bf16 / fp32", ratios(figures[True], figures[False]), 1)


async def throughput(dsn: str, weights: Path, folder: Path, report: Report, rehearsal: bool) -> None:
    """Rounds of the whole daemon and of the bare loop, neighbours in time, on the very engine that the daemon has loaded."""
    count = IMAGES_OF_A_REHEARSAL if rehearsal else IMAGES
    more = {"SAM3_WEIGHTS_PATH": str(weights), "SAM3_DEVICE": "cpu" if rehearsal else "cuda", "MASKD_EMBEDDING_CACHE_MB": "0"}
    config = load_config(settings(dsn, str(folder), MASKD_VISUAL="mock", MASKD_EVERYTHING="mock", **more))
    log.set_up(config.log_level, config.log_format, [])
    daemon = build(config, {"segment_concept": segment_concept})  # type: ignore[dict-item]
    connection = await asyncpg.connect(dsn)
    user, project = await add_owner(connection)
    jpegs(FileBlobs(folder), user, count)
    ours: list[float] = []
    bare: list[float] = []
    async with asyncio.timeout((ROUNDS + 1) * SECONDS_MAX * 4), asyncio.TaskGroup() as tasks:
        tasks.create_task(daemon.run())
        await daemon.ready.wait()
        engine: Any = next(station.models.concept for station in daemon.stations if station.models.concept)
        for number in range(ROUNDS + 1):
            began = time.perf_counter()
            await connection.execute(INSERT, project, user, TEXT, PARAMS, count)
            await all_done(connection, daemon)
            took = time.perf_counter() - began
            loop = await asyncio.to_thread(bare_loop, engine, count)
            if number:  # the first round warms up
                ours.append(count / took)
                bare.append(count / loop)
        daemon.drain()
    await connection.close()
    report.side("rows a second through the daemon", ours, "/s")
    report.side("images a second in the bare loop", bare, "/s")
    if not rehearsal:
        report.at_least("daemon / bare loop", ratios(ours, bare), 0.9)


async def all_done(connection: asyncpg.Connection[Any], daemon: Any) -> None:
    """Return once no row is left, and fail when one of them did not end well."""
    while await connection.fetchval("select exists (select from public.segmentation_results where finished_at is null)"):
        await settled(daemon)
        await asyncio.sleep(0.01)
    assert await connection.fetchval("select count(*) from public.segmentation_results where status <> 'done'") == 0


def bare_loop(engine: Any, count: int) -> float:
    """Seconds for as many images in batches, from arrays that are ready to logits on the CPU."""
    smalls = [engine.shrink(image(number)) for number in range(BATCH)]
    began = time.perf_counter()
    for _ in range(0, count, BATCH):
        engine.find(asks(engine.embed(smalls), 1), never_stop)
    return time.perf_counter() - began


def asks(embeddings: Sequence[Any], texts: int) -> list[ConceptQuestion]:
    """So many texts of each image."""
    prompts = [ConceptPrompt(f"{TEXT} {number}") for number in range(texts)]
    return [ConceptQuestion(embedding, prompt, 0.0, INSTANCES) for embedding in embeddings for prompt in prompts]


def image(number: int) -> Any:
    """A photo of 2 megapixels, a little different for each number."""
    pixels_hwc = np.asarray(Image.fromarray(photo("astronaut")).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return np.roll(pixels_hwc, number * 7, axis=1)


def jpegs(blobs: FileBlobs, user: str, count: int) -> None:
    """The uploads of a user, each a file of its own."""
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(image(number)).save(file, "JPEG", quality=90)
        blobs.put(f"uploads/{user}/{number + 1}.jpg", file.getvalue(), "image/jpeg")


def timed(device: str, call: Callable[[], object]) -> list[float]:
    """Milliseconds of each round after one that warms up, to the end of what the device was told."""
    import torch

    took = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        took.append((time.perf_counter() - began) * 1000)
    return took[1:]
