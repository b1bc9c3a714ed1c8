"""SAM 2 over small checkpoints in the hub's layout, loaded by the production code and held against the library's own classes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.kinds import never_stop
from support.photos import photo
from support.sam2_checkpoints import SIDE, checkpoint, engine, needs_transformers, network, save

from models.amg import crop_boxes, grid
from models.base import Embedding, EverythingOptions, ImageHWC, Mask, Prompt, StoppedError, VisualQuestion, pack
from models.cache import EmbeddingCache
from models.masks import mask_iou
from models.weights import WeightsError, record, sha256_of

needs_transformers()
import torch  # noqa: E402  the tests are skipped without it
from torch.nn import functional  # noqa: E402
from transformers import Sam2Model  # noqa: E402

from models.sam2 import Sam2, load  # noqa: E402
from models.torch_device import Placement  # noqa: E402

ODD_SIZES = [(401, 600), (97, 61), (31, 500), (128, 128), (1, 7)]
ALL = EverythingOptions(points_per_side=5, pred_iou_thresh=0.9, stability_score_thresh=0.85, box_nms_thresh=1)


@pytest.fixture(scope="module")
def ours() -> Sam2:
    made: Sam2 = engine()
    return made


@pytest.fixture(scope="module")
def cropping() -> Sam2:
    made: Sam2 = engine(crop_layers=1)
    return made


@pytest.fixture(scope="module")
def reference() -> Any:
    return Sam2Model.from_pretrained(checkpoint()).eval()


def part(size_hw: tuple[int, int]) -> ImageHWC:
    whole_hwc = np.pad(photo("coffee"), ((0, 200), (0, 100), (0, 0)), mode="wrap")
    return np.ascontiguousarray(whole_hwc[: size_hw[0], : size_hw[1]])


def looked_at(model: Sam2, image_hwc: ImageHWC) -> Embedding:
    [embedding] = model.embed([model.shrink(image_hwc)])
    return embedding


def point_in(size_hw: tuple[int, int]) -> Prompt:
    return Prompt(points_xy=((0.7 * size_hw[1], 0.4 * size_hw[0]),), labels=(1,))


def answer(model: Sam2, embedding: Embedding, prompt: Prompt, multimask: bool | None = None) -> list[Mask]:
    [later] = model.segment([VisualQuestion(embedding, prompt, multimask)], never_stop)
    return later()


def maps_by_the_library(reference: Any, image_hwc: ImageHWC) -> list[Any]:
    """The three maps of an image, prepared as by the library's processor: stretched, over 255, ImageNet's mean and deviation."""
    square = np.asarray(Image.fromarray(image_hwc).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255
    pixels = (square - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    maps: list[Any] = reference.get_image_embeddings(torch.tensor(pixels).permute(2, 0, 1)[None].float())
    return maps


def enlarged_by_the_library(reference: Any, image_hwc: ImageHWC, point_xy: tuple[float, float]) -> tuple[Any, Any]:
    """Logits at full size (3, height, width) and predicted IoU (3,) of one click: interpolated whole, as Meta's code does."""
    size_hw = image_hwc.shape[:2]
    point = torch.tensor([point_xy[0] * SIDE / size_hw[1], point_xy[1] * SIDE / size_hw[0]]).view(1, 1, 1, 2)
    with torch.inference_mode():
        maps = maps_by_the_library(reference, image_hwc)
        found = reference(image_embeddings=maps, input_points=point.float(), multimask_output=True)
        full = functional.interpolate(found.pred_masks[0], size_hw, mode="bilinear", align_corners=False)
    return full[0].numpy(), found.iou_scores[0, 0].numpy()


def alike(a: Mask, b: Mask) -> bool:
    return a.score == pytest.approx(b.score, abs=1e-4) and mask_iou(a, b) >= 0.999


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_maps_are_the_librarys_at_any_size(ours: Sam2, reference: Any, size_hw: tuple[int, int]) -> None:
    found = looked_at(ours, part(size_hw)).data.maps
    expected = maps_by_the_library(reference, part(size_hw))
    assert [level.shape for level in found] == [level.shape for level in expected]
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_masks_are_the_librarys_at_any_size(ours: Sam2, reference: Any, size_hw: tuple[int, int]) -> None:
    prompt = point_in(size_hw)
    full, ious = enlarged_by_the_library(reference, part(size_hw), prompt.points_xy[0])
    order = np.argsort(-ious)
    found = answer(ours, looked_at(ours, part(size_hw)), prompt, True)
    for mask, index in zip(found, order, strict=True):
        assert mask.score == pytest.approx(float(ious[index]), abs=1e-4)
        expected = pack(full[index] > 0)
        assert mask_iou(mask, expected) >= 0.999 or mask.area == expected.area == 0


