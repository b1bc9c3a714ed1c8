"""Files of networks: fetched whole or not at all, gone on with, held to their checksums, refused in sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import Hub, hub

from models import weights
from models.weights import (
    NETWORKS,
    AbsentError,
    State,
    WeightsError,
    WeightsFile,
    check,
    found,
    how_to_get,
    network,
    pull,
    pull_network,
    record,
    state,
)

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
        (
            401,
            "GatedRepo",
            "the hub does not give someone/nets to everyone: request access at https://huggingface.co/someone/nets",
        ),
        (403, "GatedRepo", "the hub does not give someone/nets to everyone"),
        (404, "RepoNotFound", "the hub knows no someone/nets, or HF_TOKEN may not see it"),
        (404, "EntryNotFound", "there is no net.onnx in someone/nets on the hub"),
        (403, "", "the hub refuses net.onnx of someone/nets (HTTP 403)"),
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


def test_a_disk_that_is_full_is_told_in_a_sentence(there: Hub, tmp_path: Path) -> None:
    (tmp_path / f"net.onnx.{DIGEST[:16]}.part").symlink_to("/dev/full")
    assert refusal(there, tmp_path) == "net.onnx cannot be written: No space left on device"


SAM3_ON_THE_HUB = {
    "config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "vocab.json": b'{"a": 1}',
    "model.safetensors": DATA,
}
ASK = (
    "the hub does not give facebook/sam3 to everyone: request access at https://huggingface.co/facebook/sam3, create a token at "
    "https://huggingface.co/settings/tokens, set HF_TOKEN, or set SAM3_WEIGHTS_PATH to where the files lie"
)


@pytest.fixture
def gated(there: Hub) -> Hub:
    """A hub that gives SAM 3, without most of its optional files, to one token."""
    there.files, there.gate = dict(SAM3_ON_THE_HUB), "hf_friend"
    return there


def refused(there: Hub, folder: Path, name: str, token: str | None = None) -> str:
    with pytest.raises(WeightsError) as caught:
        pull_network(name, folder, token=token, endpoint=there.address)
    return str(caught.value)


def test_a_network_comes_into_a_folder_of_its_own_without_what_the_hub_lacks(gated: Hub, tmp_path: Path) -> None:
    own = pull_network("sam3", tmp_path, token="hf_friend", endpoint=gated.address)
    assert own == found(network("sam3"), tmp_path) == tmp_path / "sam3"
    there = {path.name: path.read_bytes() for path in own.iterdir() if path.suffix != ".sha256"}
    assert there == SAM3_ON_THE_HUB
    assert [path.name for path in tmp_path.iterdir()] == ["sam3"]


def test_two_networks_with_files_of_the_same_names_do_not_meet(there: Hub, tmp_path: Path) -> None:
    for name, data in (("sam2", b"large"), ("sam2-small", b"small")):
        there.files = {"config.json": b"{}", "model.safetensors": data}
        assert (pull_network(name, tmp_path, endpoint=there.address) / "model.safetensors").read_bytes() == data
    assert (tmp_path / "sam2" / "model.safetensors").read_bytes() == b"large"


@pytest.mark.parametrize("token", [None, "hf_stranger"], ids=["401 without a token", "403 without access"])
def test_a_gated_network_says_how_to_be_let_in(gated: Hub, tmp_path: Path, token: str | None) -> None:
    assert refused(gated, tmp_path, "sam3", token) == ASK
    assert not (tmp_path / "sam3").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_invalid_or_may_too_little_hears_the_same(gated: Hub, tmp_path: Path, status: int) -> None:
    gated.status = status
    assert refused(gated, tmp_path, "sam3", "hf_friend") == ASK


def test_without_a_route_to_the_hub_the_setting_for_files_is_named(tmp_path: Path) -> None:
    gone = Hub(address="http://127.0.0.1:9")
    said = refused(gone, tmp_path, "sam3")
    assert said == "the hub cannot be reached (ConnectError): try later, or set SAM3_WEIGHTS_PATH to where the files lie"


def test_a_file_that_is_needed_and_absent_is_named_before_anything_large_is_fetched(gated: Hub, tmp_path: Path) -> None:
    del gated.files["tokenizer.json"]
    with pytest.raises(AbsentError, match=r"there is no tokenizer\.json in facebook/sam3 on the hub"):
        pull_network("sam3", tmp_path, token="hf_friend", endpoint=gated.address)
    assert len(gated.ranges) == 1


def test_a_network_is_gone_on_with_where_it_stopped(gated: Hub, tmp_path: Path) -> None:
    (tmp_path / "sam3").mkdir()
    (tmp_path / "sam3" / f"model.safetensors.{DIGEST[:16]}.part").write_bytes(DATA[:600_000])
    heard: list[tuple[str, int, int | None]] = []
    token = "hf_friend"
    for _ in range(2):
        pull_network("sam3", tmp_path, token=token, endpoint=gated.address, progress=lambda *told: heard.append(told))
    assert gated.ranges == [None, None, None, "bytes=600000-"]
    assert heard[-1] == ("model.safetensors", len(DATA), len(DATA))
    assert ("model.safetensors", 600_000, len(DATA)) in heard


def test_a_network_is_found_when_what_it_needs_is_there(tmp_path: Path) -> None:
    sam3 = network("sam3")
    for needed in [file.name for file in sam3.files if not file.optional]:
        assert found(sam3, tmp_path) is None
        (tmp_path / "sam3").mkdir(exist_ok=True)
        (tmp_path / "sam3" / needed).touch()
    assert found(sam3, tmp_path) == tmp_path / "sam3"


def test_what_is_missing_is_told_with_the_command_that_gets_it(tmp_path: Path) -> None:
    assert how_to_get("sam2", tmp_path) == f"sam2 has no weights in {tmp_path}/sam2; run: maskd weights pull sam2"
    assert how_to_get("sam3", tmp_path) == (
        f"sam3 has no weights in {tmp_path}/sam3; run: maskd weights pull sam3 (after this: request access at "
        "https://huggingface.co/facebook/sam3, create a token at https://huggingface.co/settings/tokens, set HF_TOKEN), "
        "or set SAM3_WEIGHTS_PATH to where the files lie"
    )


def test_files_of_a_network_may_lie_in_folders(there: Hub, tmp_path: Path) -> None:
    path = pull(WeightsFile("unet/net.onnx", "someone/nets"), tmp_path / "own", endpoint=there.address)
    assert (path, state(path)) == (tmp_path / "own" / "unet" / "net.onnx", State.WHOLE)


def test_what_is_not_on_the_hub_is_told_with_where_it_is_and_used_once_it_is_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        pull_network("lama", tmp_path)
    assert str(caught.value) == how_to_get("lama", tmp_path)
    assert f"big-lama.pt is not on the hub; fetch it into {tmp_path}/lama from https://github.com/" in str(caught.value)
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "big-lama.pt").write_bytes(DATA)
    assert pull_network("lama", tmp_path) == found(network("lama"), tmp_path) == tmp_path / "lama"


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


def test_no_two_files_share_a_place_and_every_network_says_where_it_is_from() -> None:
    places = [(net.folder, file.name) for net in NETWORKS for file in net.files]
    assert len(places) == len(set(places))
    assert all(net.licence and net.purpose and net.megabytes and all(file.repo for file in net.files) for net in NETWORKS)
    assert [file.name for file in network("mobile-sam").files] == [weights.ENCODER_FILE, weights.DECODER_FILE]
