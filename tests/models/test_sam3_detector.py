"""SAM 3's detector as it is mended here, against the library's as it comes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from support.sam3_checkpoints import GRID, SIDE, WIDTH, folder, needs_sam3, one_thread

from models.torch_device import Placement

needs_sam3()
import torch  # noqa: E402  the tests are skipped without it

from models import sam3_detector  # noqa: E402
from models.sam3_checkpoint import networks, read  # noqa: E402


def test_the_mended_head_answers_bit_by_bit_as_the_librarys() -> None:
    plain, mended = (networks(read(folder()), Placement())[0] for _ in range(2))
    sam3_detector.prepare(mended, GRID)
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8))
    features, mask = torch.randn(2, 32, WIDTH, generator=torch.Generator().manual_seed(1)), torch.ones(2, 32, dtype=torch.long)
    with one_thread(), torch.inference_mode():
        data = sam3_detector.look(plain, images)
        maps = sam3_detector.neck(plain.vision_encoder, data, GRID)
        answers = [sam3_detector.answer(each, maps, features, mask) for each in (plain, mended)]
    assert all(torch.equal(its, own) for its, own in zip(*answers, strict=True))


def test_importing_the_engine_loads_no_torch() -> None:
    program = "import sys, models.sam3; print('torch' in sys.modules, 'transformers' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
