"""SAM 3 on torch: words and examples to every instance, clicks and boxes to one object, and all masks of an image.

Enters: an image, once; then prompts in its pixels. Leaves: masks at full resolution, enlarged inside their box only. Detector and
tracker share one ViT, whose output is all that is kept of an image; text, boxes and clicks are answered from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from models import sam3_detector, torch_device
from models.base import (
    ConceptPrompt,
    ConceptQuestion,
    DeviceLostError,
    Embedding,
    EverythingOptions,
    ImageHWC,
    Later,
    Prompt,
    Stop,
    VisualQuestion,
)
from models.framing import Frame
from models.promptable import Promptable, placed
from models.sam3_checkpoint import networks, read
from models.sam3_detector import Exemplars, Maps
from models.sam3_instances import best_queries, gathered, instances
from models.sam3_text import Texts, load_vocabulary
from models.torch_device import Placement, inference
from models.weights import WeightsError

Tensor = Any
BUCKETS = (1, 2, 4, 8)
"""How many images or prompts a compiled graph takes: one graph each."""
GRAPHS_MAX = 128
IMAGES_MAX = BUCKETS[-1]
PROMPTS_MAX, PROMPTS_MAX_ON_CPU = BUCKETS[-1], 2
"""Prompts in one pass take some hundred megabytes each; a CPU gains nothing by many."""
NO_TEXT = "visual"
"""What the detector reads where there are boxes only, as in Meta's processor."""
NO_BOX = -10

