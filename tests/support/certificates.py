"""Certificates made for one test: an authority, and a server's certificate that it signs for the name `localhost`."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

import pytest

NAME = "localhost"


@dataclass(frozen=True, slots=True)
class Authority:
    """`ca_file` is what a client trusts; `certificate` and `key` are a server's, in PEM."""

    ca_file: Path
    certificate: bytes
    key: bytes


def authority(folder: Path, name: str = "ca") -> Authority:
    """A new authority, with one certificate for `localhost`."""
    pytest.importorskip("cryptography", reason="needs cryptography, which moto brings")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def named(common: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    made = []
    for common, key, is_ca in ((f"{name} of this test", keys[0], True), (NAME, keys[1], False)):
        builder = (
            x509.CertificateBuilder(named(f"{name} of this test"), named(common), key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=2))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        )
        if not is_ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        made.append(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    ca_file = folder / f"{name}.crt"
    ca_file.write_bytes(made[0])
    pkcs8 = serialization.PrivateFormat.PKCS8
    return Authority(ca_file, made[1], keys[1].private_bytes(serialization.Encoding.PEM, pkcs8, serialization.NoEncryption()))
