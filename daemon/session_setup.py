"""What sessions are set up with: ceilings made of settings, and desks made of stations and their pools. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from daemon.config import Config
from daemon.engines import CPU, Station
from daemon.infer import Pool
from daemon.sessions import Desk, SessionLimits
from handlers.base import Limits
from models.base import Role

IN_CONFIG = {"pixels_max": "image_pixels_max"}
"""Limits of tasks that have another name among the settings."""


def limits_of(config: Config) -> SessionLimits:
    """Ceilings of sessions."""
    return SessionLimits(
        bytes_max=config.session_bytes_max,
        pixels_max=config.image_pixels_max,
        ttl_seconds=config.session_ttl_seconds,
        timeout_seconds=config.session_timeout_seconds,
        everything_seconds=config.session_timeout_seconds + 2 * config.timeout_seconds,
        waiting_max=config.session_waiting_max,
        threads=config.threads(),
        asks=asks_of(config),
    )


def asks_of(config: Config) -> Limits:
    """Ceilings on what one task or click may ask."""
    return Limits(**{each.name: getattr(config, IN_CONFIG.get(each.name, each.name)) for each in fields(Limits)})


def desks_of(stations: Sequence[Station], pools: Mapping[str, Pool]) -> dict[Role, Desk]:
    """By role where sessions are answered: the first station whose own engine it is."""
    desks: dict[Role, Desk] = {}
    for station in stations:
        for role in (Role.VISUAL, Role.EVERYTHING):
            own = role in station.models.roles() and station.device in (CPU, station.models.of(role).device)
            if own and station.name in pools:
                desks.setdefault(role, Desk(pools[station.name], role))
    return desks
