"""MobileSAM over small files of the real architecture, exported and loaded by the production code."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.checkpoints import SMALL_SIDE, engine, exported, needs_torch, network, save, small_sizes
from support.engines import cached, embedded, everything, segmented
from support.photos import COFFEE_BOX, photo

from models.base import EverythingOptions, ImageHWC, Mask, Prompt, StoppedError, pack
from models.cache import EmbeddingCache
from models.masks import mask_iou, surround
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError

needs_torch()
import torch  # noqa: E402  the tests are skipped without it
from torch.nn import functional  # noqa: E402

from models.export_mobile_sam import MEAN_RGB, STD_RGB, EncoderGraph, MobileSamNetwork, export, load_network  # noqa: E402
from models.mobile_sam import MobileSam, load  # noqa: E402

POINT = Prompt(points_xy=((280, 150),), labels=(1,))
TWO_POINTS = Prompt(points_xy=((280, 150), (500, 350.5)), labels=(1, 0))
BOX = Prompt(box_xyxy=COFFEE_BOX)
BOX_AND_POINT = Prompt(points_xy=((280, 150),), labels=(1,), box_xyxy=COFFEE_BOX)
MASK = Prompt(mask=pack(np.ones((200, 250), dtype=np.bool_), (100, 120)))
MASK_AND_POINT = replace(POINT, mask=MASK.mask)
PROMPTS = [POINT, TWO_POINTS, BOX, BOX_AND_POINT, MASK, MASK_AND_POINT]
ODD_SIZES = [(401, 600), (600, 401), (333, 777), (97, 61), (31, 500)]


@pytest.fixture(scope="module")
def ours() -> MobileSam:
    made: MobileSam = engine()
    return made


@pytest.fixture(scope="module")
def reference() -> MobileSamNetwork:
    return load_network(exported() / "mobile_sam.pt", small_sizes())


def noise(size_hw: tuple[int, int]) -> ImageHWC:
    return np.random.default_rng(3).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def resized(image_hwc: ImageHWC) -> ImageHWC:
    """As segment-anything resizes: the long side to the model's, by Pillow's bilinear filter."""
    from PIL import Image

    height, width = image_hwc.shape[:2]
    scale = SMALL_SIDE / max(height, width)
    size_wh = int(width * scale + 0.5), int(height * scale + 0.5)
    return np.asarray(Image.fromarray(image_hwc).resize(size_wh, Image.Resampling.BILINEAR))


def predicted(net: Any, image_hwc: ImageHWC, points: npt.NDArray[np.float64], labels: list[int]) -> tuple[Any, Any]:
    """What torch says of one object, `points` in pixels of the image: logits at every pixel's place in the padded square,
    (4, h, w), and predicted IoU (4,)."""
    small_hwc = resized(image_hwc)
    (height, width), (inner_h, inner_w) = image_hwc.shape[:2], small_hwc.shape[:2]
    with torch.no_grad():
        x = (torch.tensor(small_hwc).float() - torch.tensor(MEAN_RGB)) / torch.tensor(STD_RGB)
        padded = functional.pad(x.permute(2, 0, 1), (0, SMALL_SIDE - inner_w, 0, SMALL_SIDE - inner_h))
        embedding = net.image_encoder(padded[None])
        coords = torch.tensor(points * [inner_w / width, inner_h / height]).float()[None]
        tokens = net.prompt_encoder.tokens(coords, torch.tensor(labels).float()[None])
        dense = net.prompt_encoder.dense(torch.zeros(1, 1, SMALL_SIDE // 4, SMALL_SIDE // 4), torch.zeros(1))
        places = net.prompt_encoder.pe_layer.grid(SMALL_SIDE // 16)
        low, ious = net.mask_decoder(embedding + dense, places, tokens)
        xs = (torch.arange(width) + 0.5) * inner_w / width / SMALL_SIDE * 2 - 1
        ys = (torch.arange(height) + 0.5) * inner_h / height / SMALL_SIDE * 2 - 1
        places_xy = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)[None]
        full = functional.grid_sample(low, places_xy, padding_mode="border", align_corners=False)
    return full[0].numpy(), ious[0].numpy()


def differing(a: Mask, b: Mask) -> int:
    """Pixels of one and not of the other."""
    everything = surround(a.box_xyxy, b.box_xyxy)
    return int((a.window_hw(everything) != b.window_hw(everything)).sum())


def alike(a: Mask, b: Mask) -> bool:
    return a.predicted_iou == pytest.approx(b.predicted_iou, abs=1e-4) and differing(a, b) <= 1e-3 * a.area


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_the_encoder_is_that_of_torch_at_any_size(ours: MobileSam, reference: MobileSamNetwork, size_hw: tuple[int, int]) -> None:
    small_hwc = torch.tensor(resized(noise(size_hw))).float()
    with torch.no_grad():
        expected = EncoderGraph(reference, small_sizes())(small_hwc).numpy()
    assert np.abs(embedded(ours, noise(size_hw)).data - expected).max() < 1e-3


@pytest.mark.parametrize("size_hw", ODD_SIZES)
@pytest.mark.parametrize("way", ["point", "box"])
def test_masks_are_those_of_torch_through_resizing_and_padding(
    ours: MobileSam, reference: MobileSamNetwork, size_hw: tuple[int, int], way: str
) -> None:
    height, width = size_hw
    x, y = 0.7 * width, 0.4 * height
    points, labels = np.array([[x, y], [0, 0]]), [1, -1]
    prompt = Prompt(points_xy=((x, y),), labels=(1,))
    if way == "box":
        points, labels = np.array([[0.1 * width, 0.2 * height], [x, y]]), [2, 3]
        prompt = Prompt(box_xyxy=(0.1 * width, 0.2 * height, x, y))
    logits, ious = predicted(reference, noise(size_hw), points, labels)
    embedding = embedded(ours, noise(size_hw))
    [[single], [*three]] = (segmented(ours, embedding, [prompt], multimask)[0] for multimask in (False, True))
    expected = [(logits[0], ious[0]), *sorted(zip(logits[1:], ious[1:], strict=True), key=lambda pair: -pair[1])]
    for mask, (logits_hw, iou) in zip([single, *three], expected, strict=True):
        assert mask.score == pytest.approx(min(float(iou), 1), abs=1e-3)
        assert differing(mask, pack(logits_hw > 0)) < 1e-3 * height * width


@pytest.mark.parametrize("multimask", [None, False, True])
def test_prompts_in_one_call_are_answered_as_each_alone(ours: MobileSam, multimask: bool | None) -> None:
    together = replace(ours, contract=replace(ours.contract, objects_max=4))
    embedding = embedded(ours, photo("coffee"))
    prompts = [*PROMPTS, BOX, POINT]
    batched = segmented(together, embedding, prompts, multimask)
    for prompt, found in zip(prompts, batched, strict=True):
        [alone] = segmented(ours, embedding, [prompt], multimask)
        assert len(found) == len(alone) == (3 if multimask else 1)
        assert all(alike(a, b) for a, b in zip(found, alone, strict=True))


def test_a_lone_click_gets_the_best_of_three_and_all_else_the_mask_for_clear_prompts(ours: MobileSam) -> None:
    embedding = embedded(ours, photo("coffee"))
    for prompt in PROMPTS:
        [[auto]] = segmented(ours, embedding, [prompt], None)
        [[single]] = segmented(ours, embedding, [prompt], False)
        [three] = segmented(ours, embedding, [prompt], True)
        assert alike(auto, three[0] if prompt is POINT else single)
        assert [mask.score for mask in three] == sorted((mask.score for mask in three), reverse=True)


def test_every_part_of_a_prompt_counts(ours: MobileSam) -> None:
    embedding = embedded(ours, photo("coffee"))
    found = [segmented(ours, embedding, [prompt], False)[0][0].score for prompt in PROMPTS]
    assert len(set(found)) == len(PROMPTS)


def test_a_kept_embedding_answers_as_a_fresh_one(ours: MobileSam) -> None:
    cache = EmbeddingCache(10_000_000)
    first, second = (cached(cache, ours, "hash", photo("coffee")) for _ in range(2))
    assert (first[1], second[1]) == (False, True)
    [[kept]] = segmented(ours, second[0], [BOX], None)
    [[fresh]] = segmented(ours, embedded(ours, photo("coffee")), [BOX], None)
    assert kept.bits.tobytes() == fresh.bits.tobytes()


def test_an_embedding_is_a_value_that_nobody_changes(ours: MobileSam) -> None:
    embedding = embedded(ours, photo("coffee"))
    assert (embedding.size_hw, embedding.nbytes, embedding.data.flags.writeable) == ((400, 600), 32 * 16 * 16 * 4, False)


def test_one_engine_serves_many_threads(ours: MobileSam) -> None:
    def answer(_: int) -> bytes:
        [[mask]] = segmented(ours, embedded(ours, photo("coffee")), [BOX], None)
        return mask.bits.tobytes()

    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(answer, range(6)))) == 1


def test_everything_is_the_click_of_every_point_of_the_grid(ours: MobileSam) -> None:
    embedding = embedded(ours, photo("coffee"))
    options = EverythingOptions(points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)
    found = everything(ours, embedding, options)
    prompts = [Prompt(points_xy=((x, y),), labels=(1,)) for y in (100, 300) for x in (150, 450)]
    clicked = [mask for masks in segmented(ours, embedding, prompts, True) for mask in masks]
    assert len(found) == len(clicked) == 12
    assert all(any(mask_iou(mask, other) > 0.99 for other in clicked) for mask in found)


def test_work_stops_between_objects_and_between_clicks(ours: MobileSam) -> None:
    embedding = embedded(ours, photo("coffee"))
    works: list[Callable[[Callable[[], None]], object]] = [
        lambda stop: segmented(ours, embedding, [BOX] * 9, None, stop),
        lambda stop: everything(ours, embedding, EverythingOptions(), stop),
    ]
    for work in works:
        asked = []

        def stop(asked: list[int] = asked) -> None:
            asked.append(1)
            if len(asked) == 3:
                raise StoppedError

        with pytest.raises(StoppedError):
            work(stop)


def test_a_normalised_square_is_another_contract_and_the_same_answer(ours: MobileSam, tmp_path: Path) -> None:
    """Other exports leave normalising and padding to the caller."""
    net, encoder = network(small_sizes()), tmp_path / "encoder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.image_encoder,
            (torch.zeros(1, 3, SMALL_SIDE, SMALL_SIDE),),
            str(encoder),
            input_names=["x"],
            output_names=["image_embeddings"],
            opset_version=17,
            dynamo=False,
        )
    other = load(encoder, exported() / DECODER_FILE, 1, "onnxruntime")
    assert (ours.contract.raw, other.contract.raw, other.contract.side) == (True, False, SMALL_SIDE)
    for size_hw in ODD_SIZES:
        assert np.abs(embedded(other, noise(size_hw)).data - embedded(ours, noise(size_hw)).data).max() < 1e-3


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The two files in a folder that may be spoilt, without their checksums."""
    for name in (ENCODER_FILE, DECODER_FILE):
        shutil.copy(exported() / name, tmp_path / name)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(folder / ENCODER_FILE, folder / DECODER_FILE, 1)
    return str(caught.value)


