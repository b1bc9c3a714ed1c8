"""LaMa over small networks as TorchScript and as ONNX files, loaded by the production code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import never_stop
from support.inpaint_checkpoints import (
    needs_onnx,
    needs_torch,
    onnx_file,
    save_onnx,
    save_script,
    script,
    small_lama,
)
from support.photos import photo

from models.base import Hole, ImageHWC, Patch, StoppedError, pack
from models.lama import Lama, load
from models.torch_device import Placement
from models.weights import WeightsError, record, sha256_of

Box = tuple[int, int, int, int]
FAR_APART: tuple[Box, ...] = ((0, 0, 9, 7), (560, 20, 580, 60), (30, 370, 60, 400))
"""Three parts of a mask on a photo of 600 x 400; two of them lie at its border, and in one crop."""


def of_script() -> Lama:
    needs_torch()
    return load(script(), Placement(), 1)


def of_onnx(side: int | None, white: float = 255.0) -> Lama:
    needs_onnx()
    return load(onnx_file(side, white), Placement(), 1)


MAKERS: dict[str, Callable[[], Lama]] = {
    "torchscript": of_script,
    "onnx-512": lambda: of_onnx(512),
    "onnx-any": lambda: of_onnx(None),
    "onnx-any-white-1": lambda: of_onnx(None, 1.0),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def ours(request: pytest.FixtureRequest) -> Lama:
    return MAKERS[request.param]()


def hole(image_hwc: ImageHWC, *boxes: Box) -> Hole:
    mask_hw = np.zeros(image_hwc.shape[:2], dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask_hw[y0:y1, x0:x1] = True
    return Hole(image_hwc, pack(mask_hw))


def difference(some: Sequence[Sequence[Patch]], others: Sequence[Sequence[Patch]]) -> int:
    """The largest between patches of the same boxes, in grey levels."""
    assert [[each.box_xyxy for each in own] for own in some] == [[each.box_xyxy for each in own] for own in others]
    pairs = [pair for own, other in zip(some, others, strict=True) for pair in zip(own, other, strict=True)]
    return max(int(np.abs(one.pixels_hwc.astype(int) - two.pixels_hwc).max()) for one, two in pairs)


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path, Placement(), 1)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_patches_cover_the_mask_and_leave_what_is_around_it(ours: Lama) -> None:
    coffee = photo("coffee")
    given = hole(coffee, *FAR_APART)
    [patches] = ours.inpaint([given], never_stop)
    covered = 0
    for each in patches:
        x0, y0, x1, y1 = each.box_xyxy
        assert each.pixels_hwc.dtype == np.uint8
        assert each.pixels_hwc.shape == (y1 - y0, x1 - x0, 3)
        inside_hw = given.mask.window_hw(each.box_xyxy)
        # These networks give back what is not missing: so colours, places and brightness are as they should be.
        assert (each.pixels_hwc[~inside_hw] == coffee[y0:y1, x0:x1][~inside_hw]).all()
        assert (each.pixels_hwc[inside_hw] != coffee[y0:y1, x0:x1][inside_hw]).any()
        covered += int(inside_hw.sum())
    assert covered == given.mask.area


def test_what_was_in_a_hole_has_no_influence(ours: Lama) -> None:
    coffee = photo("coffee")
    spoilt = coffee.copy()
    spoilt[100:150, 200:290] = (255, 0, 255)
    boxes = ((200, 100, 290, 150),)
    assert difference(ours.inpaint([hole(coffee, *boxes)], never_stop), ours.inpaint([hole(spoilt, *boxes)], never_stop)) == 0


@pytest.mark.parametrize("size_hw", [(401, 599), (97, 61), (31, 500), (1, 7), (64, 64)])
def test_any_size_is_painted_at_the_border_too(ours: Lama, size_hw: tuple[int, int]) -> None:
    image_hwc = np.resize(photo("chelsea"), (*size_hw, 3))
    height, width = size_hw
    given = hole(image_hwc, (0, 0, 1, 1), (width - 1, height - 1, width, height))
    [patches] = ours.inpaint([given], never_stop)
    assert sum(int(given.mask.window_hw(each.box_xyxy).sum()) for each in patches) == given.mask.area


def test_a_crop_longer_than_the_network_takes_is_reduced_and_enlarged_again(ours: Lama) -> None:
    small = replace(ours, side_max=256)
    coffee = photo("coffee")
    given = hole(coffee, (100, 100, 400, 300))
    [[one]] = small.inpaint([given], never_stop)
    assert one.box_xyxy == (0, 0, 600, 400)
    assert one.pixels_hwc.shape == (400, 600, 3)
    outside = ~given.mask.window_hw(one.box_xyxy)
    outside[90:310, 90:410] = False
    assert np.abs(one.pixels_hwc.astype(int) - coffee)[outside].mean() < 6


def test_an_image_of_which_nothing_is_left_is_painted(ours: Lama) -> None:
    [[whole]] = ours.inpaint([hole(photo("coffee"), (0, 0, 600, 400))], never_stop)
    assert whole.box_xyxy == (0, 0, 600, 400)


def test_nothing_missing_gives_no_patch(ours: Lama) -> None:
    assert ours.inpaint([hole(photo("coffee"))], never_stop) == [[]]
    assert ours.inpaint([], never_stop) == []


def test_given_images_stay_as_they_are(ours: Lama) -> None:
    image_hwc = photo("chelsea")[:256, :256].copy()
    before = image_hwc.copy()
    ours.inpaint([hole(image_hwc, (0, 0, 200, 200))], never_stop)
    assert (image_hwc == before).all()


def test_holes_of_several_images_together_are_painted_as_alone() -> None:
    alone = of_script()
    sizes: list[int] = []

    def heard(images: Any, missing: Any) -> Any:
        sizes.append(len(images))
        return alone.paint(images, missing)

    together = replace(alone, batch_max=2, paint=heard)
    holes = [
        hole(photo("coffee"), *FAR_APART),
        hole(photo("chelsea"), (0, 0, 40, 20)),
        hole(photo("astronaut"), (90, 50, 99, 99)),
    ]
    answers = together.inpaint(holes, never_stop)
    assert sizes == [1, 2, 1]
    assert difference(answers, [alone.inpaint([each], never_stop)[0] for each in holes]) <= 1


@pytest.mark.parametrize("side", [512, None])
def test_both_ranges_of_an_onnx_file_mean_the_same(side: int | None) -> None:
    holes = [hole(photo("coffee"), *FAR_APART)]
    bright, plain = of_onnx(side), of_onnx(side, 1.0)
    assert (bright.white, plain.white) == (255, 1)
    assert difference(bright.inpaint(holes, never_stop), plain.inpaint(holes, never_stop)) <= 1


def test_it_stops_between_batches(ours: Lama) -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        ours.inpaint([hole(photo("coffee"), *FAR_APART)] * 2, stop)
    assert len(calls) == 3


def test_it_says_what_it_is() -> None:
    torch, onnx = of_script(), of_onnx(512)
    assert (torch.engine, torch.device, torch.square, torch.white) == ("lama", "cpu", None, 1)
    assert torch.model_id == f"big-lama-{sha256_of(script())[:8]}"
    parameters = sum(values.numel() for values in small_lama().parameters())
    assert torch.details() == {"runtime": "torchscript", "precision": "float32", "parameters": parameters}
    assert sum(values.numel() for values in torch.network.parameters()) == parameters
    assert (onnx.network, onnx.square, onnx.side_max, onnx.batch_max) == (None, 512, 512, 1)
    assert onnx.details() == {"runtime": "onnxruntime", "precision": "float32"}


def test_a_network_made_for_one_image_gets_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_torch()
    monkeypatch.setattr("models.lama.BATCH_MAX_CPU", 4)
    file = save_script(small_lama(one_only=True), tmp_path / "big-lama.pt")
    assert (load(script(), Placement(), 1).batch_max, load(file, Placement(), 1).batch_max) == (4, 1)


def test_a_fixed_batch_of_one_is_taken_and_another_refused(tmp_path: Path) -> None:
    needs_onnx()
    assert load(save_onnx(tmp_path / "one.onnx", 64, batch=1), Placement(), 1).square == 64
    assert "neither one square of a fixed side nor one of any size" in refusal(save_onnx(tmp_path / "two.onnx", 64, batch=2))


def test_the_folder_of_the_training_is_refused_with_the_right_file(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "config.yaml").write_text("run_title: b18_ffc075_batch8x15")
    (tmp_path / "models" / "best.ckpt").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "models" / "best.ckpt"):
        assert "take big-lama.pt or lama_fp32.onnx" in refusal(path)


def test_missing_damaged_and_foreign_files_are_refused_in_words(tmp_path: Path) -> None:
    needs_torch()
    needs_onnx()
    import torch

    assert refusal(tmp_path / "big-lama.pt").endswith("is missing")
    torch.save({"state_dict": {}}, tmp_path / "best.pt")
    assert "is no TorchScript file" in refusal(tmp_path / "best.pt")
    (tmp_path / "half.pt").write_bytes(script().read_bytes()[:3000])
    assert "is no TorchScript file" in refusal(tmp_path / "half.pt")
    (tmp_path / "half.onnx").write_bytes(onnx_file(512).read_bytes()[:300])
    assert "is no network that ONNX Runtime can open" in refusal(tmp_path / "half.onnx")
    (tmp_path / "noted.pt").write_bytes(script().read_bytes())
    record(tmp_path / "noted.pt", "0" * 64)
    assert "is damaged or not the file that was fetched" in refusal(tmp_path / "noted.pt")


def test_networks_that_compute_nonsense_are_refused(tmp_path: Path) -> None:
    needs_torch()
    needs_onnx()
    import torch

    damaged = [save_script(small_lama(damaged=True), tmp_path / "nan.pt"), save_onnx(tmp_path / "nan.onnx", 64, damaged=True)]
    for path in damaged:
        assert "computes NaN or infinity" in refusal(path)

    class Halves(torch.nn.Module):
        def forward(self, image, mask):  # type: ignore[no-untyped-def]
            return image[:, :, ::2] * mask[:, :, ::2]

    assert "fails on a grey image" in refusal(save_script(torch.nn.Conv2d(4, 3, 1), tmp_path / "one_input.pt"))
    assert "it is no LaMa" in refusal(save_script(Halves(), tmp_path / "shape.pt"))


def test_an_onnx_file_with_other_inputs_is_refused_with_what_it_takes(tmp_path: Path) -> None:
    needs_onnx()
    import onnx

    described = onnx.load(onnx_file(512))
    del described.graph.input[1]
    described.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((1, 1, 512, 512), dtype=np.float32), "mask"))
    onnx.save(described, tmp_path / "one.onnx")
    assert "it takes image float32 (None, 3, 512, 512); take lama_fp32.onnx" in refusal(tmp_path / "one.onnx")


def test_a_network_that_finds_no_memory_says_so(tmp_path: Path) -> None:
    needs_torch()
    import torch

    class Greedy(torch.nn.Module):
        def forward(self, image, mask):  # type: ignore[no-untyped-def]
            return torch.zeros([1 << 50]).sum() + image + mask

    assert "does not fit on cpu: there is not enough memory" in refusal(save_script(Greedy(), tmp_path / "greedy.pt"))


def test_nan_on_a_photo_is_an_error_and_no_picture() -> None:
    broken = replace(of_script(), paint=lambda images, missing: np.full_like(images, np.nan))
    with pytest.raises(FloatingPointError):
        broken.inpaint([hole(photo("coffee"), (0, 0, 9, 9))], never_stop)


def test_importing_it_loads_neither_torch_nor_onnxruntime_nor_diffusers() -> None:
    program = (
        "import sys, models.lama, models.telea, models.diffusion; print({'torch', 'onnxruntime', 'diffusers'} & {*sys.modules})"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
