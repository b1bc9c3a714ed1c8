"""Where the networks' files come from: the weights folder, else the hub. Every file has a checksum beside it, and is held to it.

Enters: names of networks and a folder. Leaves: files that are whole. Nothing is fetched unless `pull` is called.
"""

from __future__ import annotations

import enum
import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

ENCODER_FILE = "mobile_sam_image_encoder.onnx"
DECODER_FILE = "sam_mask_decoder_multi.onnx"
CHECKPOINT_FILE = "mobile_sam.pt"
CONNECT_SECONDS = 10.0
ATTEMPTS = 3
"""In a row without a single byte."""
SHA256 = re.compile(r"[0-9a-f]{64}")

Progress = Callable[[int, int | None], None]
"""Hears how many bytes are there, and of how many if that is known."""


class WeightsError(Exception):
    """Weights that cannot be had or used; the message is for the operator."""


class AbsentError(WeightsError):
    """The hub has the repository but no such file."""


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """One file of a network: its name here, its place on the hub, and what is known of it beforehand.

    Where `sha256` is None, the hub's own checksum of the revision counts, if it has one. An `optional` file may be absent there.
    `instead` names the setting that may point to the files, for those that the hub does not give to everyone. What is not on the
    hub says `by_hand` where it is.
    """

    name: str
    repo: str
    revision: str = "main"
    size_bytes: int | None = None
    sha256: str | None = None
    optional: bool = False
    instead: str | None = None
    by_hand: str | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A network whose files can be pulled. `engine` is what the files serve once they are there, if anything at once.

    `folder` is its own inside the weights folder. `megabytes` says about how much there is to fetch.
    """

    name: str
    engine: str | None
    purpose: str
    licence: str
    files: tuple[WeightsFile, ...]
    folder: str = ""
    megabytes: int = 0


MOBILE_SAM_REVISION = "0d3b403339b4674a82493d5e97964dd78089ddc8"
SAM3, SAM2, SAM2_SMALL = "facebook/sam3", "facebook/sam2.1-hiera-large", "facebook/sam2.1-hiera-small"
SAM3_PATH = "SAM3_WEIGHTS_PATH"
SAM3_OPTIONAL = ("tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "processor_config.json")
SAM2_FILES, SAM2_SMALL_FILES = (
    (WeightsFile("config.json", repo), WeightsFile("model.safetensors", repo)) for repo in (SAM2, SAM2_SMALL)
)
LAMA_RELEASE = "https://github.com/Sanster/models/releases/download/add_big_lama/big-lama.pt"
BIG_LAMA = WeightsFile("big-lama.pt", "Sanster/models", by_hand=f"{LAMA_RELEASE} (MD5 e3aa4aaa15225a33ec84f9f4bc47e500)")
LAMA_SHA256 = "1faef5301d78db7dda502fe59966957ec4b79dd64e16f03ed96913c7a4eb68d6"
LAMA_ONNX = WeightsFile("lama_fp32.onnx", "Carve/LaMa-ONNX", size_bytes=208_044_816, sha256=LAMA_SHA256)
DIFFUSION = "sd2-community/stable-diffusion-2-inpainting"
DIFFUSION_FILES = tuple(
    WeightsFile(name, DIFFUSION, optional=name.startswith("tokenizer/"))  # in one of two forms
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer.json",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "text_encoder/config.json",
        "unet/config.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    )
)
# Since small files come first, what is missing there is known before gigabytes are fetched.
NETWORKS = (
    Network(
        "mobile-sam",
        "mobilesam",
        "visual, everything",
        "Apache-2.0",
        (
            WeightsFile(
                ENCODER_FILE,
                "Acly/MobileSAM",
                MOBILE_SAM_REVISION,
                28_157_093,
                "580f5fb648ea1062c0aabc26217aed56921985f03f0cbbd852bba81d760cc749",
            ),
            WeightsFile(DECODER_FILE, "Acly/MobileSAM", MOBILE_SAM_REVISION),
        ),
        megabytes=45,
    ),
    Network(
        "sam3",
        "sam3",
        "concept, visual, everything",
        "SAM, gated",
        (
            WeightsFile("config.json", SAM3, instead=SAM3_PATH),
            WeightsFile("tokenizer.json", SAM3, instead=SAM3_PATH),
            *(WeightsFile(name, SAM3, optional=True, instead=SAM3_PATH) for name in SAM3_OPTIONAL),
            WeightsFile("model.safetensors", SAM3, instead=SAM3_PATH),
        ),
        folder="sam3",
        megabytes=3440,
    ),
    Network("sam2", "sam2", "visual, everything", "Apache-2.0", SAM2_FILES, folder="sam2", megabytes=898),
    Network("sam2-small", "sam2", "visual, everything", "Apache-2.0", SAM2_SMALL_FILES, folder="sam2-small", megabytes=184),
    Network(
        "mobile-sam-checkpoint",
        None,
        "weights export",
        "Apache-2.0",
        (
            WeightsFile(
                CHECKPOINT_FILE, "dhkim2810/MobileSAM", sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
            ),
        ),
        megabytes=41,
    ),
    Network("lama", "lama", "inpaint", "Apache-2.0", (BIG_LAMA,), folder="lama", megabytes=206),
    Network("lama-onnx", "lama", "inpaint", "Apache-2.0", (LAMA_ONNX,), folder="lama", megabytes=208),
    Network("diffusion", "diffusion", "generate", "OpenRAIL++-M", DIFFUSION_FILES, folder="diffusion", megabytes=5160),
)


@dataclass(frozen=True, slots=True)
class Facts:
    """What the hub says of a file: where it lies, what that place wants to hear, its size, its checksum or version."""

    location: str
    headers: dict[str, str]
    size: int | None
    etag: str


class State(enum.StrEnum):
    """What there is of a file in the folder."""

    MISSING = "missing"
    WHOLE = "in place"
    UNCHECKED = "in place, without a checksum"
    DAMAGED = "damaged"


def network(name: str) -> Network:
    """The network of that name. Raises WeightsError that names those there are."""
    for each in NETWORKS:
        if each.name == name:
            return each
    raise WeightsError(f"there is no network {name}; there are: {', '.join(each.name for each in NETWORKS)}")


def found(wanted: Network, folder: Path) -> Path | None:
    """Where in the weights folder a network's files lie, whole or not; None unless all that it needs are there."""
    own = folder / wanted.folder
    return own if all((own / file.name).is_file() for file in wanted.files if not file.optional) else None