@pytest.mark.parametrize("name", [ENCODER_FILE, DECODER_FILE])
def test_a_truncated_file_is_refused_by_name(files: Path, name: str) -> None:
    data = (files / name).read_bytes()
    (files / name).write_bytes(data[: len(data) // 2])
    assert f"{files / name} is no network that ONNX Runtime can open" in refusal(files)


@pytest.mark.parametrize("name", [ENCODER_FILE, DECODER_FILE])
def test_a_file_that_is_not_what_its_checksum_says_is_refused(files: Path, name: str) -> None:
    shutil.copy(exported() / f"{name}.sha256", files)
    with (files / name).open("ab") as file:
        file.write(b"x")
    assert f"{name} is damaged" in refusal(files)


def test_files_in_each_others_place_are_refused(files: Path) -> None:
    shutil.copy(exported() / ENCODER_FILE, files / DECODER_FILE)
    assert refusal(files).startswith("the decoder is not SAM's: it lacks image_embeddings, point_coords")


@pytest.mark.parametrize(("part", "name"), [("image_encoder.neck.2", ENCODER_FILE), ("mask_decoder.iou_token", DECODER_FILE)])
def test_weights_that_compute_nan_are_refused_at_load(tmp_path: Path, part: str, name: str) -> None:
    net = network(small_sizes())
    with torch.no_grad():
        net.get_submodule(part).weight.fill_(float("nan"))
    export(save(net, tmp_path / "nan.pt"), tmp_path, small_sizes())
    assert f"{name} computes NaN or infinity" in refusal(tmp_path)
