"""Logits as a network draws them: blobs with an uneven edge, whose values fall with the distance from it."""

from __future__ import annotations

import cv2
import numpy as np

from models.framing import Floats

WAVES = (2, 3, 5, 8)


def blob(random: np.random.Generator, side: int, radius: float, centre_xy: tuple[float, float]) -> Floats:
    """How far each cell of a (side, side) square lies inside the edge of a blob, in cells; negative outside."""
    ys, xs = np.mgrid[:side, :side].astype(np.float32) + np.float32(0.5)
    xs, ys = xs - np.float32(centre_xy[0]), ys - np.float32(centre_xy[1])
    angles = np.arctan2(ys, xs)
    edge = np.full_like(angles, radius)
    for wave in WAVES:
        edge += radius * random.uniform(0, 0.25 / wave) * np.cos(wave * angles + np.float32(random.uniform(0, 6.28)))
    return edge - np.hypot(xs, ys) + rough(random, side)


def rough(random: np.random.Generator, side: int) -> Floats:
    """Unevenness of about a cell, smooth over a few cells."""
    noise: Floats = cv2.GaussianBlur(random.standard_normal((side, side), dtype=np.float32), (0, 0), 1.5)
    return noise * np.float32(2.5)
