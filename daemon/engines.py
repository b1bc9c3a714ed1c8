"""Which engine serves each role on this host, and where: the one that was named, or the best that is there. Only this file
names engines.

Enters: the configuration. Leaves: one `Station` per pool, with its models loaded. Blocking: call it on a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from daemon import metrics
from daemon.config import Config
from daemon.infer import DeviceDiedError
from handlers.base import Handler, roles_in
from models import diffusion, lama, mobile_sam, ort, sam2, sam3, torch_device, weights
from models.base import DeviceLostError, Model, Models, Role
from models.cache import EmbeddingCache
from models.card import Card
from models.classical import Classical
from models.mock import Mock
from models.telea import Telea
from models.torch_device import Placement
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError
from storage.base import ConfigurationError

log = structlog.get_logger(__name__)

MB = 1024 * 1024
SLOW_FACTOR = 5.0
CPU = "cpu"
NETWORKS = {"sam3": ("sam3",), "sam2": ("sam2", "sam2-small"), "lama": ("lama",), "diffusion": ("diffusion",)}
"""The engines in torch, and whose weights each takes, the best first."""
TORCH = tuple(NETWORKS)
LAMA_FOR_ORT = "lama-onnx"
GPU_ORDER = {
    "concept": ("sam3",),
    "visual": ("sam3", "sam2"),
    "everything": ("sam2", "sam3"),
    "inpaint": ("lama",),
    "generate": ("diffusion",),
}
CPU_ORDER = {
    "concept": ("sam3",),
    "visual": ("mobilesam", "sam2", "classical"),
    "everything": ("mobilesam", "sam2", "classical"),
    "inpaint": ("lama", "classical"),
    "generate": ("diffusion",),
}
"""What `auto` takes, the best first, a GPU's before a CPU's. SAM 3 needs most of a minute an image on a CPU: there it is taken
for texts only, which nothing else understands."""


@dataclass(frozen=True, slots=True)
class Station:
    """What a pool is made of: its device, and the engines that it holds, on that device or, where there is none, on the CPU."""

    name: str
    device: str
    models: Models

    @property
    def patience(self) -> float:
        """How much longer than elsewhere work may take here."""
        slow = self.device == CPU and any(self.models.of(role).engine == "sam3" for role in self.models.roles())
        return SLOW_FACTOR if slow else 1.0

    def serves(self, handler: Handler) -> bool:
        """Whether a kind runs here: each of its roles has an engine, and at a GPU one of them is on it."""
        if not self.models.roles() >= handler.ROLES:
            return False
        used = roles_in(handler, self.models.roles())
        return self.device == CPU or any(self.models.of(role).device == self.device for role in used)


def build_stations(config: Config, cache: EmbeddingCache, say: Callable[[str], None] = lambda status: None) -> list[Station]:
    """The stations of the GPUs that have an engine, and last that of the CPU, over one cache of embeddings. `say` hears what is
    being loaded, on this thread.

    Raises ConfigurationError with the command that mends it, where an engine that is wanted cannot be had.
    """
    host = Host(config)
    host.say = say
    cpu = Workshop(host, CPU, CPU)
    cards = [Workshop(host, f"gpu{device.rpartition(':')[2]}", device) for device in host.gpus]
    at_cpu: dict[str, Any] = {}
    at_cards: list[dict[str, Any]] = [{} for _ in cards]
    for role in GPU_ORDER:  # texts first: only then it shows what else that checkpoint can do
        while (name := host.choice(role)) is not None:
            try:
                if not host.on_gpu(name):
                    at_cpu[role] = cpu.engine(role, name)
                else:
                    for card, held in zip(cards, at_cards, strict=True):
                        held[role] = card.engine(role, name)
                break
            except OnlyTextsError:
                if host.named[role] != "auto":
                    raise
                host.only_texts.add(name)
    stations = [
        Station(card.name, card.device, Models(cache, make_room=card.make_room, **(at_cpu | held)))
        for card, held in zip(cards, at_cards, strict=True)
        if held
    ]
    return [*stations, Station(CPU, CPU, Models(cache, **at_cpu))]


def kinds_of(stations: Sequence[Station], handlers: Mapping[str, Handler]) -> dict[str, dict[str, Handler]]:
    """By the name of the station the kinds that it claims: what a GPU serves is left to the GPUs."""
    at_gpus = {kind for kind, handler in handlers.items() for s in stations if s.device != CPU and s.serves(handler)}
    return {
        station.name: {
            kind: handler
            for kind, handler in handlers.items()
            if station.serves(handler) and (station.device != CPU or kind not in at_gpus)
        }
        for station in stations
    }


def describe(stations: Sequence[Station]) -> dict[str, dict[str, Any]]:
    """By role what its engine tells of itself, on the first GPU where there are several."""
    return {str(role): _facts(s.models.of(role)) for s in reversed(stations) for role in sorted(s.models.roles())}


def memories(stations: Sequence[Station], config: Config) -> dict[str, Callable[[], Mapping[str, int]]]:
    """By GPU how its memory is read; one call may block."""
    budget_bytes = None if config.gpu_memory_mb is None else config.gpu_memory_mb * MB
    return {s.name: partial(torch_device.memory, s.device, budget_bytes) for s in stations if s.device.startswith("cuda")}


def show_ready(stations: Sequence[Station]) -> None:
    """The metrics' own list of loaded models."""
    for station in stations:
        for role in station.models.roles():
            model = station.models.of(role)
            metrics.MODEL_READY.labels(station.name, str(role), model.engine, model.device).set(1)