def in_place(wanted: Network, folder: Path) -> bool:
    """Whether every file that a network needs lies in the weights folder, whole or not."""
    return found(wanted, folder) is not None


def how_to_get(name: str, folder: Path) -> str:
    """What to tell an operator whose weights folder lacks a network."""
    wanted = network(name)
    first = wanted.files[0]
    if first.by_hand is not None:
        return _where(first, folder / wanted.folder)
    missing = f"{name} has no weights in {folder / wanted.folder}; run: maskd weights pull {name}"
    repo, instead = first.repo, first.instead
    return missing if instead is None else f"{missing} (after this: {_access(repo)}), or set {instead} to where the files lie"


def state(path: Path) -> State:
    """What there is of a file; reads all of it."""
    if not path.is_file():
        return State.MISSING
    wanted = noted(path)
    if wanted is None:
        return State.UNCHECKED
    return State.WHOLE if sha256_of(path) == wanted else State.DAMAGED


def check(path: Path) -> str:
    """The SHA-256 of a file that is what its checksum says, or has none. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    found, wanted = sha256_of(path), noted(path)
    if wanted is not None and found != wanted:
        raise WeightsError(f"{path} is damaged or not the file that was fetched: SHA-256 {found}, not {wanted}")
    return found


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def noted(path: Path) -> str | None:
    """The checksum beside a file; None when there is none."""
    note = _note_of(path)
    found = SHA256.match(note.read_text(encoding="ascii", errors="replace")) if note.is_file() else None
    return None if found is None else found.group()


def record(path: Path, sha256: str) -> None:
    """Note a file's checksum beside it, as `sha256sum -c` reads it."""
    _note_of(path).write_text(f"{sha256}  {path.name}\n", encoding="ascii")


def pull_network(
    name: str,
    folder: Path,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    progress: Callable[[str, int, int | None], None] = lambda file, done, total: None,
) -> Path:
    """The folder with all files of a network, fetched into the weights folder unless they are there; `progress` hears the name
    of each and as `Progress` what is there of it. Raises WeightsError."""
    wanted = network(name)
    own = folder / wanted.folder
    for file in wanted.files:
        try:
            pull(file, own, token=token, endpoint=endpoint, progress=partial(progress, file.name))
        except AbsentError:
            if not file.optional:
                raise
    return own


