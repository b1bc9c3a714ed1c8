"""Engines asked directly, as a handler asks them: shrink and embed, answer, enlarge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.base import (
    ConceptPrompt,
    ConceptQuestion,
    Embedding,
    EverythingOptions,
    ImageHWC,
    Mask,
    Prompt,
    Stop,
    View,
    VisualQuestion,
)


def never_stop() -> None:
    """A Stop of work that everybody waits for."""


def embedded(model: Any, image_hwc: ImageHWC) -> Embedding:
    """The embedding of one image."""
    (embedding,) = model.embed([model.shrink(image_hwc)])
    return embedding  # type: ignore[no-any-return]


def cached(cache: Any, model: Any, content_hash: str, image_hwc: ImageHWC, **more: Any) -> tuple[Embedding, bool]:
    """One image asked of a cache."""
    (answer,) = cache.get(model, [View(content_hash, image_hwc)], **more)
    return answer  # type: ignore[no-any-return]


def segmented(
    model: Any, embedding: Embedding, prompts: Sequence[Prompt], multimask: bool | None = None, stop: Stop = never_stop
) -> list[list[Mask]]:
    """Per prompt its masks, all in one call."""
    return [later() for later in model.segment([VisualQuestion(embedding, prompt, multimask) for prompt in prompts], stop)]


def everything(model: Any, embedding: Embedding, options: EverythingOptions, stop: Stop = never_stop) -> list[Mask]:
    """All masks of an image."""
    masks: list[Mask] = model.everything(embedding, options, stop)()
    return masks


def found(
    model: Any, embedding: Embedding, prompts: Sequence[ConceptPrompt], threshold: float = 0.5, stop: Stop = never_stop
) -> list[list[Mask]]:
    """Per prompt its instances, all in one call."""
    return [later() for later in model.find([ConceptQuestion(embedding, prompt, threshold) for prompt in prompts], stop)]
