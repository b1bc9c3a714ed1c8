"""A real S3 server over HTTP on the loopback address (moto), for the time of a test."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from storage.r2 import R2Blobs


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where the server listens and what opens it; moto itself checks neither credentials nor signatures."""

    endpoint: str
    client: Any
    """A plain boto3 client, to look at the server past the code under test."""
    access_key_id: str = "test-access-key-id"
    secret_access_key: str = "test-secret-access-key"

    def make_bucket(self) -> str:
        """A new, empty bucket; its name."""
        name = f"bucket-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=name)
        return name

    def empty_bucket(self, name: str) -> None:
        """Delete what is in a bucket."""
        for entry in self.client.list_objects_v2(Bucket=name).get("Contents", []):
            self.client.delete_object(Bucket=name, Key=entry["Key"])

    def blobs(self, bucket: str, endpoint: str | None = None, **options: Any) -> R2Blobs:
        """A store on one of its buckets, through `endpoint` (a proxy) when given; few attempts unless `options` say more."""
        options = {"attempts_max": 2, "connect_seconds": 2, "read_seconds": 5} | options
        return R2Blobs(endpoint or self.endpoint, self.access_key_id, self.secret_access_key, bucket, **options)


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start the server on a free port and stop it at the end. Its buckets are kept by the process: make new ones."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else every request is a line beside a failure
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        session = boto3.session.Session("test", "test", region_name="us-east-1")
        yield S3Server(endpoint, session.client("s3", endpoint_url=endpoint))
    finally:
        server.stop()
