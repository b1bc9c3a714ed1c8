"""Stable Diffusion for inpainting over a small pipeline in the hub's layout, loaded by the production code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.engines import never_stop
from support.inpaint_checkpoints import LENGTH, diffusion_engine, diffusion_folder, needs_diffusers
from support.photos import photo
from support.sam3_checkpoints import save_vocabulary

from models.base import Canvas, ImageHWC, Progress, StoppedError
from models.torch_device import Placement
from models.weights import WeightsError, record, sha256_of

needs_diffusers()
from models.diffusion import Diffusion, load  # noqa: E402  the tests are skipped without the libraries

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def ours() -> Diffusion:
    made: Diffusion = diffusion_engine()
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files, to be spoilt."""
    return Path(shutil.copytree(diffusion_folder(), tmp_path / "copy"))


def picture(prompt: str = "the cup", seed: int = 1, size_hw: tuple[int, int] = (64, 96), **more: Any) -> Canvas:
    height, width = size_hw
    mask_hw = np.zeros(size_hw, dtype=np.bool_)
    mask_hw[height // 4 : height // 2, width // 4 : width // 2] = True
    return Canvas(photo("coffee")[100 : 100 + height, 100 : 100 + width], mask_hw, prompt, seed=seed, **{"steps": 3, **more})


def generated(model: Diffusion, pictures: Sequence[Canvas], heard: Progress = lambda share: None) -> list[ImageHWC]:
    return model.generate(pictures, never_stop, heard)


def difference(one: ImageHWC, two: ImageHWC) -> int:
    assert one.shape == two.shape
    return int(np.abs(one.astype(int) - two).max())


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path, Placement())
    return str(caught.value)


@pytest.mark.parametrize("size_hw", [(64, 96), (72, 8), (128, 128)])
def test_a_picture_keeps_its_size_and_is_no_longer_what_it_was(ours: Diffusion, size_hw: tuple[int, int]) -> None:
    given = picture(size_hw=size_hw)
    before = given.image_hwc.copy()
    [answer] = generated(ours, [given])
    assert (answer.shape, answer.dtype) == ((*size_hw, 3), np.uint8)
    assert difference(answer, before) > 20
    assert (given.image_hwc == before).all()


def test_the_same_seed_gives_the_same_picture_and_another_another(ours: Diffusion) -> None:
    [one], [again], [other] = (generated(ours, [picture(seed=seed)]) for seed in (1, 1, 2))
    assert difference(one, again) == 0
    assert difference(one, other) > 20


def test_prompt_negative_prompt_guidance_mask_and_what_is_around_it_matter(ours: Diffusion) -> None:
    given = picture()
    [usual] = generated(ours, [given])
    elsewhere = replace(given, mask_hw=given.mask_hw[::-1, ::-1].copy())
    lighter = replace(given, image_hwc=255 - given.image_hwc)
    for other in (picture("a the cup"), picture(negative_prompt="cup"), picture(guidance_scale=1.0), elsewhere, lighter):
        assert difference(generated(ours, [other])[0], usual) > 1


def test_what_is_under_the_mask_does_not(ours: Diffusion) -> None:
    given = picture()
    spoilt_hwc = given.image_hwc.copy()
    spoilt_hwc[given.mask_hw] = (255, 0, 255)
    assert difference(*(generated(ours, [each])[0] for each in (given, replace(given, image_hwc=spoilt_hwc)))) == 0


def test_a_picture_beside_others_is_as_alone(ours: Diffusion) -> None:
    pictures = [picture("the cup", 1), picture("a", 2), picture(seed=3, size_hw=(64, 64)), picture("cup", 4), picture("", 5)]
    sizes: list[int] = []
    together = replace(ours, pipeline=Heard(ours.pipeline, sizes), batch_max=3)
    answers = generated(together, pictures)
    assert sizes == [3, 1, 1]
    for answer, each in zip(answers, pictures, strict=True):
        assert difference(answer, generated(ours, [each])[0]) <= 1


def test_steps_and_guidance_of_each_picture_are_its_own(ours: Diffusion) -> None:
    pictures = [picture(), picture(steps=5), picture(guidance_scale=2.0)]
    together = replace(ours, batch_max=4)
    for answer, each in zip(generated(together, pictures), pictures, strict=True):
        assert difference(answer, generated(ours, [each])[0]) <= 1


def test_progress_grows_to_one_over_all_batches(ours: Diffusion) -> None:
    shares: list[float] = []
    generated(replace(ours, batch_max=2), [picture(seed=seed) for seed in range(3)], shares.append)
    assert shares == sorted(shares)
    assert len(shares) >= 6
    assert shares[-1] == pytest.approx(1)
    assert 0 < shares[0] < 0.34


@pytest.mark.parametrize("step", [0, 1, 3])
def test_stop_is_heard_after_each_step_and_leaves_the_pipeline_usable(ours: Diffusion, step: int) -> None:
    [before] = generated(ours, [picture()])
    calls: list[int] = []
    shares: list[float] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == step + 1:
            raise StoppedError

    with pytest.raises(StoppedError):
        ours.generate([picture(steps=10)], stop, shares.append)
    assert (len(calls), len(shares)) == (step + 1, max(step - 1, 0))
    assert difference(generated(ours, [picture()])[0], before) == 0


