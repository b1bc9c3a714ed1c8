"""This host's part of a check-up: blobs, sessions, weights, torch and its driver, packages, disk and clock.

Enters: Config. Leaves: lines. Loads no network; whatever it stores to try a store, it deletes.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from daemon.checkup import Check, Line, State, in_thread
from daemon.config import Config
from daemon.engines import CPU_ORDER, GPU_ORDER, NETWORKS, Host
from daemon.main import build_blobs, build_session_store, wanted_kinds
from handlers.registry import discover
from models import torch_device, weights
from models.weights import WeightsError
from storage.base import BlobStore, ConfigurationError, MissingBlobError, UnavailableError

PACKAGES = ("daemon", "handlers", "models", "storage")
PROBE = b"written by maskd doctor, and deleted at once"
BLOB_SECONDS_MAX = 45.0
SESSION_SECONDS_MAX = 15.0
WEIGHTS_SECONDS_MAX = 180.0
TORCH_SECONDS_MAX = 60.0
QUICK_SECONDS_MAX = 15.0
FREE_BYTES_LOW = 1_000_000_000
FREE_BYTES_LEAST = 100_000_000
CARDS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/dxg")
DRIVER = Path("/sys/module/nvidia/version")
TIMEX_BYTES = 512
UNSYNCHRONISED = 5
"""What adjtimex answers where nothing keeps the clock right (TIME_ERROR)."""


def checks(config: Config) -> list[Check]:
    """Every check of this host; what blocks runs on a thread."""

    async def blobs() -> list[Line]:
        return [await in_thread(lambda: blobs_line(build_blobs(config)))]

    async def sessions() -> list[Line]:
        return [await sessions_line(config)]

    async def engines() -> list[Line]:
        return [await in_thread(lambda: weights_line(config))]

    async def torch() -> list[Line]:
        return [await in_thread(lambda: torch_line(config)), await in_thread(torchvision_line)]

    async def others() -> list[Line]:
        owners = await in_thread(importlib.metadata.packages_distributions)
        return [packages_line(owners), await in_thread(lambda: disk_line(config)), host_clock_line()]

    return [
        Check(("blobs",), BLOB_SECONDS_MAX, blobs),
        Check(("sessions",), SESSION_SECONDS_MAX, sessions),
        Check(("weights",), WEIGHTS_SECONDS_MAX, engines),
        Check(("torch", "torchvision"), TORCH_SECONDS_MAX, torch),
        Check(("packages", "disk", "host clock"), QUICK_SECONDS_MAX, others),
    ]


def blobs_line(blobs: BlobStore) -> Line:
    """Whether a blob can be listed, put, read and deleted again, under a key that nothing else has."""
    key = f"masks/maskd-doctor/{uuid.uuid4()}"
    where, begun, doing = blobs.describe(), time.monotonic(), "list"
    try:
        blobs.probe()
        doing = "put"
        blobs.put(key, PROBE, "text/plain")
        doing = "get"
        same = blobs.get(key, len(PROBE)) == PROBE
        doing = "delete"
        blobs.delete([key])
    except (ConfigurationError, UnavailableError, MissingBlobError) as error:
        left = f" {key} is left behind." if doing == "delete" else ""
        advice = f"The daemon lists, puts, gets and deletes: let the token or the user of the folder do all four.{left}"
        reason = "it is not there" if isinstance(error, MissingBlobError) else str(error).rstrip(".")
        return Line("blobs", State.BAD, f"cannot {doing} in {where}: {reason}", advice)
    if not same:
        return Line("blobs", State.BAD, f"{where} gives back other bytes than it got", "Look for what changes them on the way.")
    if _is_deleted(blobs, key):
        return Line("blobs", State.OK, f"{where}; put, get and delete in {(time.monotonic() - begun) * 1000:.0f} ms")
    return Line("blobs", State.WARN, f"{where} still has what was deleted", "A cache in between? maskd must see its own writes.")


async def sessions_line(config: Config) -> Line:
    """Where sessions live, and whether it answers."""
    store = build_session_store(config)
    if config.redis_url is None:
        return Line("sessions", State.OK, "kept in each daemon's memory")
    try:
        begun = time.monotonic()
        await store.open()
        sessions, _ = await store.count()
        return Line("sessions", State.OK, f"{sessions} in Redis, {(time.monotonic() - begun) * 1000:.0f} ms")
    except (UnavailableError, ConfigurationError) as error:
        return Line(
            "sessions", State.BAD, str(error), "Look at MASKD_REDIS_URL and the server; sessions are refused, tasks go on."
        )
    finally:
        await store.close()


def weights_line(config: Config) -> Line:
    """Which engine would serve each role that the kinds of this host need, and what keeps one from it."""
    try:
        host = Host(config)
        kinds = wanted_kinds(discover(), config.kinds)
    except ConfigurationError as error:
        return Line("weights", State.BAD, str(error), "Change that setting, or mend what it needs.")
    needed = {role for handler in kinds.values() for role in handler.ROLES}
    chosen = {role: host.choice(role) for role in GPU_ORDER if role in needed}
    for role, name in chosen.items():
        if name is not None and (fault := _fault_of(host, name)) is not None:
            return Line("weights", State.BAD, f"{role} by {name}: {fault[0]}", fault[1])
    engines = list(dict.fromkeys(name for name in chosen.values() if name is not None))
    parts = [f"{engine} for {', '.join(role for role, name in chosen.items() if name == engine)}" for engine in engines]
    fact = "; ".join(parts) or ("no engine" if chosen else "the kinds of this host need none")
    advice = "`maskd weights list` shows the files; `maskd weights pull` fetches them."
    if partly := [*_incomplete(host.folder)]:
        return Line("weights", State.WARN, f"{fact}; incomplete: {'; '.join(partly)}", advice)
    if lacking := [f"{role} ({CPU_ORDER[role][0]})" for role, name in chosen.items() if name is None]:
        return Line("weights", State.WARN, f"{fact}; none for {', '.join(lacking)}", f"{advice} MASKD_KINDS can do without.")
    return Line("weights", State.OK, fact)


def torch_line(config: Config) -> Line:
    """Torch, CUDA and the driver, as far as this host has them. Torch is imported, which takes seconds, only where it matters."""
    demanded = "cuda" in (config.device, config.sam3_device)
    state = State.BAD if demanded else State.WARN
    if importlib.util.find_spec("torch") is None:
        if demanded or _has_card():
            return Line("torch", state, "not installed, so that no GPU can be used", "Run: make torch")
        return Line("torch", State.OK, "not installed, and there is no NVIDIA card")
    version = importlib.metadata.version("torch")
    try:
        torch_device.require()
    except WeightsError as error:
        if torch_device.broken_torchvision() is None:  # which has a line of its own
            return Line("torch", state, f"torch {version} cannot be used", _sentence(str(error)))
    if not demanded and not _has_card():
        return Line("torch", State.OK, f"torch {version} on the CPU; there is no NVIDIA card")
    if devices := torch_device.cuda_devices():
        driver = f", driver {DRIVER.read_text().strip()}" if DRIVER.is_file() else ""
        return Line("torch", State.OK, f"torch {version}, {', '.join(devices)}{driver}")
    return Line("torch", state, f"torch {version} sees no CUDA device", _sentence(torch_device.why_no_cuda()))


def torchvision_line() -> Line:
    """A torchvision that does not fit its torch breaks whatever imports it, and nothing here needs it."""
    mistake = torch_device.broken_torchvision()
    if mistake is not None:
        fact, _, command = mistake.partition("; run: ")
        return Line("torchvision", State.BAD, fact, f"Run: {command}")
    there = importlib.util.find_spec("torchvision") is not None
    return Line("torchvision", State.OK, "works; it is not needed" if there else "not installed, and not needed")


def packages_line(owners: Mapping[str, Sequence[str]]) -> Line:
    """Whether another distribution brings a package of one of our names. `owners`: distributions by package."""
    clashes = {name: sorted(set(owners.get(name, ())) - {"maskd"}) for name in PACKAGES}
    found = sorted({owner for others in clashes.values() for owner in others})
    if not found:
        return Line("packages", State.OK, f"{', '.join(PACKAGES)} are maskd's alone")
    taken = ", ".join(f"{name} is also of {', '.join(others)}" for name, others in clashes.items() if others)
    advice = f"Run: pip uninstall {' '.join(found)}; or give maskd a virtual environment of its own."
    return Line("packages", State.BAD, taken, advice)


def disk_line(config: Config) -> Line:
    """Room and rights where state, weights and, if local, blobs are written."""
    folders = {"state": config.state_dir, "weights": config.weights_dir} | ({"blobs": config.blob_dir} if config.blob_dir else {})
    free = {}
    for name, folder in folders.items():
        there = next(path for path in _upwards(folder.expanduser().absolute()) if path.is_dir())
        try:
            if name != "weights":  # which a daemon only reads
                tempfile.TemporaryFile(dir=there).close()
            free[name] = shutil.disk_usage(there).free
        except OSError as error:
            advice = f"Give this user the right to write there, or set MASKD_{'BLOB' if name == 'blobs' else 'STATE'}_DIR."
            return Line("disk", State.BAD, f"{there} ({name}) cannot be written to: {error.strerror}", advice)
    return room_line(free)


def room_line(free: Mapping[str, int]) -> Line:
    """Whether there is room; bytes by what they are for."""
    fact = ", ".join(f"{name} {count / 1e9:.1f} GB" for name, count in free.items()) + " free"
    if min(free.values()) >= FREE_BYTES_LOW:
        return Line("disk", State.OK, fact)
    state = State.BAD if min(free.values()) < FREE_BYTES_LEAST else State.WARN
    return Line("disk", state, fact, "Make room, or set MASKD_STATE_DIR, MASKD_WEIGHTS_DIR or MASKD_BLOB_DIR to another disk.")


def host_clock_line() -> Line:
    """Whether something keeps this host's clock right, as the kernel knows it."""
    ask = getattr(ctypes.CDLL(None), "adjtimex", None)
    answer = -1 if ask is None else int(ask(ctypes.create_string_buffer(TIMEX_BYTES)))  # all zero: change nothing
    if answer == UNSYNCHRONISED:
        advice = "Synchronise it (timedatectl set-ntp true, or chrony); in a container that is the host's business."
        return Line("host clock", State.WARN, "the kernel says that nothing keeps it right", advice)
    return Line("host clock", State.OK, "synchronised" if answer >= 0 else "the kernel does not tell; see clock")