def test_images_looked_at_together_are_seen_as_each_alone(ours: Sam2) -> None:
    images = [part((60 + 7 * index, 200 - 9 * index)) for index in range(11)]
    together = ours.embed([ours.shrink(image_hwc) for image_hwc in images])
    for image_hwc, embedding in zip(images, together, strict=True):
        alone = looked_at(ours, image_hwc)
        assert embedding.size_hw == alone.size_hw == image_hwc.shape[:2]
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(embedding.data.maps, alone.data.maps, strict=True))


def test_an_embedding_owns_as_many_bytes_as_it_says(ours: Sam2, cropping: Sam2) -> None:
    small = ours.shrink(part((50, 60)))
    embedding = ours.embed([small] * 3)[1]
    held = sum(level.untyped_storage().nbytes() for level in embedding.data.maps)
    assert embedding.nbytes == held == 4 * (4 * 32 * 32 + 8 * 16 * 16 + 32 * 8 * 8)
    assert looked_at(cropping, part((50, 60))).nbytes == held + 4 * SIDE * SIDE * 3


def test_a_kept_embedding_answers_as_a_fresh_one(ours: Sam2) -> None:
    cache, image_hwc = EmbeddingCache(10_000_000), part((300, 200))
    found = [cache.get(ours, [cache.view(ours, "hash", image_hwc)])[0] for _ in range(2)]
    assert [known for _, known in found] == [False, True]
    [kept] = answer(ours, found[1][0], point_in((300, 200)))
    [fresh] = answer(ours, looked_at(ours, image_hwc), point_in((300, 200)))
    assert kept.bits.tobytes() == fresh.bits.tobytes()


def test_one_engine_serves_many_threads(ours: Sam2) -> None:
    def work(index: int) -> tuple[int, bytes]:
        size_hw = (100 + 20 * (index % 3), 150)
        [mask] = answer(ours, looked_at(ours, part(size_hw)), point_in(size_hw))
        return index % 3, mask.bits.tobytes()

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(work, range(24)))) == 3


def test_everything_is_what_filtering_at_full_resolution_finds(ours: Sam2, reference: Any) -> None:
    """Random masks are ragged, and 32 cells tell little of an edge: the threshold of stability lies where few are near it."""
    image_hwc, options = part((151, 201)), replace(ALL, stability_score_thresh=0.5)
    expected = []
    for x, y in grid(options.points_per_side, (151, 201)):
        for full_hw, iou in zip(*enlarged_by_the_library(reference, image_hwc, (x, y)), strict=True):
            stable = (full_hw > 1).sum() / max((full_hw > -1).sum(), 1)
            if iou >= options.pred_iou_thresh and stable >= options.stability_score_thresh:
                expected.append(pack(full_hw > 0))
    found = ours.everything(looked_at(ours, image_hwc), options, never_stop)()
    assert len(expected) > 20
    for ones, others in ((expected, found), (found, expected)):
        matched = [max(mask_iou(one, other) for other in others) >= 0.95 for one in ones]
        assert np.mean(matched) >= 0.95


def test_crops_are_looked_at_as_images_of_their_own(ours: Sam2, cropping: Sam2) -> None:
    """What a crop shows is found where it lies in the image; without suppression it only adds to the whole image's masks."""
    size_hw = (301, 403)
    embedding = looked_at(cropping, part(size_hw))
    whole = cropping.everything(embedding, ALL, never_stop)()
    found = cropping.everything(embedding, ALL, never_stop)()
    expected = list(whole)
    for x0, y0, x1, y1 in crop_boxes(size_hw, 1):
        crop_hwc = np.ascontiguousarray(part(size_hw)[y0:y1, x0:x1])
        for mask in ours.everything(looked_at(ours, crop_hwc), ALL, never_stop)():
            box_xyxy = (mask.box_xyxy[0] + x0, mask.box_xyxy[1] + y0, mask.box_xyxy[2] + x0, mask.box_xyxy[3] + y0)
            edges = zip(box_xyxy, (x0, y0, x1, y1), (0, 0, size_hw[1], size_hw[0]), strict=True)
            if not any(own != outer and abs(edge - own) <= 30 for edge, own, outer in edges):
                expected.append(replace(mask, box_xyxy=box_xyxy))
    assert all(any(alike(mask, other) for other in found) for mask in expected)


