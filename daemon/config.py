"""The only reader of the environment and of `.env`. All mistakes are reported at once, each in one line.

Enters: environment variables. Leaves: one frozen `Config`. Secrets are `SecretStr`: they never print.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs, urlsplit

from dotenv import dotenv_values
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from storage.base import ConfigurationError

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
DATABASE = ("DATABASE_URL", "MASKD_DB_CA", "MASKD_DB_POOLER")


def _named(name: str, default: Any, **limits: Any) -> Any:
    """A field that is read from the environment variable `name`."""
    return Field(default, validation_alias=AliasChoices(name), **limits)


class Config(BaseModel):
    """Every setting of maskd; names of the environment stand beside their defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    database_url: SecretStr | None = _named("DATABASE_URL", None)
    supabase_url: str | None = _named("SUPABASE_URL", None)
    supabase_service_key: SecretStr | None = _named("SUPABASE_SERVICE_KEY", None)
    db_ca: Path | None = _named("MASKD_DB_CA", None)
    db_pooler: str = _named("MASKD_DB_POOLER", "auto", pattern="^(auto|transaction|none)$")
    r2_endpoint: str | None = _named("R2_ENDPOINT", None)
    r2_access_key_id: SecretStr | None = _named("R2_ACCESS_KEY_ID", None)
    r2_secret_access_key: SecretStr | None = _named("R2_SECRET_ACCESS_KEY", None)
    r2_bucket: str = _named("R2_BUCKET", "s3-images")
    r2_public_url: str | None = _named("R2_PUBLIC_URL", None)
    blob_dir: Path | None = _named("MASKD_BLOB_DIR", None)
    api_secret_key: SecretStr | None = _named("API_SECRET_KEY", None)

    host: str = _named("MASKD_HOST", "127.0.0.1")
    port: int = _named("MASKD_PORT", 8000, ge=0, le=65535)
    log_level: str = _named("MASKD_LOG_LEVEL", "info", pattern="^(debug|info|warning|error)$")
    log_format: str = _named("MASKD_LOG_FORMAT", "auto", pattern="^(auto|json|text)$")
    state_dir: Path = _named("MASKD_STATE_DIR", Path("~/.local/state/maskd"))

    lease_seconds: float = _named("MASKD_LEASE_SECONDS", 30.0, ge=1)
    poll_seconds: Positive = _named("MASKD_POLL_SECONDS", 20.0)
    poll_unproven_seconds: Positive = _named("MASKD_POLL_UNPROVEN_SECONDS", 1.5)
    rest_seconds: Positive = _named("MASKD_REST_SECONDS", 60.0)
    drain_seconds: float = _named("MASKD_DRAIN_SECONDS", 25.0, ge=0)
    unserved_seconds: Positive = _named("MASKD_UNSERVED_SECONDS", 600.0)
    database_timeout_seconds: Positive = _named("MASKD_DATABASE_TIMEOUT_SECONDS", 10.0)
    claim_max: Count = _named("MASKD_CLAIM_MAX", 100)
    settle_batch_max: Count = _named("MASKD_SETTLE_BATCH_MAX", 500)
    retry_seconds: Positive = _named("MASKD_RETRY_SECONDS", 2.0)
    spool_max: int = _named("MASKD_SPOOL_MAX", 10_000, ge=0)
    spool_mb: int = _named("MASKD_SPOOL_MB", 64, ge=0)
    metrics_seconds: Positive = _named("MASKD_METRICS_SECONDS", 15.0)

    cpu_threads: int | None = _named("MASKD_CPU_THREADS", None, ge=1)
    prefetch_batches: int = _named("MASKD_PREFETCH_BATCHES", 1, ge=0)
    io_threads: Count = _named("MASKD_IO_THREADS", 16)
    batch_max: Count = _named("MASKD_BATCH_MAX", 32)
    inflight_mb: Count = _named("MASKD_INFLIGHT_MB", 1024)
    timeout_seconds: Positive = _named("MASKD_TIMEOUT_SECONDS", 60.0)
    embedding_cache_mb: int = _named("MASKD_EMBEDDING_CACHE_MB", 512, ge=0)
    weights_dir: Path = _named("MASKD_WEIGHTS_DIR", Path("weights"))
    hf_token: SecretStr | None = _named("HF_TOKEN", None)
    sam3_weights_path: Path | None = _named("SAM3_WEIGHTS_PATH", None)
    sam3_device: str | None = _named("SAM3_DEVICE", None, pattern="^(auto|cpu|cuda)$")
    device: str = _named("MASKD_DEVICE", "auto", pattern="^(auto|cpu|cuda)$")
    gpus: str = _named("MASKD_GPUS", "all", pattern=r"^(all|\d+(,\d+)*)$")
    gpu_memory_mb: int | None = _named("MASKD_GPU_MEMORY_MB", None, ge=1024)
    precision: str = _named("MASKD_PRECISION", "auto", pattern="^(auto|bf16|fp32)$")
    compile: bool = _named("MASKD_COMPILE", False)
    crop_layers: int = _named("MASKD_CROP_LAYERS", 0, ge=0, le=2)
    cpu_runtime: str = _named("MASKD_CPU_RUNTIME", "auto", pattern="^(auto|onnxruntime|openvino|openvino-bf16)$")
    concept: str = _named("MASKD_CONCEPT", "auto", pattern="^(auto|sam3|mock)$")
    visual: str = _named("MASKD_VISUAL", "auto", pattern="^(auto|sam3|sam2|mobilesam|classical|mock)$")
    everything: str = _named("MASKD_EVERYTHING", "auto", pattern="^(auto|sam3|sam2|mobilesam|classical|mock)$")

    inpaint: str = _named("MASKD_INPAINT", "auto", pattern="^(auto|lama|classical|mock)$")
    generate: str = _named("MASKD_GENERATE", "auto", pattern="^(auto|diffusion|mock)$")
    kinds: str = _named("MASKD_KINDS", "all", pattern=r"^(all|[a-z_]+(,[a-z_]+)*)$")
    session_bytes_max: Count = _named("MASKD_SESSION_BYTES_MAX", 20_000_000)
    session_ttl_seconds: Positive = _named("MASKD_SESSION_TTL_SECONDS", 600.0)
    session_timeout_seconds: Positive = _named("MASKD_SESSION_TIMEOUT_SECONDS", 30.0)
    session_waiting_max: Count = _named("MASKD_SESSION_WAITING_MAX", 32)
    sessions_max: Count = _named("MASKD_SESSIONS_MAX", 1000)
    sessions_mb: Count = _named("MASKD_SESSIONS_MB", 512)
    redis_url: SecretStr | None = _named("MASKD_REDIS_URL", None)
    cors_origins: str = _named("MASKD_CORS_ORIGINS", "", pattern=r"^(https?://[^/,\s*]+(\s*,\s*https?://[^/,\s*]+)*)?$")
    page: bool = _named("MASKD_PAGE", False)

    image_bytes_max: Count = _named("MASKD_IMAGE_BYTES_MAX", 50_000_000)
    image_pixels_max: Count = _named("MASKD_IMAGE_PIXELS_MAX", 50_000_000)
    text_characters_max: Count = _named("MASKD_TEXT_CHARACTERS_MAX", 1000)
    points_max: Count = _named("MASKD_POINTS_MAX", 256)
    objects_max: Count = _named("MASKD_OBJECTS_MAX", 64)
    points_per_side_max: Count = _named("MASKD_POINTS_PER_SIDE_MAX", 64)
    masks_max: Count = _named("MASKD_MASKS_MAX", 100)
    mask_images_max: Count = _named("MASKD_MASK_IMAGES_MAX", 8)
    texts_max: Count = _named("MASKD_TEXTS_MAX", 16)
    instances_max: Count = _named("MASKD_INSTANCES_MAX", 200)
    result_masks_max: Count = _named("MASKD_RESULT_MASKS_MAX", 400)
    side_max: Count = _named("MASKD_SIDE_MAX", 8192)
    steps_max: Count = _named("MASKD_STEPS_MAX", 50)
    dilate_max: Count = _named("MASKD_DILATE_MAX", 255)
    blur_max: Positive = _named("MASKD_BLUR_MAX", 100.0)

    def database_dsn(self) -> str:
        """The DSN in clear, for the adapter that connects; never log it."""
        assert self.database_url is not None
        return self.database_url.get_secret_value()

    def origins(self) -> frozenset[str]:
        """The origins whose pages may ask for sessions."""
        return frozenset(origin.strip().lower() for origin in self.cors_origins.split(",") if origin.strip())

    def threads(self) -> int:
        """Threads of the CPU pool: MASKD_CPU_THREADS, else OMP_NUM_THREADS, else the cores of this host."""
        return self.cpu_threads or os.cpu_count() or 1


