"""SAM 3 over small files of the real architecture, against the library's own networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from support.kinds import never_stop
from support.photos import COFFEE_BOX, photo
from support.sam3_checkpoints import GRID, QUERIES, SIDE, WIDTH, engine, folder, meta_file, needs_sam3, one_thread

from models.base import (
    ConceptPrompt,
    ConceptQuestion,
    Embedding,
    EverythingOptions,
    ImageHWC,
    Mask,
    Prompt,
    StoppedError,
    VisualQuestion,
    pack,
)
from models.masks import mask_iou
from models.torch_device import Placement

needs_sam3()
import torch  # noqa: E402  the tests are skipped without it
from torch.nn import functional  # noqa: E402
from transformers import CLIPTokenizer, Sam3Model, Sam3TrackerModel  # noqa: E402

from models import sam3_detector  # noqa: E402
from models.sam3 import Sam3, load  # noqa: E402

ODD_SIZES = [(401, 600), (97, 61), (31, 500), (SIDE, SIDE)]
CUP, DOG, THE = (ConceptPrompt(text=text) for text in ("cup", "a dog", "the"))
BOXES = ConceptPrompt(boxes_xyxy=((70, 10, 480, 385), (5.5, 300, 60, 380)), labels=(1, 0))
BOX_AND_TEXT = ConceptPrompt("cup", ((70, 10, 480, 385),), (1,))
POINT = Prompt(points_xy=((280, 150),), labels=(1,))


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def ours() -> Sam3:
    made: Sam3 = engine()
    return made


@cache
def detector() -> Any:
    """The library's own, as it loads it."""
    return Sam3Model.from_pretrained(folder(), local_files_only=True).eval()


@cache
def tracker() -> Any:
    return Sam3TrackerModel.from_pretrained(folder(), local_files_only=True).eval()


def noise(size_hw: tuple[int, int]) -> ImageHWC:
    """Blots of every size, so that masks depend on the place."""
    low = np.random.default_rng(3).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(low).resize(size_hw[::-1], Image.Resampling.BICUBIC))


def seen(model: Sam3, image_hwc: ImageHWC) -> Embedding:
    [embedding] = model.embed([model.shrink(image_hwc)])
    return embedding


def found(model: Sam3, embedding: Embedding, prompt: ConceptPrompt, threshold: float = 0.5) -> list[Mask]:
    [later] = model.find([ConceptQuestion(embedding, prompt, threshold)], never_stop)
    return later()


def pixels(image_hwc: ImageHWC) -> Any:
    """As the library's processor makes them: stretched, -1..1."""
    square = Image.fromarray(image_hwc).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return ((torch.tensor(np.asarray(square)).permute(2, 0, 1).float() / 255 - 0.5) / 0.5)[None]


def said(image_hwc: ImageHWC, prompt: ConceptPrompt) -> tuple[Any, Any]:
    """Scores (queries,) and logits (queries, low, low) of the library's detector, in one call from pixels."""
    tokenizer = CLIPTokenizer.from_pretrained(folder(), local_files_only=True)
    ids = tokenizer(prompt.text or "visual", padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    boxes = {}
    if prompt.boxes_xyxy:
        height, width = image_hwc.shape[:2]
        x0, y0, x1, y1 = (torch.tensor(prompt.boxes_xyxy) / torch.tensor([width, height, width, height])).unbind(-1)
        boxes["input_boxes"] = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)[None]
        boxes["input_boxes_labels"] = torch.tensor([prompt.labels])
    with torch.no_grad():
        answer = detector()(pixel_values=pixels(image_hwc), **ids, **boxes)
    return (answer.pred_logits.sigmoid() * answer.presence_logits.sigmoid())[0], answer.pred_masks[0]