CELLS = 4
"""Cells of a mask per patch of the ViT, a side."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Small:
    """An image as the ViT takes it, uint8 RGB (side, side, 3), and how large it was."""

    size_hw: tuple[int, int]
    image_hwc: ImageHWC


@dataclass(frozen=True, slots=True, eq=False)
class Sam3:
    """ConceptSegmenter, and where the checkpoint has a tracker VisualSegmenter and EverythingSegmenter; `load` makes one. Safe on
    many threads at once: nothing of it changes but its texts, which are locked.

    `network` holds both, what they share once. An embedding's `data` is (patches, width) on the device. `vit` and `head` are the
    detector's two steps, compiled or not.
    """

    network: Any
    detector: Any
    tracker: Any
    clicks: Promptable | None
    texts: Texts
    placement: Placement
    grid: int
    patch: int
    vit: Callable[[Tensor], Tensor]
    head: Callable[..., tuple[Tensor, Tensor]]
    prompts_max: int
    model_id: str
    engine: str = "sam3"

    @property
    def device(self) -> str:
        return self.placement.device

    def details(self) -> dict[str, Any]:
        """Precision and size, for the log and /health."""
        return torch_device.details(self.network, self.placement)

    @property
    def side(self) -> int:
        """Model pixels a side."""
        return self.grid * self.patch

    @property
    def has_tracker(self) -> bool:
        """Whether clicks, boxes around one object and the whole image can be asked for."""
        return self.clicks is not None

    @property
    def tokens_max(self) -> int:
        return self.texts.tokens_max

    def tokens(self, text: str) -> int:
        return self.texts.tokens(text)

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Small:
        """The image stretched to the model's square by Pillow's bilinear filter, as its processor does. Any CPU thread."""
        size_hw = size_hw or (image_hwc.shape[0], image_hwc.shape[1])
        if image_hwc.shape[:2] == (self.side, self.side):
            return Small(size_hw, image_hwc)
        square = Image.fromarray(image_hwc).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return Small(size_hw, np.asarray(square))

    def embed(self, smalls: Sequence[Small]) -> list[Embedding]:
        """What the ViT sees in each image, (patches, width) on the device; at most IMAGES_MAX images in one pass."""
        import torch

        embeddings: list[Embedding] = []
        for first in range(0, len(smalls), IMAGES_MAX):
            together = list(smalls[first : first + IMAGES_MAX])
            given = _filled(together) if self.placement.compiled else together
            with inference():
                images = torch.from_numpy(np.stack([small.image_hwc for small in given])).to(self.device)
                seen = self.vit(images)
                for small, own in zip(together, seen, strict=False):
                    data = own.clone() if len(given) > 1 else own  # alone, it does not keep the others in memory
                    embeddings.append(Embedding(small.size_hw, data, data.numel() * data.element_size()))
        return embeddings

    def find(self, questions: Sequence[ConceptQuestion], stop: Stop) -> list[Later]:
        """Per question all instances, best score first. `score` is the model's for instance and concept, `label` the text.

        Images and prompts go together, at most `prompts_max` in one pass, with `stop()` before each; the maps of an image are
        computed once, and so is what several questions ask alike, whatever their thresholds.
        """
        alike: dict[tuple[int, ConceptPrompt], list[int]] = {}
        for index, question in enumerate(questions):
            alike.setdefault((id(question.embedding), question.prompt), []).append(index)
        answers: list[Later] = [list] * len(questions)
        maps: dict[int, Maps] = {}
        for group in _groups([questions[same[0]] for same in alike.values()], self.prompts_max):
            stop()
            with inference():
                maps = self._necks(group, maps)
                scores, logits = self._answered(group, maps)
                scores_nq = scores.cpu().numpy()
                asked = [(row, index) for row, each in enumerate(group) for index in alike[id(each.embedding), each.prompt]]
                chosen = [(row, best_queries(scores_nq[row], questions[index])) for row, index in asked]
                held = gathered(logits, chosen)
            for (row, index), (_, best), own in zip(asked, chosen, held, strict=True):
                question = questions[index]
                frame = self._frame(question.embedding.size_hw)
                answers[index] = partial(instances, own, scores_nq[row][best].tolist(), frame, question.prompt.text)
        return answers

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """Per question one mask, or three, best first; `score` is the predicted IoU."""
        clicks = self._clicks()
        by_image: dict[int, Maps] = {}
        with inference():
            for question in questions:
                if id(question.embedding) not in by_image:
                    by_image[id(question.embedding)] = self._tracker_maps(question.embedding)
        maps = [by_image[id(question.embedding)] for question in questions]
        return clicks.segment(maps, [question.embedding.size_hw for question in questions], questions, stop)

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """The masks that a grid of single clicks finds, largest first."""
        clicks = self._clicks()
        with inference():
            maps = self._tracker_maps(embedding)
        return clicks.everything(maps, embedding.size_hw, options, stop)

    def warm_up(self) -> None:
        """Compile, where that is asked for, every size of batch that will come, so that no task waits for it: minutes."""
        for count in BUCKETS if self.placement.compiled else ():
            embedding = self.embed([_grey(self.side)] * count)[0]
            prompts = [ConceptPrompt(text=f"{NO_TEXT} {number}") for number in range(count)]
            self.find([ConceptQuestion(embedding, prompt) for prompt in prompts], lambda: None)

    def _clicks(self) -> Promptable:
        assert self.clicks is not None, "this checkpoint has no tracker: ask for concepts only"
        return self.clicks

    def _frame(self, size_hw: tuple[int, int]) -> Frame:
        return Frame(size_hw, (self.side, self.side), self.side, CELLS * self.grid)

    def _neck(self, embedding: Embedding) -> Maps:
        """The detector's maps of one image."""
        return sam3_detector.neck(self.detector.vision_encoder, embedding.data[None], self.grid)

    def _necks(self, group: Sequence[ConceptQuestion], known: Mapping[int, Maps]) -> dict[int, Maps]:
        """The detector's maps of the images in a group, and of no other: each is 110 MB in full precision."""
        embeddings = {id(question.embedding): question.embedding for question in group}
        return {key: known[key] if key in known else self._neck(embedding) for key, embedding in embeddings.items()}

    def _tracker_maps(self, embedding: Embedding) -> Maps:
        """The tracker's maps of one image. The mark that there is no memory belongs to the coarsest of the three, as in Meta's
        predictor; transformers 5.23 adds it to a fourth that it drops."""
        fine, middle, coarse = sam3_detector.neck(self.tracker.vision_encoder, embedding.data[None], self.grid)
        decoder = self.tracker.mask_decoder
        return decoder.conv_s0(fine), decoder.conv_s1(middle), coarse + self.tracker.no_memory_embedding.view(1, -1, 1, 1)

    def _answered(self, group: Sequence[ConceptQuestion], maps: Mapping[int, Maps]) -> tuple[Tensor, Tensor]:
        """Scores (n, queries) and logits (n, queries, low, low) of n questions that go together."""
        boxed = bool(group[0].prompt.boxes_xyxy)
        given = _filled(group) if self.placement.compiled and not boxed else group
        features, mask = self.texts.features([_text(question.prompt) for question in given])
        together = _together([maps[id(question.embedding)] for question in given], views=not self.placement.compiled)
        if boxed:  # their number differs from task to task: a graph for each would be compiled forever
            return sam3_detector.answer(self.detector, together, features, mask, self._exemplars(given))
        scores, logits = self.head(together, features, mask)
        return scores[: len(group)], logits[: len(group)]

    def _exemplars(self, questions: Sequence[ConceptQuestion]) -> Exemplars:
        """The boxes of several questions, filled up to as many as the most has."""
        import torch

        most = max(len(question.prompt.boxes_xyxy) for question in questions)
        boxes = np.zeros((len(questions), most, 4), dtype=np.float32)
        labels = np.full((len(questions), most), NO_BOX, dtype=np.int64)
        for row, question in enumerate(questions):
            prompt, (height, width) = question.prompt, question.embedding.size_hw
            corners = np.array(prompt.boxes_xyxy, dtype=np.float64) / (width, height, width, height)
            boxes[row, : len(corners), :2] = (corners[:, :2] + corners[:, 2:]) / 2
            boxes[row, : len(corners), 2:] = corners[:, 2:] - corners[:, :2]
            labels[row, : len(corners)] = prompt.labels or 1
        return Exemplars(torch.from_numpy(boxes).to(self.device, self.placement.dtype), torch.from_numpy(labels).to(self.device))