def _fault_of(host: Host, name: str) -> tuple[str, str] | None:
    """Why an engine that is chosen would not load, and what to do: packages, files, checksums."""
    if name == "mobilesam" and importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed", "Run: pip install onnxruntime"
    networks = {"mobilesam": ("mobile-sam",), **NETWORKS}.get(name, ())
    own = host.config.sam3_weights_path if name == "sam3" else None
    if own is not None and not own.expanduser().exists():
        return f"{own} is not there", "Set SAM3_WEIGHTS_PATH to where the files lie."
    if not host.can(name):
        missing = torch_device.missing() if name in NETWORKS and host.weights(name) is not None else []
        if missing:
            return f"{' and '.join(missing)} not installed", "Run: make torch"
        return "files are missing", _sentence(weights.how_to_get(networks[0], host.folder))
    for network in (weights.network(each) for each in networks):
        if own is None and (damaged := [*_damaged(network, host.folder)]):
            return f"damaged: {', '.join(damaged)}", f"Delete it, then run: maskd weights pull {network.name}"
    return None


def _damaged(network: weights.Network, folder: Path) -> Iterator[str]:
    """The files of a network that are not what their checksum says; reads all of them."""
    for file in network.files:
        if weights.state(folder / network.folder / file.name) is weights.State.DAMAGED:
            yield file.name


def _incomplete(folder: Path) -> Iterator[str]:
    """Networks of which some files are here and others not, as after a fetch that was broken off."""
    for network in weights.NETWORKS:
        needed = [file.name for file in network.files if not file.optional]
        missing = [name for name in needed if not (folder / network.folder / name).is_file()]
        if 0 < len(missing) < len(needed):
            yield f"{network.name} lacks {', '.join(missing)}"


def _is_deleted(blobs: BlobStore, key: str) -> bool:
    try:
        blobs.get(key, len(PROBE))
    except MissingBlobError:
        return True
    return False


def _has_card() -> bool:
    """Whether anything here hints at an NVIDIA card, also in a container, on a Jetson or under WSL."""
    return any(Path(path).exists() for path in CARDS) or shutil.which("nvidia-smi") is not None


def _upwards(path: Path) -> Iterator[Path]:
    yield path
    yield from path.parents


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"
