"""Stable Diffusion for inpainting: words to pixels that go on where the given picture ends (arXiv 2112.10752).

Enters: a folder as the hub keeps a StableDiffusionInpaintPipeline; then pictures with masks and prompts. Leaves: pictures of the
same size. Imports torch and diffusers only when a network is loaded.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.base import Canvas, DeviceLostError, ImageHWC, Progress, Stop
from models.crops import batches
from models.graph import in_short
from models.torch_device import Placement, inference, require
from models.weights import WeightsError, check

INDEX_FILE = "model_index.json"
PIPELINE = "StableDiffusionInpaintPipeline"
NETWORKS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The folders that hold weights, and how their file begins: it is a .safetensors or a .fp16.safetensors."""
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
CHANNELS = 9
"""Of the UNet: noise, what is missing, and the rest of the picture. One of 4 was never shown what is missing."""
SIDES_MULTIPLE = 8
BATCH_MAX, BATCH_MAX_CPU = 4, 1
TRIAL_SIDE, TRIAL_STEPS = 64, 2


@dataclass(frozen=True, slots=True, eq=False)
class Diffusion:
    """Generator; on many threads one after the other, since a pipeline keeps the state of its run. `load` makes one.

    `network` holds all that has weights. `tokens_max` is how much of a prompt is read, its ends included. `tokenizer` only
    counts: the pipeline's own is busy while it generates, and neither may be asked by two threads at once.
    """

    pipeline: Any
    network: Any
    placement: Placement
    model_id: str
    tokens_max: int
    batch_max: int = BATCH_MAX_CPU
    engine: str = "diffusion"
    tokenizer: Any = None
    _turn: threading.Lock = field(default_factory=threading.Lock)
    _counting: threading.Lock = field(default_factory=threading.Lock)

    @property
    def device(self) -> str:
        """Where the networks live, as torch names it."""
        return self.placement.device

    @property
    def side(self) -> int:
        """The side of the pictures that the network was made for, in pixels."""
        return int(self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor)

    def details(self) -> dict[str, Any]:
        """What /health tells besides: precision, and how many parameters there are."""
        parameters = sum(values.numel() for values in self.network.parameters())
        return {"precision": "bfloat16" if self.placement.half else "float32", "parameters": parameters}

    def tokens(self, text: str) -> int:
        """How many tokens a text has, its ends included. Any thread."""
        with self._counting:
            return len(self.tokenizer(text, truncation=False, verbose=False).input_ids)

    def generate(self, pictures: Sequence[Canvas], stop: Stop, progress: Progress) -> list[ImageHWC]:
        """Per picture one of the same size, the same for the same seed within a grey level, alone or beside others.

        Pictures of one size, number of steps and guidance run together. What `stop` raises after a step comes out at once and
        leaves nothing behind. Raises FloatingPointError for NaN.
        """
        keys = [(picture.image_hwc.shape, picture.steps, picture.guidance_scale) for picture in pictures]
        total, before = sum(picture.steps for picture in pictures), 0
        painted: dict[int, ImageHWC] = {}
        for batch in batches(keys, self.batch_max):
            own = [pictures[index] for index in batch]
            steps = sum(picture.steps for picture in own)

            def stepped(share: float, before: int = before, steps: int = steps) -> None:
                stop()
                progress((before + share * steps) / total)

            with self._turn:
                stop()
                painted.update(zip(batch, self._painted(own, stepped), strict=True))
            before += steps
        return [painted[index] for index in range(len(pictures))]

    def _painted(self, pictures: Sequence[Canvas], stepped: Callable[[float], None]) -> list[ImageHWC]:
        """One batch; `stepped` hears after each step how much of it is done, and may raise."""
        import torch

        def after_step(pipeline: Any, index: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            stepped(min((index + 1) / pipeline.num_timesteps, 1.0))  # some schedulers take more steps than were asked for
            return {}

        height, width = pictures[0].image_hwc.shape[:2]
        # Noise of the CPU in float32: the same on every device and in every precision.
        generators = [torch.Generator().manual_seed(picture.seed) for picture in pictures]
        with inference():
            answer = self.pipeline(
                prompt=[picture.prompt for picture in pictures],
                negative_prompt=[picture.negative_prompt for picture in pictures],
                image=[Image.fromarray(picture.image_hwc) for picture in pictures],
                mask_image=[Image.fromarray(picture.mask_hw.astype(np.uint8) * 255) for picture in pictures],
                height=height,  # without these every picture is stretched to the native side
                width=width,
                num_inference_steps=pictures[0].steps,
                guidance_scale=pictures[0].guidance_scale,
                generator=generators,
                latents=self._noise(generators, (height, width)),
                output_type="np",
                callback_on_step_end=after_step,
            )
        if not np.isfinite(answer.images).all():
            raise FloatingPointError("the network computed NaN or infinity")
        return list((answer.images * 255).round().astype(np.uint8))

    def _noise(self, generators: Sequence[Any], size_hw: tuple[int, int]) -> Any:
        """Where each picture starts, (n, channels, height / 8, width / 8)."""
        import torch

        factor = self.pipeline.vae_scale_factor
        shape = (1, self.pipeline.vae.config.latent_channels, size_hw[0] // factor, size_hw[1] // factor)
        noise = torch.cat([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])
        return noise.to(self.placement.device, self.placement.dtype)


def load(path: Path, placement: Placement) -> Diffusion:
    """The engine made of a folder with model_index.json, tried once on a small grey picture. On a CPU it computes in float32
    whatever `placement` says. Nothing is fetched; a safety checker that lies in the folder is not used.

    Raises WeightsError that says what is wrong with which file.
    """
    require()
    if importlib.util.find_spec("diffusers") is None:
        raise WeightsError("diffusers is not installed; run: make torch")
    _check_index(path / INDEX_FILE)
    _check_tokenizer(path / "tokenizer")
    files = {name: _weights_file(path / name, stem) for name, stem in NETWORKS.items()}
    checksum = {name: check(file) for name, file in files.items()}["unet"]
    if not placement.device.startswith("cuda"):
        placement = Placement(placement.device)
    pipeline = _pipeline(path, files)
    tokens_max = min(pipeline.tokenizer.model_max_length, pipeline.text_encoder.config.max_position_embeddings)
    pipeline.tokenizer.model_max_length = tokens_max
    network = _placed(pipeline, placement)
    batch_max = BATCH_MAX_CPU if placement.device == "cpu" else BATCH_MAX
    engine = Diffusion(
        pipeline,
        network,
        placement,
        f"{path.name}-{checksum[:8]}",
        tokens_max,
        batch_max,
        tokenizer=copy.deepcopy(pipeline.tokenizer),
    )
    _try(engine, path)
    return engine


def _check_index(file: Path) -> None:
    """Refuse a folder whose model_index.json is not that of the one pipeline that we know."""
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        kind = described["_class_name"]
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file} cannot be read as the description of a pipeline: {in_short(error)}") from error
    if kind != PIPELINE:
        raise WeightsError(f"{file} describes a {kind}, not a {PIPELINE}")


def _check_tokenizer(folder: Path) -> None:
    """Refuse a folder without a vocabulary: the library would make one up that knows no word."""
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        raise WeightsError(f"{folder} lacks {', or '.join(' and '.join(names) for names in TOKENIZER_FILES)}")


def _weights_file(folder: Path, stem: str) -> Path:
    """The weights in a part's folder, in full precision if they are there."""
    full, half = folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors"
    return half if half.is_file() and not full.is_file() else full


def _pipeline(path: Path, files: dict[str, Path]) -> Any:
    """The pipeline with all its weights, float32 on the CPU."""
    from transformers import CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the import recommends torchvision, which nothing here needs
    try:
        from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, UNet2DConditionModel
        from diffusers.utils import logging as diffusers_logging
    finally:
        logging.set_verbosity(verbosity)
    diffusers_logging.disable_progress_bar()
    classes = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    parts = {name: _part(classes[name], file) for name, file in files.items()}
    if parts["unet"].config.in_channels != CHANNELS:
        raise WeightsError(
            f"{files['unet']} takes {parts['unet'].config.in_channels} channels, not {CHANNELS}: not for inpainting"
        )
    try:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(
            path,
            **parts,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    except Exception as error:  # the libraries' errors have no common parent
        raise WeightsError(f"{path} cannot be loaded as {INDEX_FILE} describes it: {in_short(error)}") from error
    if len(pipeline.tokenizer) > parts["text_encoder"].config.vocab_size:
        raise WeightsError(f"{path / 'tokenizer'} knows more tokens than {files['text_encoder']}: they are not of one model")
    if SIDES_MULTIPLE % pipeline.vae_scale_factor:
        raise WeightsError(f"{files['vae']} makes {pipeline.vae_scale_factor} pixels of one, not {SIDES_MULTIPLE}")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _part(kind: Any, file: Path) -> Any:
    """One network. The libraries fill what a file lacks with noise and go on, so they are asked for what they missed."""
    variant = "fp16" if file.name.endswith(".fp16.safetensors") else None
    try:
        network, report = kind.from_pretrained(
            file.parent,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # as above
        raise WeightsError(f"{file} cannot be loaded as config.json beside it describes it: {in_short(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"{file} lacks {len(missing)} weights, among them {missing[0]}")
    return network


def _placed(pipeline: Any, placement: Placement) -> Any:
    """All that has weights as one module, on its device and in its precision."""
    import torch

    pipeline.vae.enable_slicing()  # pictures are decoded one by one: a batch needs no more memory for it than a single one
    network = torch.nn.ModuleDict({name: getattr(pipeline, name) for name in NETWORKS})
    return network.to(placement.device, placement.dtype).eval().requires_grad_(False)


def _try(engine: Diffusion, path: Path) -> None:
    """Refuse networks that do not fit together or answer with anything but numbers, before a user's picture does."""
    grey_hwc = np.full((TRIAL_SIDE, TRIAL_SIDE, 3), 127, dtype=np.uint8)
    mask_hw = np.zeros((TRIAL_SIDE, TRIAL_SIDE), dtype=np.bool_)
    mask_hw[TRIAL_SIDE // 4 : TRIAL_SIDE // 2] = True
    try:
        engine.generate([Canvas(grey_hwc, mask_hw, "grey", steps=TRIAL_STEPS)], lambda: None, lambda share: None)
    except MemoryError as error:
        raise WeightsError(f"{path} does not fit on {engine.device}: {error}") from error
    except DeviceLostError:
        raise
    except FloatingPointError as error:
        raise WeightsError(f"{path} computes NaN or infinity: some of its weights are damaged") from error
    except Exception as error:  # as above
        raise WeightsError(f"{path} fails on a grey picture: {in_short(error)}") from error