def enlarged(logits_nhw: Any, size_hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Logits interpolated to the whole image, above 0."""
    full = functional.interpolate(logits_nhw[None].float(), size=size_hw, mode="bilinear", align_corners=False)[0]
    return (full > 0).numpy()


def same(a: Sequence[Mask], b: Sequence[Mask], iou_min: float = 0.999) -> bool:
    scores = [mask.score for mask in a], [mask.score for mask in b]
    return np.allclose(*scores, atol=1e-4) and all(mask_iou(x, y) >= iou_min for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prompt", [CUP, DOG, BOXES, BOX_AND_TEXT], ids=["text", "two words", "boxes", "box and text"])
def test_scores_and_logits_are_those_of_the_library(ours: Sam3, prompt: ConceptPrompt) -> None:
    embedding = seen(ours, photo("coffee"))
    with torch.inference_mode():
        scores, logits = ours._answered([ConceptQuestion(embedding, prompt)], {id(embedding): ours._neck(embedding)})
    its_scores, its_logits = said(photo("coffee"), prompt)
    assert (scores[0] - its_scores).abs().max() < 1e-5
    assert (logits[0] - its_logits).abs().max() < 1e-4
    assert its_logits.std() > 1  # else this says little


@pytest.mark.parametrize("size_hw", ODD_SIZES)
@pytest.mark.parametrize("prompt", [CUP, ConceptPrompt(boxes_xyxy=((3, 4, 40, 30),), labels=(1,))], ids=["text", "box"])
def test_masks_are_the_librarys_logits_enlarged_at_any_size(ours: Sam3, size_hw: tuple[int, int], prompt: ConceptPrompt) -> None:
    scores, logits = said(noise(size_hw), prompt)
    order = [int(index) for index in scores.argsort(descending=True) if scores[index] >= 0.5]
    masks = found(ours, seen(ours, noise(size_hw)), prompt)
    assert len(masks) == len(order) > 0
    for mask, index in zip(masks, order, strict=True):
        assert mask.score == pytest.approx(scores[index].item(), abs=1e-5)
        assert mask_iou(mask, pack(enlarged(logits[index : index + 1], size_hw)[0])) >= 0.999


def test_a_mask_says_what_it_is_and_its_box_is_that_of_its_pixels(ours: Sam3) -> None:
    masks = found(ours, seen(ours, photo("coffee")), CUP)
    assert {(mask.label, mask.predicted_iou, mask.stability_score) for mask in masks} == {("cup", None, None)}
    assert all(pack(mask.crop_hw(), mask.box_xyxy[:2]).box_xyxy == mask.box_xyxy for mask in masks)
    assert {mask.label for mask in found(ours, seen(ours, photo("coffee")), BOXES)} == {None}


def test_the_threshold_and_the_most_decide_before_anything_is_enlarged(ours: Sam3) -> None:
    embedding = seen(ours, photo("coffee"))
    everything = found(ours, embedding, CUP, 0)
    assert len(everything) == QUERIES
    assert [mask.score for mask in everything] == sorted((mask.score for mask in everything), reverse=True)
    middle = everything[4].score
    [few, two, none] = ours.find(
        [
            ConceptQuestion(embedding, CUP, middle),
            ConceptQuestion(embedding, CUP, 0, max_instances=2),
            ConceptQuestion(embedding, CUP, 1.01),
        ],
        never_stop,
    )
    assert same(few(), everything[:5], 1)
    assert same(two(), everything[:2], 1)
    assert none() == []


def test_instances_without_a_pixel_are_left_out(ours: Sam3) -> None:
    class Nothing:
        def __call__(self, *given: Any) -> tuple[Any, Any]:
            scores, logits = ours.head(*given)
            logits[:, scores[0].argmax()] = -1
            return scores, logits

    nothing = replace(ours, head=Nothing())
    embedding = seen(ours, photo("coffee"))
    assert same(found(nothing, embedding, CUP), found(ours, embedding, CUP)[1:], 1)


def test_questions_in_one_call_are_answered_as_each_alone(ours: Sam3) -> None:
    together = replace(ours, prompts_max=8)
    embeddings = together.embed([together.shrink(photo("coffee")), together.shrink(photo("chelsea"))])
    prompts = [CUP, BOXES, DOG, BOX_AND_TEXT, THE]
    questions = [ConceptQuestion(embedding, prompt) for prompt in prompts for embedding in embeddings]
    answers = [later() for later in together.find(questions, never_stop)]
    for question, masks in zip(questions, answers, strict=True):
        alone = found(ours, seen(ours, photo("coffee" if question.embedding is embeddings[0] else "chelsea")), question.prompt)
        assert same(masks, alone)
    assert any(answers)


def test_images_in_one_pass_are_seen_as_each_alone(ours: Sam3) -> None:
    images = [photo(name) for name in ("coffee", "chelsea", "astronaut")]
    together = ours.embed([ours.shrink(image) for image in images])
    for image, embedding in zip(images, together, strict=True):
        alone = seen(ours, image)
        assert (embedding.data - alone.data).abs().max() < 1e-4
        assert (embedding.size_hw, alone.size_hw) == (image.shape[:2],) * 2
        assert tuple(embedding.data.shape) == (GRID * GRID, WIDTH)
        assert embedding.nbytes == embedding.data.untyped_storage().nbytes() == GRID * GRID * WIDTH * 4
    assert ours.embed([]) == []


def test_equal_questions_are_computed_once_whatever_their_thresholds(ours: Sam3) -> None:
    passes: list[int] = []

    def head(maps: Any, features: Any, mask: Any) -> tuple[Any, Any]:
        passes.append(len(features))
        return ours.head(maps, features, mask)

    counting = replace(ours, head=head, prompts_max=4)
    first, second = (seen(ours, photo("coffee")) for _ in range(2))
    prompts = [CUP, DOG, CUP, ConceptPrompt(text="cup"), THE, CUP]
    questions = [ConceptQuestion(first, prompt, 0.1 * index) for index, prompt in enumerate(prompts)]
    answers = counting.find([*questions, ConceptQuestion(second, CUP)], never_stop)
    assert passes == [4]  # three of one image, one of the other
    assert len(answers[0]()) >= len(answers[2]()) >= len(answers[5]())


def test_the_neck_is_computed_once_per_image_and_call(ours: Sam3, monkeypatch: pytest.MonkeyPatch) -> None:
    necks: list[object] = []
    neck = sam3_detector.neck
    monkeypatch.setattr(sam3_detector, "neck", lambda *given: necks.append(given[1].data_ptr()) or neck(*given))
    one, other = (seen(ours, photo(name)) for name in ("coffee", "chelsea"))
    prompts = [ConceptPrompt(text=f"cup {number}") for number in range(3)]
    replace(ours, prompts_max=2).find([ConceptQuestion(each, prompt) for prompt in prompts for each in (one, other)], never_stop)
    assert len(necks) == len(set(necks)) == 2
    ours.segment([VisualQuestion(one, POINT), VisualQuestion(one, Prompt(box_xyxy=COFFEE_BOX))], never_stop)
    assert len(necks) == 3


def test_no_questions_get_no_answers(ours: Sam3) -> None:
    assert ours.find([], never_stop) == ours.segment([], never_stop) == []


def test_work_stops_between_passes(ours: Sam3) -> None:
    embedding, asked = seen(ours, photo("coffee")), []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise StoppedError

    questions = [ConceptQuestion(embedding, ConceptPrompt(text=f"cup {number}")) for number in range(3)]
    with pytest.raises(StoppedError):
        ours.find(questions, stop)


def test_too_long_a_text_is_cut_as_the_library_cuts_it(ours: Sam3) -> None:
    long = ConceptPrompt(text="the cup " * 40)
    assert (ours.tokens(long.text or ""), ours.tokens_max) == (82, 32)
    scores, _ = said(photo("coffee"), long)
    masks = found(ours, seen(ours, photo("coffee")), long, 0)
    assert np.allclose([mask.score for mask in masks], scores.sort(descending=True).values, atol=1e-5)


def test_metas_file_answers_as_the_hubs_folder(ours: Sam3) -> None:
    other = load(meta_file(), Placement())
    assert (ours.engine, other.model_id != ours.model_id) == ("sam3", True)
    embeddings = seen(ours, photo("coffee")), seen(other, photo("coffee"))
    assert torch.equal(embeddings[0].data, embeddings[1].data)
    for prompt in (CUP, BOXES):
        assert same(found(ours, embeddings[0], prompt), found(other, embeddings[1], prompt), 1)
    clicked = [
        model.segment([VisualQuestion(own, POINT, True)], never_stop)[0]()
        for model, own in zip((ours, other), embeddings, strict=True)
    ]
    assert same(*clicked, 1)


def test_the_tracker_sees_by_the_detectors_vit_what_it_would_see_by_its_own(ours: Sam3) -> None:
    with torch.inference_mode():
        maps = ours._tracker_maps(seen(ours, photo("coffee")))
        its = tracker().get_image_embeddings(pixels(photo("coffee")))
        # The library marks that there is no memory on a map that it drops; Meta's predictor marks the coarsest that counts.
        its[2] = its[2] + tracker().no_memory_embedding.view(1, -1, 1, 1)
    assert all(torch.equal(own, other) for own, other in zip(maps, its, strict=True))


def test_where_the_library_keeps_three_maps_it_marks_the_same_one(ours: Sam3) -> None:
    """So that the test before this one is about a slip of the library and not of ours."""
    config = tracker().config
    three = type(config)(
        **{**config.to_dict(), "vision_config": {**config.vision_config.to_dict(), "scale_factors": [4.0, 2.0, 1.0]}}
    )
    library = Sam3TrackerModel(three).eval()
    library.load_state_dict({name: values for name, values in tracker().state_dict().items() if "fpn_layers.3" not in name})
    with torch.inference_mode():
        maps = ours._tracker_maps(seen(ours, photo("coffee")))
        its = library.get_image_embeddings(pixels(photo("coffee")))
    assert all(torch.equal(own, other) for own, other in zip(maps, its, strict=True))


@pytest.mark.parametrize("size_hw", ODD_SIZES[:3])
def test_clicks_get_the_librarys_masks(ours: Sam3, size_hw: tuple[int, int]) -> None:
    height, width = size_hw
    embedding = seen(ours, noise(size_hw))
    prompt = Prompt(points_xy=((0.6 * width, 0.4 * height),), labels=(1,))
    [later] = ours.segment([VisualQuestion(embedding, prompt, True)], never_stop)
    with torch.inference_mode():
        point = torch.tensor([[[[0.6 * SIDE, 0.4 * SIDE]]]])
        answer = tracker()(
            image_embeddings=ours._tracker_maps(embedding), input_points=point, input_labels=torch.ones(1, 1, 1, dtype=torch.int)
        )
    order = answer.iou_scores[0, 0].argsort(descending=True)
    wanted = enlarged(answer.pred_masks[0, 0][order], size_hw)
    for mask, index, mask_hw in zip(later(), order, wanted, strict=True):
        assert mask.score == pytest.approx(answer.iou_scores[0, 0, index].item(), abs=1e-5)
        assert mask_iou(mask, pack(mask_hw)) >= 0.999 or (mask.area < 50 and abs(mask.area - mask_hw.sum()) <= 1)


def test_everything_is_every_click_of_a_grid(ours: Sam3) -> None:
    options = EverythingOptions(points_per_side=2, pred_iou_thresh=0.8, stability_score_thresh=0, box_nms_thresh=1)
    embedding = seen(ours, photo("coffee"))
    masks = ours.everything(embedding, options, never_stop)()
    assert [mask.area for mask in masks] == sorted((mask.area for mask in masks), reverse=True)
    prompts = [Prompt(points_xy=((x, y),), labels=(1,)) for y in (100, 300) for x in (150, 450)]
    clicks = ours.segment([VisualQuestion(embedding, prompt, True) for prompt in prompts], never_stop)
    clicked = [mask for later in clicks for mask in later() if mask.score >= 0.8]
    assert len(masks) == len(clicked) > 0
    assert all(any(mask_iou(mask, other) > 0.98 for other in clicked) for mask in masks)


def test_one_engine_serves_many_threads(ours: Sam3) -> None:
    def answer(number: int) -> list[bytes]:
        embedding = seen(ours, photo("coffee"))
        questions = [ConceptQuestion(embedding, prompt) for prompt in (CUP, BOXES, ConceptPrompt(text=f"cup {number % 2}"))]
        return [mask.bits.tobytes() for later in ours.find(questions, never_stop)[:2] for mask in later()]

    with ThreadPoolExecutor(3) as threads:
        assert len({tuple(bits) for bits in threads.map(answer, range(6))}) == 1


def test_half_precision_keeps_prompts_whole_and_answers_alike(ours: Sam3) -> None:
    half = load(folder(), Placement(half=True))
    embedding = seen(half, photo("coffee"))
    assert (embedding.data.dtype, embedding.nbytes) == (torch.bfloat16, GRID * GRID * WIDTH * 2)
    assert half.tracker.prompt_encoder.shared_embedding.positional_embedding.dtype == torch.float32
    scores = [[mask.score for mask in found(model, seen(model, photo("coffee")), BOX_AND_TEXT, 0)] for model in (half, ours)]
    assert np.allclose(*scores, atol=0.1)
    [clicked] = half.segment([VisualQuestion(embedding, POINT)], never_stop)
    [wanted] = ours.segment([VisualQuestion(seen(ours, photo("coffee")), POINT)], never_stop)
    assert clicked()[0].score == pytest.approx(wanted()[0].score, abs=0.05)


def test_compiled_each_step_is_one_graph_and_gives_the_same_answer(ours: Sam3, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fullgraph` raises at the first break; this backend captures like the real one, and compiles nothing."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        run: Callable[..., Any] = graph.forward
        return run

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = load(folder(), Placement(compiled=True), prompts_max=2)
    one, other = (seen(compiled, photo(name)) for name in ("coffee", "chelsea"))
    assert len(graphs) == 2
    for embeddings in ([one], [one, one], [one, other]):
        questions = [ConceptQuestion(each, prompt) for each, prompt in zip(embeddings, (CUP, DOG), strict=False)]
        for later, question in zip(compiled.find(questions, never_stop), questions, strict=True):
            assert same(later(), found(ours, question.embedding, question.prompt))
    assert same(found(compiled, one, BOXES), found(ours, one, BOXES))
    assert len(graphs) == 3  # two prompts of one image are the graph of two images' too
    torch._dynamo.reset()


def test_compiled_batches_are_filled_up_to_a_few_sizes(ours: Sam3, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def record(step: Callable[..., Any], **how: bool) -> Callable[..., Any]:
        assert how == {"fullgraph": True, "dynamic": False}
        return lambda *given: sizes.append(len(given[-1])) or step(*given)

    monkeypatch.setattr(torch, "compile", record)
    compiled = load(folder(), Placement(compiled=True), prompts_max=100)
    sizes.clear()
    compiled.warm_up()
    assert sizes == [1, 1, 2, 2, 4, 4, 8, 8]
    sizes.clear()
    *_, embedding = compiled.embed([compiled.shrink(photo("coffee"))] * 11)
    questions = [ConceptQuestion(embedding, ConceptPrompt(text=f"cup {number}")) for number in range(13)]
    answers = compiled.find([*questions, ConceptQuestion(embedding, BOXES)], never_stop)
    assert sizes == [8, 4, 8, 8]
    assert embedding.nbytes == embedding.data.untyped_storage().nbytes()
    assert same(answers[12](), found(ours, embedding, questions[12].prompt))
