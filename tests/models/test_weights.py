"""Files of networks: fetched whole or not at all, gone on with, held to their checksums, refused in sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub, hub

from models import weights
from models.weights import NETWORKS, State, WeightsError, WeightsFile, check, network, pull, record, state

DATA = bytes(range(256)) * 4000
DIGEST = hashlib.sha256(DATA).hexdigest()
FILE = WeightsFile("net.onnx", "someone/nets", "main", len(DATA), DIGEST)


@pytest.fixture
def there() -> Iterator[Hub]:
    with hub() as held:
        held.files["net.onnx"] = DATA
        yield held


def refusal(there: Hub, folder: Path, file: WeightsFile = FILE, **more: Any) -> str:
    with pytest.raises(WeightsError) as caught:
        pull(file, folder, endpoint=there.address, **more)
    return str(caught.value)


def leave_part(folder: Path, data: bytes) -> Path:
    """What an earlier try left behind."""
    part = folder / f"net.onnx.{DIGEST[:16]}.part"
    part.write_bytes(data)
    return part


def test_a_file_is_fetched_checked_and_noted(there: Hub, tmp_path: Path) -> None:
    said: list[tuple[int, int | None]] = []
    path = pull(FILE, tmp_path / "new", endpoint=there.address, progress=lambda done, total: said.append((done, total)))
    assert (path.read_bytes(), state(path), check(path)) == (DATA, State.WHOLE, DIGEST)
    assert (said[0], said[-1]) == ((0, len(DATA)), (len(DATA), len(DATA)))
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"net.onnx", "net.onnx.sha256"}


def test_a_file_that_is_there_is_not_fetched_again(there: Hub, tmp_path: Path) -> None:
    for _ in range(2):
        pull(FILE, tmp_path, endpoint=there.address)
    assert len(there.ranges) == 1


def test_a_damaged_file_is_fetched_again(there: Hub, tmp_path: Path) -> None:
    path = pull(FILE, tmp_path, endpoint=there.address)
    path.write_bytes(DATA[:-1])
    assert state(path) is State.DAMAGED
    pull(FILE, tmp_path, endpoint=there.address)
    assert state(path) is State.WHOLE


def test_what_an_earlier_try_left_is_gone_on_with(there: Hub, tmp_path: Path) -> None:
    part = leave_part(tmp_path, DATA[:600_000])
    assert pull(FILE, tmp_path, endpoint=there.address).read_bytes() == DATA
    assert there.ranges == ["bytes=600000-"]
    assert not part.exists()


def test_a_server_that_cannot_go_on_begins_anew(there: Hub, tmp_path: Path) -> None:
    there.takes_ranges = False
    leave_part(tmp_path, b"x" * 600_000)
    assert pull(FILE, tmp_path, endpoint=there.address).read_bytes() == DATA


def test_a_leftover_longer_than_the_file_is_no_beginning_of_it(there: Hub, tmp_path: Path) -> None:
    leave_part(tmp_path, b"x" * (len(DATA) + 1))
    assert pull(FILE, tmp_path, endpoint=there.address).read_bytes() == DATA


def test_a_connection_that_breaks_is_taken_up_again(there: Hub, tmp_path: Path) -> None:
    there.breaks_after = 600_000
    assert pull(FILE, tmp_path, endpoint=there.address).read_bytes() == DATA
    assert there.ranges == [None, "bytes=600000-"]


def test_content_with_another_checksum_is_thrown_away(there: Hub, tmp_path: Path) -> None:
    there.files["net.onnx"] = DATA[::-1]
    assert "it was thrown away" in refusal(there, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_a_checksum_of_ours_that_of_the_hub_counts(there: Hub, tmp_path: Path) -> None:
    unpinned = WeightsFile("net.onnx", "someone/nets", "main")
    assert pull(unpinned, tmp_path, endpoint=there.address).exists()
    there.announced = "a" * 64
    assert f"not {'a' * 64}" in refusal(there, tmp_path / "other", unpinned)


def test_time_that_runs_out_leaves_what_is_there_for_the_next_try(there: Hub, tmp_path: Path) -> None:
    assert "the time for fetching weights is over" in refusal(there, tmp_path, seconds_max=0.0)
    assert [file.suffix for file in tmp_path.iterdir()] == [".part"]


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        (401, "GatedRepo", "the hub gives someone/nets only to those who asked for access there: ask, then set HF_TOKEN"),
        (403, "GatedRepo", "the hub gives someone/nets only to those who asked"),
        (404, "RepoNotFound", "the hub knows no someone/nets, or HF_TOKEN may not see it"),
        (404, "EntryNotFound", "the hub refuses net.onnx of someone/nets (HTTP 404)"),
        (500, "", "the hub refuses net.onnx of someone/nets (HTTP 500)"),
    ],
)
def test_a_refusal_is_told_in_a_sentence(there: Hub, tmp_path: Path, status: int, code: str, sentence: str) -> None:
    there.status, there.error_code = status, code
    assert refusal(there, tmp_path).startswith(sentence)


def test_a_hub_that_is_not_there_is_told_in_a_sentence_without_an_address(tmp_path: Path) -> None:
    gone = Hub(address="http://127.0.0.1:9")
    assert refusal(gone, tmp_path / "new") == "the hub cannot be reached (ConnectError)"
    assert not (tmp_path / "new").exists()


def test_the_token_goes_to_the_hub_and_into_no_message(there: Hub, tmp_path: Path) -> None:
    there.status, there.error_code = 403, "GatedRepo"
    assert "hf_secret" not in refusal(there, tmp_path, token="hf_secret")
    assert there.tokens == {"Bearer hf_secret"}


def test_a_file_without_a_note_is_used_unchecked(tmp_path: Path) -> None:
    path = tmp_path / "mine.onnx"
    path.write_bytes(b"x")
    assert (state(path), check(path)) == (State.UNCHECKED, hashlib.sha256(b"x").hexdigest())
    record(path, "b" * 64)
    assert state(path) is State.DAMAGED
    with pytest.raises(WeightsError, match=r"mine\.onnx is damaged"):
        check(path)


def test_an_unknown_network_is_answered_with_those_there_are() -> None:
    with pytest.raises(WeightsError, match="there is no network sam9; there are: mobile-sam, "):
        network("sam9")


def test_no_two_files_share_a_name_and_every_network_says_where_it_is_from() -> None:
    names = [file.name for net in NETWORKS for file in net.files]
    assert len(names) == len(set(names))
    assert all(net.licence and net.purpose and all(file.repo for file in net.files) for net in NETWORKS)
    assert [file.name for file in network("mobile-sam").files] == [weights.ENCODER_FILE, weights.DECODER_FILE]
