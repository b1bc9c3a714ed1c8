"""Which of SAM 3's queries answer a question, and their masks.

Enters: scores on the CPU, mask logits on the device. Leaves: logits of the chosen queries on the CPU, then masks at full size.
What is not chosen by its score is never copied nor enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.base import ConceptQuestion, Mask
from models.framing import Frame, mask_of

Tensor = Any
Chosen = npt.NDArray[np.int64]
"""Indexes of queries."""
HALF_MAX = 60000.0
"""A little less than the largest number of half precision."""


def best_queries(scores_q: npt.NDArray[np.float32], question: ConceptQuestion) -> Chosen:
    """Which queries answer a question, best first."""
    best = np.argsort(-scores_q, kind="stable")[: question.max_instances]
    return best[scores_q[best] >= question.threshold]


def gathered(logits: Tensor, chosen: Sequence[tuple[int, Chosen]]) -> list[npt.NDArray[np.float16]]:
    """Per row of logits (n, queries, low, low) the chosen queries' on the CPU, (k, low, low) each: one copy for all of them.

    Half precision keeps the sign, and more of a logit than the threshold can tell.
    """
    import torch

    counts = [len(best) for _, best in chosen]
    rows = torch.from_numpy(np.repeat([row for row, _ in chosen], counts)).to(logits.device)
    queries = torch.from_numpy(np.concatenate([best for _, best in chosen])).to(logits.device)
    halves = logits[rows, queries].clamp(-HALF_MAX, HALF_MAX).to(torch.float16).cpu().numpy()
    return np.split(halves, np.cumsum(counts)[:-1])


def instances(logits_khw: npt.NDArray[np.float16], scores: Sequence[float], frame: Frame, label: str | None) -> list[Mask]:
    """The masks of instances at full resolution, those left out that hold no pixel."""
    masks = (mask_of(own.astype(np.float32), frame, score) for own, score in zip(logits_khw, scores, strict=True))
    return [replace(mask, predicted_iou=None, label=label) for mask in masks if mask.bits.size]
