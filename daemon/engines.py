"""Which engine serves each role on this host: the one that was named, or the best that is there. Only this file names engines."""

from __future__ import annotations

from typing import Protocol

import structlog

from daemon.config import Config
from models import mobile_sam, ort
from models.base import EverythingSegmenter, Models, VisualSegmenter
from models.cache import EmbeddingCache
from models.classical import Classical
from models.mock import Mock
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError, in_place, network
from storage.base import ConfigurationError

log = structlog.get_logger(__name__)

MEND = "run: maskd weights pull mobile-sam"


class Engine(VisualSegmenter, EverythingSegmenter, Protocol):
    """What serves both roles that there are so far."""


def build_models(config: Config, cache: EmbeddingCache) -> Models:
    """The engines of the CPU pool, over the one cache of embeddings. `mock` is never chosen by itself.

    Raises ConfigurationError with the command that mends it, where an engine's files are missing or damaged.
    """
    made: dict[str, Engine] = {}

    def engine(setting: str, name: str) -> Engine:
        chosen = best(config) if name == "auto" else name
        if chosen not in made:
            made[chosen] = _made(chosen, setting, config)
            log.info("engine.loaded", engine=chosen, model=made[chosen].model_id, device=made[chosen].device)
        return made[chosen]

    return Models(
        embeddings=cache,
        visual=engine("MASKD_VISUAL", config.visual),
        everything=engine("MASKD_EVERYTHING", config.everything),
    )


def best(config: Config) -> str:
    """What `auto` means here: MobileSAM when it can run, else the engine that needs nothing."""
    there = ort.available() and in_place(network("mobile-sam"), config.weights_dir.expanduser())
    return "mobilesam" if there else "classical"


def _made(name: str, setting: str, config: Config) -> Engine:
    if name == "mobilesam":
        return _mobile_sam(setting, config)
    return Mock() if name == "mock" else Classical()


def _mobile_sam(setting: str, config: Config) -> Engine:
    folder = config.weights_dir.expanduser()
    if not ort.available():
        raise ConfigurationError(f"{setting}=mobilesam needs onnxruntime, which is not installed; run: pip install onnxruntime")
    if not in_place(network("mobile-sam"), folder):
        raise ConfigurationError(f"{setting}=mobilesam needs {ENCODER_FILE} and {DECODER_FILE} in {folder}; {MEND}")
    try:
        return mobile_sam.load(folder / ENCODER_FILE, folder / DECODER_FILE, config.threads())
    except WeightsError as error:
        raise ConfigurationError(f"{error}; {MEND}, or set {setting}=classical") from error