class OnlyTextsError(ConfigurationError):
    """A checkpoint that reads texts and knows no clicks."""


class Host:
    """What there is to choose from."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = config.weights_dir.expanduser()
        self.say: Callable[[str], None] = lambda status: None
        self.only_texts: set[str] = set()
        """Engines that turned out to know no clicks."""
        self.named = {role: str(getattr(config, role)) for role in CPU_ORDER}
        self.gpus = self._gpus()

    def choice(self, role: str) -> str | None:
        """The engine of a role; None where nothing here can serve it."""
        if self.named[role] != "auto":
            return self.named[role]
        if role == "concept" and self.config.sam3_weights_path is not None:
            return "sam3"
        names = [name for name in GPU_ORDER[role] if self.on_gpu(name)]
        names += [name for name in CPU_ORDER[role] if not self.on_gpu(name)]
        return next((name for name in names if name not in self.only_texts and self.can(name)), None)

    def on_gpu(self, name: str) -> bool:
        """Whether an engine runs on a GPU here."""
        if name not in TORCH or not self.gpus or self._device(name) == CPU:
            return False
        return name != "lama" or self.weights(name) is not None  # its ONNX file runs on the CPU

    def weights(self, name: str) -> Path | None:
        """Where the weights of a torch engine lie; None when there are none."""
        if name == "sam3" and self.config.sam3_weights_path is not None:
            return self.config.sam3_weights_path.expanduser()
        there = [weights.found(weights.network(network), self.folder) for network in NETWORKS[name]]
        return next((path for path in there if path is not None), None)

    def lama_for_ort(self) -> Path | None:
        """The folder of LaMa's ONNX file."""
        return weights.found(weights.network(LAMA_FOR_ORT), self.folder)

    def can(self, name: str) -> bool:
        """Whether an engine's files and packages are here; looks at none of them."""
        if name == "lama" and self.lama_for_ort() is not None and ort.available():
            return True
        if name in TORCH:
            lacking = torch_device.missing(*(("diffusers",) if name == "diffusion" else ()))
            return self.weights(name) is not None and not lacking
        if name == "mobilesam":
            return ort.available() and weights.in_place(weights.network("mobile-sam"), self.folder)
        return True

    def _device(self, name: str) -> str:
        return (self.config.sam3_device if name == "sam3" else None) or self.config.device

    def _gpus(self) -> list[str]:
        """The devices to use. torch, which takes seconds to import, is only asked where an engine may need it."""
        devices = {"SAM3_DEVICE": self.config.sam3_device, "MASKD_DEVICE": self.config.device}
        demanded = [setting for setting, device in devices.items() if device == "cuda"]
        wanted = [name for name in TORCH if name in self.named.values() or self.weights(name) is not None]
        if not demanded and all(self._device(name) == CPU for name in wanted):
            return []
        try:
            torch_device.require()
        except WeightsError as error:
            if demanded or any(name in self.named.values() for name in wanted):
                raise ConfigurationError(f"{(demanded or ['sam3 or sam2'])[0]}: {error}") from error
            return []
        there = torch_device.cuda_devices()
        if demanded and not there:
            raise ConfigurationError(f"{demanded[0]}=cuda: {torch_device.why_no_cuda()}; or set {demanded[0]}=cpu")
        asked = there if self.config.gpus == "all" else [f"cuda:{index}" for index in self.config.gpus.split(",")]
        if len(set(asked)) < len(asked):
            raise ConfigurationError(f"MASKD_GPUS={self.config.gpus} names a device twice")
        if missing := [device for device in asked if device not in there]:
            raise ConfigurationError(
                f"MASKD_GPUS={self.config.gpus}: there is no {missing[0]}; there are: {', '.join(there) or '-'}"
            )
        return asked


