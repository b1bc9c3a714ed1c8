"""The first mask on Supabase's own Postgres image and MinIO, for whoever has a container engine and sets MASKD_TEST_CONTAINERS=1.

Everywhere else the embedded Postgres and the S3 server of the tests stand in; these images are fetched from the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
from support.daemons import environment, running, wait_until
from testcontainers.core.container import DockerContainer
from testcontainers.core.wait_strategies import HttpWaitStrategy

from daemon.config import Config
from storage.client import TaskClient
from storage.migrate import migrate

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        not os.environ.get("MASKD_TEST_CONTAINERS"), reason="no container engine: set MASKD_TEST_CONTAINERS=1 for one"
    ),
    pytest.mark.timeout(600),
]
POSTGRES_IMAGE = "supabase/postgres:17.4.1.032"
MINIO_IMAGE = "minio/minio:latest"
PHOTO = Path(__file__).resolve().parents[2] / "daemon" / "photos" / "chelsea.jpg"
SECRET = "a-secret-of-the-tests"
BUCKET = Config.model_fields["r2_bucket"].default


@pytest.fixture
def supabase_dsn() -> Iterator[str]:
    with DockerContainer(POSTGRES_IMAGE).with_env("POSTGRES_PASSWORD", SECRET).with_exposed_ports(5432) as container:
        dsn = f"postgresql://postgres:{SECRET}@{container.get_container_host_ip()}:{container.get_exposed_port(5432)}/postgres"
        wait_for(dsn)
        yield dsn


@pytest.fixture
def minio() -> Iterator[str]:
    container = (
        DockerContainer(MINIO_IMAGE)
        .with_env("MINIO_ROOT_USER", "maskd")
        .with_env("MINIO_ROOT_PASSWORD", SECRET)
        .with_command("server /data")
        .with_exposed_ports(9000)
        .waiting_for(HttpWaitStrategy(9000, "/minio/health/ready"))
    )
    with container:
        yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(9000)}"


def wait_for(dsn: str) -> None:
    """Until the server answers and its set-up scripts have run; it starts once more after them."""

    def ready() -> bool:
        try:
            with psycopg.connect(dsn, connect_timeout=3) as sql:
                return sql.execute("select to_regclass('auth.users') is not null").fetchone() == (True,)
        except psycopg.OperationalError:
            return False

    wait_until("Postgres is ready", ready, 180)


async def test_the_first_mask_on_supabases_postgres_and_minio(supabase_dsn: str, minio: str, tmp_path: Path) -> None:
    await migrate(supabase_dsn, plain=False, dry_run=False, said=print)
    s3: Any = boto3.client(
        "s3", endpoint_url=minio, aws_access_key_id="maskd", aws_secret_access_key=SECRET, region_name="us-east-1"
    )
    s3.create_bucket(Bucket=BUCKET)
    settings = environment(supabase_dsn, tmp_path, R2_ENDPOINT=minio, R2_ACCESS_KEY_ID="maskd", R2_SECRET_ACCESS_KEY=SECRET)
    client = await TaskClient.connect(supabase_dsn)
    with psycopg.connect(supabase_dsn, autocommit=True) as sql:
        user = sql.execute("insert into auth.users (id, email) values (gen_random_uuid(), 'a@localhost') returning id").fetchone()
        sql.execute("insert into public.projects (user_id) values (%s)", user)
    owner = await client.owner(None)
    key = f"uploads/{owner.user_id}/cat.jpg"
    s3.put_object(Bucket=BUCKET, Key=key, Body=PHOTO.read_bytes())
    with running(settings, tmp_path) as daemon:
        task = await client.insert(owner, "segment_visual", key, {"boxes": [[60, 10, 380, 290]]})
        (row,) = await client.finished([task], 120)
        assert daemon.stop() == 0
    await client.close()
    assert row["status"] == "done", row["error"]
    assert s3.get_object(Bucket=BUCKET, Key=row["mask_image_url"])["Body"].read().startswith(b"\x89PNG")
