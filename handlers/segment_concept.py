"""Every instance of a concept: what a text names, or what looks like the examples in some boxes.

Asks for `text_prompt`, or `texts` for several concepts in one image, and `boxes` around examples; `threshold` and
`max_instances` say how many are kept.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from handlers._instances import Facts, Instance, facts_of, result
from handlers._params import Box, Share, Strict, check_text, read
from handlers._prompts import clipped, source_of, view_of
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result
from models.base import ConceptPrompt, ConceptQuestion, ConceptSegmenter, Later, Models, Role, Stop, View

ROLES = frozenset({Role.CONCEPT})
BATCH_MAX = 8
TIMEOUT_FACTOR = 2.0

UNNAMED = "example"
LATIN = ("LATIN", "MODIFIER", "FEMININE", "MASCULINE", "MICRO", "KELVIN", "ANGSTROM", "OHM")
"""How the Unicode names of letters that the text encoder may know begin."""


class Example(Strict):
    """A box around an instance, label 1, or around what is none, label 0."""

    box: Box
    label: Annotated[int, Field(ge=0, le=1)] = 1


def _example(value: Any) -> Any:
    """`[x0, y0, x1, y1]` as `{"box"}`."""
    return {"box": value} if isinstance(value, list | tuple) else value


class ConceptParams(Strict):
    """The kind's `params`."""

    texts: Annotated[list[str], Field(min_length=1, fail_fast=True)] | None = None
    boxes: Annotated[list[Annotated[Example, BeforeValidator(_example)]], Field(fail_fast=True)] | None = None
    box_labels: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(fail_fast=True)] | None = None
    threshold: Share = 0.5
    max_instances: Annotated[int, Field(ge=1)] = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request; no texts at all when only examples say what is wanted."""

    texts: tuple[str, ...]
    examples: tuple[Example, ...]
    threshold: float
    max_instances: int
    places: tuple[int, ...] = ()
    """Of each text, where it stood in `texts`; none where there was only one."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    view: View
    prompts: tuple[ConceptPrompt, ...]
    threshold: float
    max_instances: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Per prompt its instances, best first, still to be enlarged, and who found them."""

    instances: tuple[Later, ...]
    facts: Facts


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(ConceptParams, request.params)
    examples = _examples(params, limits)
    texts = _texts(params, request.text_prompt, limits)
    if not texts and not any(example.label for example in examples):
        raise RejectedError("prompt_invalid", "Say what to look for: set text_prompt, or give boxes around examples.")
    if len(texts) > 1 and examples:
        raise RejectedError("params_invalid", "Boxes beside several texts are ambiguous; give one text, or several tasks.")
    if params.max_instances > limits.instances_max:
        raise RejectedError("params_invalid", f"max_instances may be at most {limits.instances_max}.")
    most = params.max_instances
    warnings: tuple[str, ...] = ()
    share = max(limits.result_masks_max // max(len(texts), 1), 1)
    if share < most:
        warnings = (f"max_instances was lowered to {share}: {len(texts)} texts share {limits.result_masks_max} masks",)
    places = () if params.texts is None or len(params.texts) == 1 else _places(params.texts, texts)
    return Wish(texts, examples, params.threshold, min(most, share), places, warnings)


def inputs(params: Wish) -> Inputs:
    """The source only."""
    return Inputs()


def prepare(job: Job, models: Models) -> Prepared:
    """The image and what to look for; raises RejectedError for a text that is too long or a box outside the image."""
    wish: Wish = job.params
    model = _model(models)
    for text in wish.texts:
        if (tokens := model.tokens(text)) > model.tokens_max:
            raise RejectedError(
                "prompt_invalid", f'"{_short(text)}" has {tokens} tokens and {model.tokens_max} are read; use fewer words.'
            )
    size_wh = source_of(job).size_wh
    boxes_xyxy = tuple(clipped(example.box, size_wh) for example in wish.examples)
    labels = tuple(example.label for example in wish.examples)
    prompts = tuple(ConceptPrompt(text, boxes_xyxy, labels) for text in wish.texts or (None,))
    return Prepared(view_of(job, models, model), prompts, wish.threshold, wish.max_instances)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Embed the images and look for all concepts together."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw every instance; with several texts `object` is the place of the one that it belongs to."""
    wish: Wish = job.params
    instances = [
        Instance(mask, wish.texts[index] if wish.texts else UNNAMED, wish.places[index] if wish.places else None)
        for index, later in enumerate(raw.instances)
        for mask in later()
        if mask.bits.size
    ]
    return result(job, instances, source_of(job).size_wh, raw.facts, threshold=wish.threshold, warnings=wish.warnings)


def _model(models: Models) -> ConceptSegmenter:
    assert models.concept is not None, "the pool holds this kind's roles"
    return models.concept


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    model = _model(models)
    embedded = models.embeddings.get(model, [job.view for job in jobs])
    questions = [
        ConceptQuestion(embedding, prompt, job.threshold, job.max_instances)
        for job, (embedding, _) in zip(jobs, embedded, strict=True)
        for prompt in job.prompts
    ]
    found = iter(model.find(questions, stop))
    return [
        Answer(tuple(next(found) for _ in job.prompts), facts_of(model, cached))
        for job, (_, cached) in zip(jobs, embedded, strict=True)
    ]


def _texts(params: ConceptParams, text_prompt: str | None, limits: Limits) -> tuple[str, ...]:
    """The texts, each once, in order."""
    single = check_text(text_prompt, limits)
    if single is not None and params.texts is not None:
        raise RejectedError("params_invalid", "Give either text_prompt or texts, not both.")
    if params.texts is not None and len(params.texts) > limits.texts_max:
        raise RejectedError("params_invalid", f"There are {len(params.texts)} texts; at most {limits.texts_max} are allowed.")
    texts = [single] if single is not None else [check_text(text, limits) for text in params.texts or ()]
    if None in texts:
        raise RejectedError("prompt_invalid", "One of the texts is empty.")
    for text in texts:
        _check_language(text or "")
    return tuple(dict.fromkeys(text for text in texts if text is not None))


def _places(given: Sequence[str], texts: Sequence[str]) -> tuple[int, ...]:
    stripped = [text.strip() for text in given]
    return tuple(stripped.index(text) for text in texts)


def _check_language(text: str) -> None:
    """Refuse a text in a script that the encoder never saw: it would be answered with nonsense."""
    for letter in text:
        if letter.isalpha() and not unicodedata.name(letter, "").startswith(LATIN):
            raise RejectedError(
                "prompt_language", f'The text encoder reads English, and "{_short(text)}" is not; write the prompt in English.'
            )


def _examples(params: ConceptParams, limits: Limits) -> tuple[Example, ...]:
    """The boxes with their labels, in either spelling."""
    examples = params.boxes or []
    if len(examples) > limits.objects_max:
        raise RejectedError("params_invalid", f"There are {len(examples)} boxes; at most {limits.objects_max} are allowed.")
    if params.box_labels is None:
        return tuple(examples)
    if len(params.box_labels) != len(examples):
        raise RejectedError("params_invalid", "box_labels needs one label for each of boxes.")
    return tuple(Example(box=example.box, label=label) for example, label in zip(examples, params.box_labels, strict=True))


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"