class Workshop:
    """Makes the engines of one device, each once, and shares out its memory."""

    def __init__(self, host: Host, name: str, device: str) -> None:
        self.name = name
        self.device = device
        self._host = host
        self._made: dict[str, Any] = {}
        budget_mb = host.config.gpu_memory_mb
        self._card = None if device == CPU else Card(device, None if budget_mb is None else budget_mb * MB)

    def engine(self, role: str, name: str) -> Any:
        """The engine of that name for that role."""
        setting = f"MASKD_{role.upper()}"
        key = "telea" if (name, role) == ("classical", "inpaint") else name
        if key not in self._made:
            self._host.say(f"loading {name} for {role} on {self.name}")
            began = time.monotonic()
            try:
                self._made[key] = self._make(name, setting)
            except WeightsError as error:
                raise ConfigurationError(f"{setting}={name}: {error}") from error
            except MemoryError as error:
                raise ConfigurationError(f"{setting}={name} does not fit on {self.device}; raise MASKD_GPU_MEMORY_MB") from error
            except DeviceLostError as error:
                raise DeviceDiedError(f"{self.device} answers nothing any more: {error}") from error
            network = getattr(self._made[key], "network", None)
            if self._card is not None and network is not None:
                self._card.bring([network])
            seconds = time.monotonic() - began
            metrics.LOAD.labels(name).observe(seconds)
            log.info("engine.loaded", **_facts(self._made[key]), seconds=round(seconds, 1))
        if role != "concept" and not getattr(self._made[key], "has_tracker", True):
            raise OnlyTextsError(f"{setting}={name}: this checkpoint reads texts only; name another engine")
        return self._made[key]

    def make_room(self, roles: frozenset[Role], models: Models) -> None:
        """These roles are about to run here: their networks go to the card, others leave it when it is full."""
        if self._card is not None:
            held = [models.of(role) for role in roles]
            networks = [getattr(engine, "network", None) for engine in self._made.values() if engine in held]
            self._card.bring([network for network in networks if network is not None])

    def _make(self, name: str, setting: str) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "classical": Telea if setting == "MASKD_INPAINT" else Classical,
            "mock": Mock,
            "mobilesam": partial(self._mobile_sam, setting),
            "sam2": partial(self._torch, partial(sam2.load, crop_layers=self._host.config.crop_layers), "sam2"),
            "sam3": partial(self._torch, sam3.load, "sam3"),
            "lama": self._lama,
            "diffusion": partial(self._torch, diffusion.load, "diffusion"),
        }
        return makers[name]()

    def _torch(self, load: Callable[[Path, Placement], Any], name: str) -> Any:
        path = self._host.weights(name)
        config = self._host.config
        torch_device.require()
        if path is None and name == "sam3" and config.hf_token is not None:
            log.info("weights.pulling", network=name)
            path = weights.pull_network(name, self._host.folder, token=config.hf_token.get_secret_value())
        if path is None:
            raise WeightsError(weights.how_to_get(name, self._host.folder))
        half = self.device != CPU if config.precision == "auto" else config.precision == "bf16"
        torch_device.use_threads(config.threads())
        engine = load(path, Placement(self.device, half, config.compile))
        if config.compile and hasattr(engine, "warm_up"):
            log.info("engine.warming_up", engine=name, device=self.device)
            engine.warm_up()
        return engine

    def _lama(self) -> Any:
        config, threads = self._host.config, self._host.config.threads()
        for_ort, for_torch = self._host.lama_for_ort(), self._host.weights("lama")
        if for_torch is not None and (for_ort is None or not torch_device.missing()):
            return lama.load(for_torch / lama.SCRIPT_FILE, Placement(self.device), threads)
        if for_ort is None:
            raise WeightsError(weights.how_to_get(LAMA_FOR_ORT, config.weights_dir.expanduser()))
        return lama.load(for_ort / lama.ONNX_FILE, Placement(), threads)

    def _mobile_sam(self, setting: str) -> Any:
        config, folder = self._host.config, self._host.folder
        if not ort.available():
            raise ConfigurationError(
                f"{setting}=mobilesam needs onnxruntime, which is not installed; run: pip install onnxruntime"
            )
        mend = "run: maskd weights pull mobile-sam"
        if not weights.in_place(weights.network("mobile-sam"), folder):
            raise ConfigurationError(f"{setting}=mobilesam needs {ENCODER_FILE} and {DECODER_FILE} in {folder}; {mend}")
        memory = config.state_dir.expanduser()
        try:
            return mobile_sam.load(folder / ENCODER_FILE, folder / DECODER_FILE, config.threads(), config.cpu_runtime, memory)
        except WeightsError as error:
            if config.cpu_runtime != "auto":
                raise ConfigurationError(f"MASKD_CPU_RUNTIME={config.cpu_runtime}: {error}") from error
            raise ConfigurationError(f"{error}; {mend}, or set {setting}=classical") from error


def _facts(model: Model) -> dict[str, Any]:
    """Engine, model and device, and what else an engine tells (precision, parameters, runtime)."""
    facts: dict[str, Any] = {"engine": model.engine, "model_id": model.model_id, "device": model.device}
    return facts | dict(getattr(model, "details", dict)())