def known_names() -> frozenset[str]:
    """Every environment variable that `Config` reads."""
    names: set[str] = set()
    for field in Config.model_fields.values():
        assert isinstance(field.validation_alias, AliasChoices)
        names.update(str(choice) for choice in field.validation_alias.choices)
    return frozenset(names)


def load(environ: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> Config:
    """The configuration of this process. Raises ConfigurationError that lists every mistake, one a line, without values."""
    merged = _found(environ, env_file)
    values = {key: value for key, value in merged.items() if value != "" and key in known_names()}
    if "MASKD_CPU_THREADS" not in values and merged.get("OMP_NUM_THREADS", "").isdigit():
        values["MASKD_CPU_THREADS"] = merged["OMP_NUM_THREADS"]
    mistakes = [_unknown(name) for name in sorted(merged) if _is_ours(name) and name not in known_names()] + _missing(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += [_sentence(dict(detail)) for detail in error.errors(include_url=False, include_input=False)]
    if mistakes:
        raise ConfigurationError("\n".join(mistakes))
    return config


def _is_ours(name: str) -> bool:
    return name.startswith("MASKD_") and not name.startswith("MASKD_TEST_")


def _missing(values: Mapping[str, str]) -> list[str]:
    """What only the settings together can tell."""
    missing = []
    if mistake := _mistake_in_database(values):
        missing.append(mistake)
    r2 = ("R2_ENDPOINT", "R2_ACCESS_KEY_ID", "R2_SECRET_ACCESS_KEY")
    if "MASKD_BLOB_DIR" not in values and not all(name in values for name in r2):
        missing.append("R2_ENDPOINT, R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY are needed, or MASKD_BLOB_DIR for a local folder")
    if values.get("MASKD_HOST", "127.0.0.1") not in ("127.0.0.1", "localhost", "::1") and "API_SECRET_KEY" not in values:
        missing.append("MASKD_HOST is a public address: set API_SECRET_KEY, or bind to 127.0.0.1")
    return missing


def _mistake_in_database(values: Mapping[str, str]) -> str | None:
    """DATABASE_URL is enough, and so are an address and a key of Supabase."""
    url, key = values.get("SUPABASE_URL"), values.get("SUPABASE_SERVICE_KEY")
    if values.get("DATABASE_URL") or not (url or key):
        return _mistake_in(values.get("DATABASE_URL"))
    if not url or not key:
        given, needed = ("SUPABASE_URL", "SUPABASE_SERVICE_KEY") if url else ("SUPABASE_SERVICE_KEY", "SUPABASE_URL")
        return f"{given} needs {needed} beside it; or set DATABASE_URL instead of both"
    try:
        parts = urlsplit(url)
        readable = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        readable = False
    return None if readable else "SUPABASE_URL must be the project's address (https://….supabase.co)"


def _mistake_in(dsn: str | None) -> str | None:
    """What is wrong with DATABASE_URL, without its value."""
    if not dsn:
        return (
            "DATABASE_URL is missing: the Postgres that holds segmentation_results (postgresql://…);"
            " all commands but migrate also take SUPABASE_URL and SUPABASE_SERVICE_KEY"
        )
    if not dsn.startswith(("postgres:", "postgresql:")):
        return "DATABASE_URL must begin with postgresql://"
    return None if _is_readable(dsn) else "DATABASE_URL cannot be read: percent-encode the special characters of its password"


def _is_readable(dsn: str) -> bool:
    """Whether a DSN names a host, and nothing in it was cut at a character of its password."""
    try:
        parts = urlsplit(dsn)
        query = parse_qs(parts.query, strict_parsing=True) if parts.query else {}
        named = bool(parts.hostname or query.get("host"))
        _ = parts.port, [int(port) for port in query.get("port", ())]
    except ValueError:
        return False
    return named and parts.netloc.count("@") <= 1 and "@" not in parts.path + parts.fragment


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, known_names(), n=1)
    return f"{name} is not a setting of maskd" + (f"; did you mean {near[0]}?" if near else "")


def _sentence(detail: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def database_config(environ: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> Config:
    """A configuration with DATABASE_URL and how to get there, for commands that need nothing else."""
    config = _only(DATABASE, environ, env_file)
    if config.database_url is None and _found(environ, env_file).get("SUPABASE_URL"):
        raise ConfigurationError(
            "DATABASE_URL is missing: migrations change the schema, which SUPABASE_URL cannot do; run this where the database can"
            " be reached, or push migrations/ with the Supabase CLI"
        )
    if mistake := _mistake_in(None if config.database_url is None else config.database_dsn()):
        raise ConfigurationError(mistake)
    return config


def has_database_url(environ: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> bool:
    """Whether DATABASE_URL is set, for a command that can do without."""
    return bool(_found(environ, env_file).get("DATABASE_URL"))


def store_config(environ: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> Config:
    """A configuration that says where the queue is and nothing else, for commands that need no more."""
    found = _found(environ, env_file)
    if mistake := _mistake_in_database({name: value for name, value in found.items() if value}):
        raise ConfigurationError(mistake)
    return _only((*DATABASE, "SUPABASE_URL", "SUPABASE_SERVICE_KEY", "MASKD_DATABASE_TIMEOUT_SECONDS"), environ, env_file)


def _only(names: Sequence[str], environ: Mapping[str, str] | None, env_file: Path) -> Config:
    """These settings, and the defaults of all others. Raises ConfigurationError."""
    found = _found(environ, env_file)
    try:
        return Config.model_validate({name: value for name in names if (value := found.get(name))})
    except ValidationError as error:
        mistakes = [_sentence(dict(detail)) for detail in error.errors(include_url=False, include_input=False)]
        raise ConfigurationError("\n".join(mistakes)) from None


def _found(environ: Mapping[str, str] | None, env_file: Path) -> dict[str, str]:
    """The environment over the file."""
    try:  # as it stands: systemd, which reads the same file, puts no ${NAME} in either
        inside = {name: value for name, value in dotenv_values(env_file, interpolate=False).items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigurationError(f"{env_file} cannot be read: {reason}") from None
    return {**inside, **(os.environ if environ is None else environ)}


def weights_settings(environ: Mapping[str, str] | None = None, env_file: Path = Path(".env")) -> tuple[Path, SecretStr | None]:
    """MASKD_WEIGHTS_DIR and HF_TOKEN alone, for commands that need nothing else."""
    found = _found(environ, env_file)
    token = found.get("HF_TOKEN")
    folder = Path(found.get("MASKD_WEIGHTS_DIR") or Config.model_fields["weights_dir"].default)
    return folder.expanduser(), SecretStr(token) if token else None
