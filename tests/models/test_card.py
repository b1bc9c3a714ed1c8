"""A card's memory: what has not been used for longest makes room. The host's memory stands in for a card's, the networks are
real."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install torch==2.13.0")

from models import torch_device  # noqa: E402
from models.card import WEIGHTS_SHARE, Card, weights_bytes  # noqa: E402

BYTES = 4000
BUDGET = int(2 * BYTES / WEIGHTS_SHARE) + 1


def networks(count: int) -> list[Any]:
    return [torch.nn.Linear(100, 10, bias=False) for _ in range(count)]


def test_weights_are_parameters_and_buffers() -> None:
    normal = torch.nn.BatchNorm1d(10)
    assert (weights_bytes(networks(1)[0]), weights_bytes(normal)) == (BYTES, 4 * 40 + 8)


def test_the_least_recently_used_leaves_when_the_card_is_full() -> None:
    card, (a, b, c) = Card("cpu", BUDGET), networks(3)
    for network in (a, b, a, c):
        card.bring([network])
    assert card.resident == [a, c]


def test_what_runs_together_stays_together_even_above_the_share() -> None:
    card, (a, b, c) = Card("cpu", BUDGET), networks(3)
    card.bring([a, b, c])
    assert card.resident == [a, b, c]
    card.bring([b])
    assert card.resident == [c, b]


def test_without_a_budget_nothing_leaves() -> None:
    card, made = Card("cpu", None), networks(5)
    for network in made:
        card.bring([network])
    assert card.resident == made


def test_an_engine_is_one_network_however_often_it_runs() -> None:
    from support.sam2_checkpoints import engine as sam2
    from support.sam3_checkpoints import engine as sam3

    card = Card("cpu", None)
    for _ in range(10):
        for made in (sam2(), sam3()):
            card.bring([made.network])
    assert [id(network) for network in card.resident] == [id(sam2().network), id(sam3().network)]


@pytest.mark.gpu
def test_networks_move_between_card_and_host() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    card, (a, b) = Card("cuda:0", None), networks(2)
    card.budget_bytes = int(BYTES / WEIGHTS_SHARE) + 1
    card.bring([a])
    card.bring([b])
    assert (a.weight.device.type, b.weight.device.type) == ("cpu", "cuda")


@pytest.mark.gpu
def test_the_memory_of_a_card_is_told() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    before = torch_device.memory("cuda:0", None)
    kept = torch.zeros(1 << 20, device="cuda:0")
    after = torch_device.memory("cuda:0", 1 << 30)
    assert after["allocated"] == before["allocated"] + kept.nbytes
    assert after["allocated"] <= after["reserved"] <= after["total"] == before["total"] == before["budget"]
    assert after["budget"] == 1 << 30
