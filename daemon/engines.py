"""Which engine serves each role on this host: the one that was named, or the best that is there. Only this file names engines."""

from __future__ import annotations

from collections.abc import Callable

from daemon.config import Config
from models.base import Models
from models.cache import EmbeddingCache
from models.classical import Classical
from models.mock import Mock


def build_models(config: Config, cache: EmbeddingCache) -> Models:
    """The engines of the CPU pool, over the one cache of embeddings. `mock` is never chosen by itself."""
    made: dict[str, Classical | Mock] = {}
    makers: dict[str, Callable[[], Classical | Mock]] = {"classical": Classical, "mock": Mock}

    def engine(name: str) -> Classical | Mock:
        chosen = "classical" if name == "auto" else name
        if chosen not in made:
            made[chosen] = makers[chosen]()
        return made[chosen]

    return Models(
        embeddings=cache,
        visual=engine(config.visual),
        everything=engine(config.everything),
    )
