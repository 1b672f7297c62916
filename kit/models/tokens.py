"""Text → encodings → padded batch, from a folder's `tokenizer.json`. Owns truncation. Knows no task and no model.

Works on the `tokenizers` library directly, so that the text can be cut to what remains beside an uncut pair, and so that a text
shared by several pairs (the context of five options) is tokenised once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Encoding as RustEncoding

from kit.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from kit.tasks import Batch, Encoding

FILE = "tokenizer.json"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD_NAMES = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")


class HFTokens:
    """The fast tokenizer of a model folder. limit: longest sequence the model has positions for."""

    def __init__(self, folder: Path, *, limit: int = 512) -> None:
        path = Path(folder) / FILE
        if not path.is_file():
            raise BundleError(f"{folder}: no {FILE}: make one from the slow tokenizer when the weights are packed (a fast tokenizer is read, never built, offline)")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise BundleError(f"{path}: not a readable tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "[SEP]" written in a question is text, not a separator
        self.limit = limit
        self.pad_id = next((id_ for name in _PAD_NAMES if (id_ := self._tokenizer.token_to_id(name)) is not None), 0)
        self._of_texts = _without_special_pieces(self._tokenizer)
        self._plain = lru_cache(maxsize=4096)(self._encode_plain)

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0) -> list[Encoding]:
        """See kit.tasks.Tokens. A pair longer than `max_length` stays whole up to `limit`; beyond that its beginning goes."""
        first = self._plain(text)
        second = None if pair is None else self._plain(pair)
        special = self._tokenizer.num_special_tokens_to_add(pair is not None)
        room = min(max_length, self.limit) - special - (len(second) if second else 0)
        if second is not None and room < 0:
            second = self._cut_start(pair, self.limit - special)
            room = 0
        if stride >= max(room, 1) > 0 and len(first) > room:
            raise ConfigError(f"stride of {stride} tokens leaves no step in windows of {room}: lower task.stride or raise task.max_length")
        windows = self._windows(first, room, stride)
        return [_arrays(self._tokenizer.post_process(window, second), len(window)) for window in windows]

    def pad(self, encodings: Sequence[Encoding]) -> Batch:
        """See kit.tasks.Tokens: int64 input_ids, attention_mask and token_type_ids, int8 segment (-1 where special or padding)."""
        shape = (len(encodings), max(len(encoding["input_ids"]) for encoding in encodings))
        ids = np.full(shape, self.pad_id, np.int64)
        mask = np.zeros(shape, np.int64)
        types = np.zeros(shape, np.int64)
        segment = np.full(shape, -1, np.int8)
        for row, encoding in enumerate(encodings):
            length = len(encoding["input_ids"])
            ids[row, :length] = encoding["input_ids"]
            mask[row, :length] = 1
            types[row, :length] = encoding["types"]
            segment[row, :length] = encoding["segment"]
        arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "segment": segment}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def id(self, word: str) -> int:
        """See kit.tasks.Tokens."""
        ids = self._encode_plain(word).ids
        if len(ids) != 1:
            raise ConfigError(f"{word!r} is {len(ids)} tokens of this tokenizer, not one: choose another word")
        return ids[0]

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def save(self, folder: Path) -> None:
        """See kit.tasks.Tokens: writes tokenizer.json."""
        self._tokenizer.save(str(Path(folder) / FILE))

    def _encode_plain(self, text: str) -> RustEncoding:
        return self._of_texts.encode(text, add_special_tokens=False)

    def _windows(self, first: RustEncoding, room: int, stride: int) -> list[RustEncoding]:
        if len(first) <= room:
            return [first]
        whole = RustEncoding.merge([first], growing_offsets=False)  # a copy: truncate works in place, the cached one must stay whole
        whole.truncate(room, stride=stride if room else 0)
        return [whole, *whole.overflowing] if stride else [whole]

    def _cut_start(self, text: str | None, room: int) -> RustEncoding:
        encoding = self._encode_plain(text or "")
        encoding.truncate(room, direction="left")
        return encoding


def _without_special_pieces(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer for texts, to which special tokens mean nothing: a Unigram model has them among its pieces, which sentencepiece passes over.

    Those pieces get names that stand in no text: a noncharacter and a blank, which is a "▁" before pieces are looked for.
    """
    if not isinstance(tokenizer.model, models.Unigram):
        return tokenizer
    special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [(f"\uffff {piece}" if id_ in special else piece, score) for id_, (piece, score) in enumerate(model["vocab"])]
    made = Tokenizer.from_str(tokenizer.to_str())
    made.model = models.Unigram(pieces, model["unk_id"], model["byte_fallback"])
    made.encode_special_tokens = True
    return made


def _arrays(encoding: RustEncoding, first: int) -> Encoding:
    """The arrays of one sequence whose first `first` tokens, specials not counted, are the text and the others the pair."""
    special = np.array(encoding.special_tokens_mask, bool)
    segment = np.full(len(special), -1, np.int8)
    segment[~special] = np.arange((~special).sum()) >= first
    return {
        "input_ids": np.array(encoding.ids, np.int32),
        "types": np.array(encoding.type_ids, np.int8),
        "segment": segment,
        "offsets": np.array(encoding.offsets, np.int32).reshape(-1, 2),
    }


def train_wordpiece(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train an uncased WordPiece tokenizer on the texts and write its tokenizer.json (the same bytes for the same texts)."""
    texts = list(texts)
    tokenizer = _untrained(models.WordPiece(unk_token="[UNK]"))
    # the trainer numbers "##a" … in the order of a hash table, and breaks ties by number: names given beforehand keep theirs
    fixed = [*_SPECIAL, *_inner_letters(tokenizer, texts)]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False))
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    trained = _untrained(models.WordPiece(vocab, unk_token="[UNK]"))  # anew, without "##a" … as special tokens
    trained.add_special_tokens([AddedToken(name, special=True) for name in _SPECIAL])
    cls, sep = vocab["[CLS]"], vocab["[SEP]"]
    trained.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    trained.save(str(Path(folder) / FILE))


def _untrained(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _inner_letters(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The pieces "##a" … for every letter that stands inside a word of the texts, sorted."""
    words = {word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))}
    return [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