def test_many_threads_take_turns(ours: Diffusion) -> None:
    alone = [generated(ours, [picture(seed=seed)])[0] for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        answers = list(threads.map(lambda seed: generated(ours, [picture(seed=seed)])[0], range(3)))
    assert [difference(*pair) for pair in zip(answers, alone, strict=True)] == [0, 0, 0]


def test_it_says_what_it_is(ours: Diffusion) -> None:
    assert (ours.engine, ours.device, ours.side) == ("diffusion", "cpu", 128)
    assert ours.model_id == f"small-inpainting-{sha256_of(diffusion_folder() / UNET)[:8]}"
    parts = (ours.pipeline.unet, ours.pipeline.vae, ours.pipeline.text_encoder)
    count = sum(values.numel() for part in parts for values in part.parameters())
    assert ours.details() == {"precision": "float32", "parameters": count}
    assert sum(values.numel() for values in ours.network.parameters()) == count


def test_tokens_are_counted_with_both_ends(ours: Diffusion) -> None:
    assert ours.tokens_max == LENGTH
    assert [ours.tokens(text) for text in ("", "the", "the cup", "cuq")] == [2, 3, 4, 4]
    assert ours.tokens("x " * 100) == 102


def test_tokens_are_counted_on_many_threads_while_pictures_are_made(ours: Diffusion) -> None:
    assert ours.tokenizer is not ours.pipeline.tokenizer
    texts = [f"{'the cup ' * (index % 5)}the" for index in range(200)]
    expected = [ours.tokens(text) for text in texts]
    with ThreadPoolExecutor(4) as threads:
        picture_later = threads.submit(generated, ours, [picture(seed=seed) for seed in range(3)])
        assert list(threads.map(ours.tokens, texts)) == expected
        assert len(picture_later.result()) == 3


def test_half_precision_is_for_gpus_only() -> None:
    engine = load(diffusion_folder(), Placement(half=True))
    assert engine.details()["precision"] == "float32"


def test_the_tokenizer_may_lie_in_two_files_and_the_weights_in_half_precision(folder: Path, ours: Diffusion) -> None:
    from safetensors.torch import load_file, save_file

    tokenizer = folder / "tokenizer"
    (tokenizer / "tokenizer.json").unlink()
    save_vocabulary(tokenizer, "vocab.json")
    for part, file in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        full = folder / part / f"{file}.safetensors"
        halves = {name: values.half() for name, values in load_file(full).items()}
        save_file(halves, folder / part / f"{file}.fp16.safetensors", metadata={"format": "pt"})
        full.unlink()
    other = load(folder, Placement())
    assert other.tokens("the cup") == ours.tokens("the cup")
    assert difference(generated(other, [picture()])[0], generated(ours, [picture()])[0]) < 30


def test_a_safety_checker_in_the_folder_is_left_alone(folder: Path) -> None:
    index = folder / "model_index.json"
    described = json.loads(index.read_text())
    described["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    described["requires_safety_checker"] = True
    index.write_text(json.dumps(described))
    assert load(folder, Placement()).pipeline.safety_checker is None


@pytest.mark.parametrize(
    "file", ["model_index.json", UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert refusal(folder) == f"{folder / file} is missing"


def test_a_missing_scheduler_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")
    assert f"{folder} cannot be loaded as model_index.json describes it" in refusal(folder)


def test_a_missing_or_foreign_vocabulary_is_refused(folder: Path) -> None:
    file = folder / "tokenizer" / "tokenizer.json"
    described = json.loads(file.read_text())
    described["model"]["vocab"] |= {f"word{index}": 1000 + index for index in range(200)}
    file.write_text(json.dumps(described))
    assert "knows more tokens than" in refusal(folder)
    file.unlink()
    assert refusal(folder) == f"{folder / 'tokenizer'} lacks tokenizer.json, or vocab.json and merges.txt"


def test_a_missing_description_of_a_network_is_refused(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    assert "vae/diffusion_pytorch_model.safetensors cannot be loaded as config.json" in refusal(folder)


def test_a_pipeline_that_is_not_for_inpainting_is_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    described = index.read_text()
    index.write_text(described.replace("StableDiffusionInpaintPipeline", "StableDiffusionPipeline"))
    assert refusal(folder) == f"{index} describes a StableDiffusionPipeline, not a StableDiffusionInpaintPipeline"
    index.write_text("[]")
    assert "cannot be read as the description of a pipeline" in refusal(folder)


def test_a_damaged_file_is_refused_by_its_name(folder: Path) -> None:
    file = folder / UNET
    record(file, "0" * 64)
    assert f"{file} is damaged or not the file that was fetched" in refusal(folder)
    file.with_name(file.name + ".sha256").unlink()
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{file} cannot be loaded" in refusal(folder)


def spoilt(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("file", [UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_lacking_weights_are_not_made_up(folder: Path, file: str) -> None:
    spoilt(folder / file, lambda tensors: tensors.pop(sorted(tensors)[-1]))
    assert f"{folder / file} lacks 1 weights" in refusal(folder)


def test_weights_that_compute_nan_are_refused(folder: Path) -> None:
    spoilt(
        folder / "vae/diffusion_pytorch_model.safetensors", lambda tensors: tensors["decoder.conv_out.bias"].fill_(float("nan"))
    )
    assert refusal(folder) == f"{folder} computes NaN or infinity: some of its weights are damaged"


def test_without_diffusers_the_command_is_told(tmp_path: Path) -> None:
    program = "\n".join(
        (
            "import importlib.util, pathlib",
            "real = importlib.util.find_spec",
            "importlib.util.find_spec = lambda name, *more: None if name == 'diffusers' else real(name, *more)",
            "from models import diffusion",
            "from models.torch_device import Placement",
            "try: diffusion.load(pathlib.Path('nowhere'), Placement())",
            "except diffusion.WeightsError as error: print(error)",
        )
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "diffusers is not installed; run: make torch\n"


class Heard:
    """A pipeline that notes how many pictures it is given at once."""

    def __init__(self, real: Any, sizes: list[int]) -> None:
        self.real, self.sizes = real, sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __call__(self, **given: Any) -> Any:
        self.sizes.append(len(given["prompt"]))
        return self.real(**given)
