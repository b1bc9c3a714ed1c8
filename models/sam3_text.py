"""Texts as SAM 3 reads them: tokens by CLIP's vocabulary, and features that are computed once a text.

Enters: words. Leaves: features with their attention mask, on the device. The vocabulary lies beside the weights in one of three
forms: `tokenizer.json`, `vocab.json` with `merges.txt`, or the file of Meta's repository.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.weights import WeightsError

Tensor = Any
Encode = Callable[[Tensor, Tensor], Tensor]
"""Token ids and attention mask, both (n, tokens_max) int64 on the CPU, to features (n, tokens_max, width) on the device."""

START, END = "<|startoftext|>", "<|endoftext|>"
META_FILE = "bpe_simple_vocab_16e6.txt.gz"
META_MERGES = 48_894
"""How many of that file's merges count, after a line of remarks: 49,408 tokens less 512 of bytes and 2 of ends."""
TEXTS_MAX = 1000
"""Kept texts of 32 tokens are 16 KB each in half precision."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """CLIP's tokenizer. `backend` is never changed, which is why threads may share it."""

    backend: Any
    end: int

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, its ends included, however many there are."""
        found: list[int] = self.backend.encode(text).ids
        return found


class Texts:
    """Features of texts, least recently used goes first. Safe on many threads: two may compute the same text, neither waits."""

    def __init__(self, vocabulary: Vocabulary, encode: Encode, tokens_max: int, entries_max: int = TEXTS_MAX) -> None:
        self.tokens_max = tokens_max
        self._vocabulary = vocabulary
        self._encode = encode
        self._entries_max = entries_max
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def tokens(self, text: str) -> int:
        """How many tokens a text has, its ends included."""
        return len(self._vocabulary.ids(text))

    def features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Features (n, tokens_max, width) and attention mask (n, tokens_max), int64, on the device; texts may come twice. What
        is over `tokens_max` is cut off."""
        import torch

        with self._lock:
            found = {text: self._kept[text] for text in texts if text in self._kept}
        lacking = list(dict.fromkeys(text for text in texts if text not in found))
        if lacking:
            found.update(self._computed(lacking))
        with self._lock:
            for text in dict.fromkeys(texts):
                self._kept[text] = found[text]
                self._kept.move_to_end(text)
            while len(self._kept) > self._entries_max:
                self._kept.popitem(last=False)
        return torch.stack([found[text][0] for text in texts]), torch.stack([found[text][1] for text in texts])

    def _computed(self, texts: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        import torch

        ids = torch.full((len(texts), self.tokens_max), self._vocabulary.end)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            own = self._vocabulary.ids(text)
            own = own if len(own) <= self.tokens_max else [*own[: self.tokens_max - 1], self._vocabulary.end]
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = 1
        features = self._encode(ids, mask)
        mask = mask.to(features.device)
        return {text: (features[row].clone(), mask[row].clone()) for row, text in enumerate(texts)}


def load_vocabulary(path: Path, size: int) -> Vocabulary:
    """The vocabulary of a folder or file, for a network that knows `size` tokens. Raises WeightsError that says what to put
    where."""
    backend = _backend(path)
    end = backend.token_to_id(END)
    if end is None or backend.token_to_id(START) is None:
        raise WeightsError(f"the vocabulary in {path} is not CLIP's: it lacks {START} or {END}")
    if backend.get_vocab_size() > size:
        raise WeightsError(f"the vocabulary in {path} has {backend.get_vocab_size()} tokens: the network knows {size}")
    backend.no_padding()
    backend.no_truncation()
    return Vocabulary(backend, end)


def _backend(path: Path) -> Any:
    """The tokenizer of the first form that is there."""
    from tokenizers import Tokenizer

    folder = path if path.is_dir() else path.parent
    try:
        if path.is_file() and path.name.endswith(".gz"):
            return _from_meta(path)
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            return _clip(vocab, _pairs((folder / "merges.txt").read_text(encoding="utf-8").split("\n")))
        if (folder / META_FILE).is_file():
            return _from_meta(folder / META_FILE)
    except Exception as error:  # the libraries raise what they like at a damaged file
        raise WeightsError(f"the vocabulary in {folder} cannot be read: {' '.join(str(error).split())[:200]}") from error
    raise WeightsError(
        f"SAM 3 needs its vocabulary: put tokenizer.json of facebook/sam3, or {META_FILE} of Meta's repository, into {folder}"
    )


def _from_meta(path: Path) -> Any:
    """The tokenizer of Meta's file: a token per byte, one per byte at a word's end, one per merge, and the ends."""
    pairs = _pairs(gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[: META_MERGES + 1])
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in pairs), START, END]
    return _clip({token: index for index, token in enumerate(tokens)}, pairs)


def byte_letters() -> list[str]:
    """A printable letter per byte, in the order of CLIP's first 256 tokens: printable bytes first, as themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def _pairs(lines: Sequence[str]) -> list[tuple[str, str]]:
    """The merges of a file whose first line is a remark."""
    halves = (line.split() for line in lines[1:])
    return [(pair[0], pair[1]) for pair in halves if len(pair) == 2]


def _clip(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocab, merges=merges).backend_tokenizer
