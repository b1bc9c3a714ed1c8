"""SAM 3's vocabulary in its three forms, and texts that are computed once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.sam3_checkpoints import TOKENS, needs_sam3, save_vocabulary

from models.sam3_text import META_FILE, Texts, byte_letters, load_vocabulary
from models.weights import WeightsError

needs_sam3()
import torch  # noqa: E402  the tests are skipped without it

FORMS = ["tokenizer.json", "vocab.json", META_FILE]
WORDS = ["cup", "the cup", "The  CUP!", "émigré's 12 ×", "", "a" * 100]


class Encoder:
    """Features that show which tokens they come from, and how many calls there were."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, ids: Any, mask: Any) -> Any:
        self.calls.append(len(ids))
        return (ids * mask).float()[..., None].expand(-1, -1, 4)


def texts_of(folder: Path, **limits: int) -> tuple[Texts, Encoder]:
    encoder = Encoder()
    return Texts(load_vocabulary(folder, TOKENS), encoder, 8, **limits), encoder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_vocabulary(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_tokens_of_the_librarys_tokenizer(tmp_path: Path, form: str) -> None:
    from transformers import CLIPTokenizer

    library, ours = tmp_path / "library", tmp_path / "ours"
    for place in (library, ours):
        place.mkdir()
    save_vocabulary(library)
    save_vocabulary(ours, form)
    reference = CLIPTokenizer.from_pretrained(library, local_files_only=True)
    vocabulary = load_vocabulary(ours, TOKENS)
    assert [vocabulary.ids(text) for text in WORDS] == [reference(text).input_ids for text in WORDS]
    assert vocabulary.ids("the cup") == [516, 515, 513, 517]


def test_a_file_may_be_named_in_place_of_its_folder(tmp_path: Path) -> None:
    save_vocabulary(tmp_path, META_FILE)
    save_vocabulary(tmp_path)
    assert load_vocabulary(tmp_path / META_FILE, TOKENS).ids("cup") == load_vocabulary(tmp_path / "tokenizer.json", TOKENS).ids(
        "cup"
    )


def test_bytes_have_the_letters_of_clips_first_tokens() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    letters = byte_letters()
    assert (len(letters), set(letters)) == (256, set(ByteLevel.alphabet()))
    assert [letters.index(letter) for letter in "!a¡®ÿĀ"] == [0, 64, 94, 106, 187, 188]  # as in CLIP's vocab.json


def test_texts_are_filled_up_with_ends_that_do_not_count(folder: Path) -> None:
    texts, _ = texts_of(folder)
    features, mask = texts.features(["the cup"])
    assert features[0, :, 0].tolist() == [516, 515, 513, 517, 0, 0, 0, 0]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_too_long_a_text_is_cut_before_its_end_and_counted_in_full(folder: Path) -> None:
    texts, _ = texts_of(folder)
    features, mask = texts.features(["cup " * 20])
    assert features[0, :, 0].tolist() == [516, *[513] * 6, 517]
    assert mask.sum() == 8
    assert texts.tokens("cup " * 20) == 22


def test_a_text_is_computed_once_and_several_together(folder: Path) -> None:
    texts, encoder = texts_of(folder)
    first, _ = texts.features(["cup", "the", "cup"])
    again, _ = texts.features(["the", "cup"])
    assert encoder.calls == [2]
    assert torch.equal(first[1], again[0])
    assert torch.equal(first[0], first[2])


def test_the_least_recently_used_text_is_forgotten(folder: Path) -> None:
    texts, encoder = texts_of(folder, entries_max=2)
    for words in (["a"], ["b"], ["a"], ["c"], ["a"], ["b"]):
        texts.features(words)
    assert encoder.calls == [1] * 4
    texts.features(["a", "b", "c", "d"])  # more at once than are kept


def test_threads_ask_without_waiting_for_each_other(folder: Path) -> None:
    barrier = threading.Barrier(4)
    texts, _ = texts_of(folder, entries_max=3)

    def ask(number: int) -> bool:
        barrier.wait()
        words = [f"cup {(number + turn) % 5}" for turn in range(50)]
        return all(texts.features([word])[0][0, 2, 0].item() == texts._vocabulary.ids(word)[2] for word in words)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(4)))


def test_without_a_vocabulary_the_operator_hears_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"put tokenizer.json of facebook/sam3, or {META_FILE} .* into {tmp_path}"):
        load_vocabulary(tmp_path, TOKENS)


def test_a_damaged_vocabulary_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_vocabulary(folder, TOKENS)


def test_a_vocabulary_of_another_network_is_refused(folder: Path) -> None:
    with pytest.raises(WeightsError, match="has 518 tokens: the network knows 500"):
        load_vocabulary(folder, 500)
