"""Settings: all mistakes at once, in words, without secrets."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest

from daemon.config import database_config, load, store_config
from daemon.stores import address, build_sources, build_store
from storage.base import ConfigurationError
from storage.postgres import PostgresStore, translate
from storage.supabase import SupabaseStore

GOOD = {"DATABASE_URL": "postgresql://someone:hidden-word@db/x", "MASKD_BLOB_DIR": "/tmp/blobs"}
NOWHERE = Path("/nonexistent/.env")
UNREADABLE = "DATABASE_URL cannot be read: percent-encode the special characters of its password"


def mistakes(**values: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load({**GOOD, **values}, NOWHERE)
    return str(caught.value).splitlines()


def test_the_minimum_is_a_database_and_somewhere_for_blobs() -> None:
    config = load(GOOD, NOWHERE)
    assert (config.port, config.lease_seconds) == (8000, 30.0)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({"MASKD_PORT": "99999", "MASKD_LEAS_SECONDS": "3", "MASKD_LEASE_SECONDS": "soon"}, NOWHERE)
    text = str(caught.value)
    assert all(
        name in text for name in ("MASKD_PORT", "MASKD_LEAS_SECONDS", "MASKD_LEASE_SECONDS", "DATABASE_URL", "R2_ENDPOINT")
    )


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    assert mistakes(MASKD_LEAS_SECONDS="3") == ["MASKD_LEAS_SECONDS is not a setting of maskd; did you mean MASKD_LEASE_SECONDS?"]


def test_a_public_address_needs_a_key() -> None:
    assert "API_SECRET_KEY" in mistakes(MASKD_HOST="192.0.2.1")[0]
    assert load({**GOOD, "MASKD_HOST": "192.0.2.1", "API_SECRET_KEY": "k" * 20}, NOWHERE).host == "192.0.2.1"


def test_a_database_url_of_another_kind_is_refused_without_showing_it() -> None:
    lines = mistakes(DATABASE_URL="mysql://someone:hidden-word@db/x")
    assert lines == ["DATABASE_URL must begin with postgresql://"]


@pytest.mark.parametrize("password", ["hid/den", "1/hidden", "hid#den", "1#hidden", "hid?den", "1?hidden", "hid@den", "hid[den"])
def test_a_password_that_cuts_its_database_url_is_refused_without_showing_it(password: str) -> None:
    url = f"postgresql://someone:{password}@db/x"
    assert mistakes(DATABASE_URL=url) == [UNREADABLE]
    with pytest.raises(ConfigurationError) as caught:
        database_config({"DATABASE_URL": url}, NOWHERE)
    assert (str(caught.value), caught.value.__cause__, caught.value.__context__) == (UNREADABLE, None, None)


@pytest.mark.parametrize("url", ["postgresql://db:99999/x", "postgresql:///x", "postgresql:///x?host=/tmp&port=five"])
def test_a_database_url_without_a_host_or_with_no_such_port_is_refused(url: str) -> None:
    assert mistakes(DATABASE_URL=url) == [UNREADABLE]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql:///db?host=/tmp",
        "postgresql://someone:hidden@/db?host=/tmp&port=5433",
        "postgres://someone:hid%2Fden%23@[::1]:5432/db?sslmode=require",
    ],
)
def test_a_database_url_may_name_a_socket_or_escape_its_password(url: str) -> None:
    assert load({**GOOD, "DATABASE_URL": url}, NOWHERE).database_dsn() == url
    assert database_config({"DATABASE_URL": url}, NOWHERE).database_dsn() == url


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url", ["hidden://db/x", "postgresql://me@db/x?target_session_attrs=hidden", "postgresql:///x?host=[hidden"]
)
async def test_what_the_driver_does_not_understand_is_told_without_the_value(url: str) -> None:
    with pytest.raises(asyncpg.ClientConfigurationError) as caught:
        await asyncpg.connect(url)
    error = translate(caught.value)
    assert isinstance(error, ConfigurationError)
    assert str(error).startswith("DATABASE_URL is not understood: ")
    assert "hidden" not in str(error)


KEY = "sb_secret_hidden-word"
SUPABASE = {"SUPABASE_URL": "https://ref.supabase.co", "SUPABASE_SERVICE_KEY": KEY, "MASKD_BLOB_DIR": "/tmp/blobs"}


def test_an_address_and_a_key_of_supabase_are_enough_and_a_database_url_wins_over_them() -> None:
    config = load(SUPABASE, NOWHERE)
    assert isinstance(build_store(config), SupabaseStore)
    assert [source.name for source in build_sources(config)] == ["realtime"]
    assert address(config) == "https://ref.supabase.co"
    assert KEY not in repr(config)
    both = load({**SUPABASE, **GOOD}, NOWHERE)
    assert isinstance(build_store(both), PostgresStore)
    assert [source.name for source in build_sources(both)] == ["notify"]


@pytest.mark.parametrize("given", ["SUPABASE_URL", "SUPABASE_SERVICE_KEY"])
def test_one_without_the_other_is_told_by_name(given: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({given: SUPABASE[given], "MASKD_BLOB_DIR": "/tmp/blobs"}, NOWHERE)
    assert str(caught.value).startswith(f"{given} needs SUPABASE_")
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize("url", ["ref.supabase.co", "postgresql://db/x", "https://me:hidden-word@ref.supabase.co", "https://x:y"])
def test_an_address_of_supabase_that_is_none_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({**SUPABASE, "SUPABASE_URL": url}, NOWHERE)
    assert str(caught.value) == "SUPABASE_URL must be the project's address (https://….supabase.co)"


def test_secrets_do_not_print() -> None:
    assert "hidden-word" not in repr(load(GOOD, NOWHERE))


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("DATABASE_URL=postgresql://file/x\nMASKD_PORT=8001\nMASKD_BLOB_DIR=/tmp/file\n")
    config = load({"MASKD_PORT": "8002"}, file)
    assert (config.port, str(config.blob_dir)) == (8002, "/tmp/file")
    assert database_config({}, file).database_dsn() == "postgresql://file/x"


def test_omp_num_threads_counts_when_nothing_else_is_said() -> None:
    assert load({**GOOD, "OMP_NUM_THREADS": "3"}, NOWHERE).threads() == 3
    assert load({**GOOD, "OMP_NUM_THREADS": "3", "MASKD_CPU_THREADS": "5"}, NOWHERE).threads() == 5


def test_origins_are_a_list_without_paths_or_stars() -> None:
    found = load({**GOOD, "MASKD_CORS_ORIGINS": "https://App.example, http://localhost:5173"}, NOWHERE)
    assert found.origins() == {"https://app.example", "http://localhost:5173"}
    assert load(GOOD, NOWHERE).origins() == frozenset()
    for wrong in ("*", "app.example", "https://app.example/", "https://a.example,,https://b.example"):
        assert mistakes(MASKD_CORS_ORIGINS=wrong)[0].startswith("MASKD_CORS_ORIGINS: ")


def test_a_file_of_settings_is_read_as_systemd_reads_it_and_nothing_is_put_in(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATABASE_URL=postgresql://u:a${HOME}b@db/x\nMASKD_BLOB_DIR=/tmp/blobs\n")
    assert load({}, tmp_path / ".env").database_dsn() == "postgresql://u:a${HOME}b@db/x"


def test_a_file_of_settings_that_cannot_be_read_is_told_of_without_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"DATABASE_URL=hidden\xff\n")
    for ask in (load, store_config, database_config):
        with pytest.raises(ConfigurationError, match="cannot be read: it is not UTF-8") as caught:
            ask({}, tmp_path / ".env")
        assert "hidden" not in str(caught.value)
