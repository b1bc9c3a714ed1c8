"""Addresses and keys: ours or refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.keys import Keys, bases_of, prefixes_of
from handlers.base import RejectedError

PREFIXES = ("uploads/u1/", "masks/p1/")
KEYS = Keys(bases_of("https://cdn.example/x", "https://acc.r2.example", "s3-images"), "https://cdn.example/x")


@pytest.mark.parametrize(
    "address",
    [
        "uploads/u1/cat.jpg",
        "https://cdn.example/x/uploads/u1/cat.jpg",
        "https://cdn.example/x/uploads/u1/cat.jpg?width=100#top",
        "https://acc.r2.example/s3-images/uploads/u1/cat.jpg",
        "s3://s3-images/uploads/u1/cat.jpg",
        "https://cdn.example/x/uploads%2Fu1/cat.jpg",
    ],
)
def test_every_accepted_address_means_the_same_key(address: str) -> None:
    assert KEYS.key_of(address, PREFIXES) == "uploads/u1/cat.jpg"


@pytest.mark.parametrize(
    "address",
    [
        "uploads/u2/cat.jpg",
        "uploads/u1/../u2/cat.jpg",
        "uploads/u1/./cat.jpg",
        "uploads/u1/",
        "/uploads/u1/cat.jpg",
        "uploads/u1//cat.jpg",
        "uploads/u1/%2e%2e/cat.jpg",
        "https://cdn.example/x/uploads/u1/%252e%252e/cat.jpg",
        "uploads\\u1\\cat.jpg",
        "uploads/u1/a\x00b",
        "http://169.254.169.254/latest/uploads/u1/cat.jpg",
        "file:///etc/passwd",
        "https://cdn.example.evil/x/uploads/u1/cat.jpg",
        "s3://other/uploads/u1/cat.jpg",
        "uploads/u1/" + "a" * 1100,
        "",
    ],
)
def test_whatever_is_not_the_owners_is_refused(address: str) -> None:
    with pytest.raises(RejectedError) as caught:
        KEYS.key_of(address, PREFIXES)
    assert caught.value.code == "image_url_forbidden"


@given(st.text(max_size=60))
def test_an_accepted_key_is_always_under_a_prefix_and_has_no_dots_to_climb(address: str) -> None:
    try:
        key = KEYS.key_of("uploads/u1/" + address, PREFIXES)
    except RejectedError:
        return
    assert key.startswith(PREFIXES)
    assert ".." not in key.split("/")
    assert KEYS.key_of(KEYS.address_of("masks/p1/a b.png"), PREFIXES) == "masks/p1/a b.png"


def test_a_row_without_a_user_has_only_its_projects_prefix() -> None:
    assert prefixes_of(["uploads/{user_id}/", "masks/{project_id}/"], None, "p1") == ("masks/p1/",)