def pull(
    file: WeightsFile,
    folder: Path,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    seconds_max: float | None = None,
    progress: Progress = lambda done, total: None,
) -> Path:
    """The file in the folder, fetched unless it is there; what an earlier try left unfinished is gone on with.

    Raises WeightsError when the hub cannot be reached or refuses, the time is over, or the checksum is wrong.
    """
    path = folder / file.name
    there = state(path)
    if (there is State.WHOLE and file.sha256 in (None, noted(path))) or (there is State.UNCHECKED and file.by_hand is not None):
        return path
    if file.by_hand is not None:
        raise WeightsError(_where(file, folder))
    until = None if seconds_max is None else time.monotonic() + seconds_max
    try:
        facts = _metadata(file, token, endpoint, until)
        part = _fetched(file, folder, facts, until, progress)
    except WeightsError:
        raise
    except Exception as error:  # the client raises errors of its own, of the transport and of the system
        raise _refusal(file, error) from error
    wanted = file.sha256 or (facts.etag if SHA256.fullmatch(facts.etag) else None)
    found = sha256_of(part)
    if wanted is not None and found != wanted:
        part.unlink()
        raise WeightsError(f"{file.name} from {file.repo} has the SHA-256 {found}, not {wanted}: it was thrown away")
    part.replace(path)
    record(path, found)
    return path


def _metadata(file: WeightsFile, token: str | None, endpoint: str | None, until: float | None) -> Facts:
    """What the hub says of a file before it is fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    seconds = CONNECT_SECONDS if until is None else max(min(until - time.monotonic(), CONNECT_SECONDS), 0.1)
    url = hf_hub_url(file.repo, file.name, revision=file.revision, endpoint=endpoint)
    found = get_hf_file_metadata(url, token=token or False, timeout=seconds)
    at_home = urlsplit(found.location).netloc == urlsplit(url).netloc
    headers = {"Authorization": f"Bearer {token}"} if token and at_home else {}  # a storage server has no business with it
    return Facts(found.location, headers, found.size, found.etag or "unknown")


def _fetched(file: WeightsFile, folder: Path, facts: Facts, until: float | None, progress: Progress) -> Path:
    """The file under a name of its own, all of it but unchecked; begun where an earlier try of the same content stopped."""
    import httpx

    part = folder / f"{file.name}.{facts.etag[:16]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as target:
        if facts.size is None or target.tell() > facts.size:
            _empty(target)
        failures = 0
        while target.tell() != facts.size:
            before = target.tell()
            try:
                _stream(facts, target, until, progress)
                break
            except httpx.TransportError:
                failures = failures + 1 if target.tell() == before else 1
                if failures == ATTEMPTS:
                    raise
    return part


def _stream(facts: Facts, target: BinaryIO, until: float | None, progress: Progress) -> None:
    """Append what the file lacks, as it comes, so that nothing is lost when the connection is."""
    import httpx

    begun = target.tell()
    headers = {**facts.headers, "Accept-Encoding": "identity", **({"Range": f"bytes={begun}-"} if begun else {})}
    with httpx.stream("GET", facts.location, headers=headers, timeout=CONNECT_SECONDS, follow_redirects=True) as answer:
        answer.raise_for_status()
        if begun and answer.status_code != httpx.codes.PARTIAL_CONTENT:
            _empty(target)
        progress(target.tell(), facts.size)
        for chunk in answer.iter_bytes():
            target.write(chunk)
            progress(target.tell(), facts.size)
            if until is not None and time.monotonic() > until:
                raise WeightsError("the time for fetching weights is over; the next try goes on from here")


def _empty(target: BinaryIO) -> None:
    target.truncate(0)
    target.seek(0)


def _refusal(file: WeightsFile, error: Exception) -> WeightsError:
    """A sentence for what the client raised; never an address, which may hold a signature."""
    import httpx
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

    by_hand = "" if file.instead is None else f", or set {file.instead} to where the files lie"
    status = error.response.status_code if isinstance(error, HfHubHTTPError | httpx.HTTPStatusError) else None
    if isinstance(error, RemoteEntryNotFoundError):
        return AbsentError(f"there is no {file.name} in {file.repo} on the hub")
    if isinstance(error, GatedRepoError) or (file.instead is not None and status in (401, 403)):
        return WeightsError(f"the hub does not give {file.repo} to everyone: {_access(file.repo)}{by_hand}")
    if isinstance(error, RepositoryNotFoundError):
        return WeightsError(f"the hub knows no {file.repo}, or HF_TOKEN may not see it")
    if status is not None:
        return WeightsError(f"the hub refuses {file.name} of {file.repo} (HTTP {status})")
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        return WeightsError(f"{file.name} cannot be written: {error.strerror}")
    return WeightsError(f"the hub cannot be reached ({type(error).__name__}){by_hand and f': try later{by_hand}'}")


def _access(repo: str) -> str:
    return (
        f"request access at https://huggingface.co/{repo}, create a token at https://huggingface.co/settings/tokens, set HF_TOKEN"
    )


def _where(file: WeightsFile, folder: Path) -> str:
    return f"{file.name} is not on the hub; fetch it into {folder} from {file.by_hand}"


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