def test_an_engine_that_keeps_no_crops_looks_at_the_image_only(ours: Sam2) -> None:
    embedding = looked_at(ours, part((100, 100)))
    one, two = (ours.everything(embedding, replace(ALL, crop_layers=layers), never_stop)() for layers in (None, 2))
    assert [mask.bits.tobytes() for mask in one] == [mask.bits.tobytes() for mask in two]


def test_a_stop_is_heard_before_crops_are_looked_at(cropping: Sam2) -> None:
    embedding = looked_at(cropping, part((100, 100)))
    passes = -(-(ALL.points_per_side**2) // cropping.promptable.objects_max)
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > passes:
            raise StoppedError

    def encode(pixels: Any) -> Any:
        pytest.fail("the crops were looked at")

    with pytest.raises(StoppedError):
        replace(cropping, encode=encode).everything(embedding, replace(ALL, crop_layers=1), stop)


def test_the_hubs_video_checkpoints_answer_as_the_image_model_does(ours: Sam2) -> None:
    video = load(checkpoint(video=True), Placement())
    assert json.loads((checkpoint(video=True) / "config.json").read_text())["model_type"] == "sam2_video"
    [mask], [other] = (answer(model, looked_at(model, part((300, 200))), point_in((300, 200))) for model in (ours, video))
    assert (mask.bits.tobytes(), mask.score) == (other.bits.tobytes(), other.score)
    assert video.model_id != ours.model_id


def test_it_says_who_it_is(ours: Sam2) -> None:
    checksum = sha256_of(checkpoint() / "model.safetensors")
    assert (ours.engine, ours.device, ours.model_id) == ("sam2", "cpu", f"sam2-small-{checksum[:8]}")


def test_a_compiled_network_is_given_few_counts_of_images(ours: Sam2) -> None:
    counts = []

    def encode(pixels: Any) -> Any:
        counts.append(len(pixels))
        return ours.encode(pixels)

    compiled = replace(ours, encode=encode, placement=Placement(compiled=True))
    compiled.warm_up()
    assert counts == [1, 2, 4, 8]
    small = compiled.shrink(part((50, 60)))
    assert [len(compiled.embed([small] * count)) for count in (3, 8, 11)] == [3, 8, 11]
    assert counts[4:] == [4, 8, 8, 4]


def test_importing_it_loads_no_neural_network_library() -> None:
    program = "import sys, models.sam2; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint that may be spoilt."""
    return Path(shutil.copytree(checkpoint(), tmp_path / "sam2"))


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(folder, Placement())
    return str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_refused_by_name(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"{folder / name} is missing"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5])
def test_truncated_weights_are_refused_by_name(folder: Path, share: float) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    assert refusal(folder).startswith(f"{folder / 'model.safetensors'} cannot be loaded")


def test_weights_that_are_not_what_their_checksum_says_are_refused(folder: Path) -> None:
    record(folder / "model.safetensors", "0" * 64)
    assert "model.safetensors is damaged" in refusal(folder)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path) -> None:
    made = network()
    del made.mask_decoder.conv_s0
    save(made, folder)
    assert refusal(folder).endswith("model.safetensors lacks 2 weights of SAM 2, among them mask_decoder.conv_s0.bias")


def test_weights_of_other_shapes_are_refused(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["mask_decoder_config"]["mlp_dim"] = 128
    (folder / "config.json").write_text(json.dumps(described))
    assert "model.safetensors cannot be loaded as config.json describes it" in refusal(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", "no"])
def test_a_damaged_description_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json cannot be read as the description of a network" in refusal(folder)


def test_another_network_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "sam"}')
    assert refusal(folder).endswith("config.json describes a network of type sam, not sam2 or sam2_video")


@pytest.mark.parametrize("part_of_it", ["vision_encoder.neck.convs.0", "mask_decoder.iou_token", "prompt_encoder.point_embed"])
def test_weights_that_compute_nan_are_refused(folder: Path, part_of_it: str) -> None:
    made = network()
    with torch.no_grad():
        made.get_submodule(part_of_it).weight.fill_(float("nan"))
    save(made, folder)
    assert refusal(folder).endswith("model.safetensors computes NaN or infinity: its weights are damaged")