def load(path: Path, placement: Placement, vocabulary: Path | None = None, prompts_max: int | None = None) -> Sam3:
    """The engine made of a folder or file, tried once on a grey image. Raises WeightsError that says what is wrong with what.

    `path` is a folder as the hub has it, a safetensors file or Meta's `sam3.pt`; a `config.json` beside the weights counts, else
    the network is built as released. The vocabulary lies beside the weights, or at `vocabulary`, a file or folder.
    """
    torch_device.require()
    import torch

    checkpoint = read(path)
    config = checkpoint.detector_config
    words = load_vocabulary(vocabulary or checkpoint.file.parent, config.text_config.vocab_size)
    with inference():
        detector, tracker = networks(checkpoint, placement)
    backbone = config.vision_config.backbone_config
    grid = backbone.image_size // backbone.patch_size
    sam3_detector.prepare(detector, grid)
    clicks = None
    if tracker is not None:
        clicks = Promptable(placed(tracker, placement), grid * backbone.patch_size, CELLS * grid, placement)

    def encode(ids: Tensor, mask: Tensor) -> Tensor:
        features = detector.get_text_features(input_ids=ids.to(placement.device), attention_mask=mask.to(placement.device))
        return features.pooler_output

    vit, head = _graphs(detector, placement)
    most = prompts_max or (PROMPTS_MAX_ON_CPU if placement.device == "cpu" else PROMPTS_MAX)
    engine = Sam3(
        network=torch.nn.ModuleList([each for each in (detector, tracker) if each is not None]),
        detector=detector,
        tracker=tracker,
        clicks=clicks,
        texts=Texts(words, encode, config.text_config.max_position_embeddings),
        placement=placement,
        grid=grid,
        patch=backbone.patch_size,
        vit=vit,
        head=head,
        prompts_max=min(most, BUCKETS[-1]) if placement.compiled else most,
        model_id=f"sam3-{checkpoint.checksum[:8]}",
    )
    _try(engine, checkpoint.file)
    return engine


def _graphs(detector: Any, placement: Placement) -> tuple[Callable[[Tensor], Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """`look` and `answer` of a detector, each one compiled graph per size of batch if that is asked for."""

    def look(images_nhwc: Tensor) -> Tensor:
        return sam3_detector.look(detector, images_nhwc)

    def answer(maps: Maps, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return sam3_detector.answer(detector, maps, features, mask)

    if not placement.compiled:
        return look, answer
    import torch

    # One graph per size of batch and step, for every card of this process; the default would be used up by two of them.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS_MAX)
    return torch.compile(look, fullgraph=True, dynamic=False), torch.compile(answer, fullgraph=True, dynamic=False)


def _try(engine: Sam3, file: Path) -> None:
    """Refuse a network that answers with anything but numbers, before a user's photo does."""
    try:
        [embedding] = engine.embed([_grey(engine.side)])
        question = ConceptQuestion(embedding, ConceptPrompt(text=NO_TEXT))
        with inference():
            answered = [embedding.data, *engine._answered([question], {id(embedding): engine._neck(embedding)})]
            finite = all(bool(values.isfinite().all()) for values in answered)
        if engine.has_tracker:
            middle = engine.side / 2
            click = VisualQuestion(embedding, Prompt(points_xy=((middle, middle),), labels=(1,)), multimask=True)
            [later] = engine.segment([click], lambda: None)
            finite = finite and all(np.isfinite(mask.score) for mask in later())
    except (MemoryError, DeviceLostError):
        raise
    except Exception as error:  # the library's errors have no common parent
        raise WeightsError(f"{file} fails on an image: {' '.join(str(error).split())[:200]}") from error
    if not finite:
        raise WeightsError(f"{file} computes NaN or infinity: its weights are damaged")


def _grey(side: int) -> Small:
    return Small((side, side), np.full((side, side, 3), 127, dtype=np.uint8))


def _filled(items: Sequence[T]) -> list[T]:
    """The items and the last one again, until they are as many as a compiled graph takes."""
    size = next(size for size in BUCKETS if size >= len(items))
    return [*items, *[items[-1]] * (size - len(items))]


def _groups(questions: Sequence[ConceptQuestion], most: int) -> Iterator[list[ConceptQuestion]]:
    """Questions that go together: with boxes or without, since boxes bring tokens of their own; image by image, so that few
    images' maps are needed at a time."""
    order = {id(question.embedding): place for place, question in reversed(list(enumerate(questions)))}
    for boxed in (False, True):
        alike = [question for question in questions if bool(question.prompt.boxes_xyxy) == boxed]
        alike.sort(key=lambda question: order[id(question.embedding)])
        yield from (alike[first : first + most] for first in range(0, len(alike), most))


def _together(maps: Sequence[Maps], views: bool) -> Maps:
    """The maps of several questions as one batch, with `views` uncopied where all ask about the same image. A compiled graph
    would be compiled anew for a view."""
    import torch

    if views and all(own is maps[0] for own in maps):
        fine, middle, coarse = (level.expand(len(maps), -1, -1, -1) for level in maps[0])
    else:
        fine, middle, coarse = (torch.cat(level) for level in zip(*maps, strict=True))
    return fine, middle, coarse


def _text(prompt: ConceptPrompt) -> str:
    return NO_TEXT if prompt.text is None else prompt.text
