"""Text → encodings → padded batch, from a folder's `tokenizer.json`. Owns truncation. Knows no task and no model.

Works on the `tokenizers` library directly, so that the text can be cut to what remains beside an uncut pair, and so that a text
shared by several pairs (the context of five options) is tokenised once. Prompts and their continuations are tokenised so that
together they are what the whole text would be, and special tokens come from post-processor and chat template, never from a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Encoding as RustEncoding

from kit.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from kit.tasks import Batch, Encoding

FILE = "tokenizer.json"
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_PAD_NAMES = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
_EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<|im_end|>")  # where tokenizer_config.json names none
_OPEN, _CLOSE, _BREAK = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters, which stand in no text: around a special token, and inside what only looks like one
_CHAT = _OPEN + _CLOSE  # begins what a chat template gave: it holds all special tokens there are
_MARKS = str.maketrans(dict.fromkeys((_OPEN, _CLOSE, _BREAK), "\ufffd"))
_ANCHORS = (")", "1", "a", "\n")  # texts that another may follow; some tokenizers join one or the other with what follows
_NO_SPACE_AFTER = "([{<\"'`“‘«*_/"  # and white space, and special tokens
_SHOWN = 30  # characters of an error message
_ANSWERS = (*ascii_uppercase, "Yes", "No")  # what prompts ask for


class HFTokens:
    """The fast tokenizer of a model folder. limit: longest sequence the model has positions for; stretches: it has no end, and a longer `max_length` is kept."""

    def __init__(self, folder: Path, *, limit: int = 512, stretches: bool = False) -> None:
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
        self._folder = Path(folder)
        self._roles, self._template = _read_settings(self._folder)
        self.limit = limit
        self._stretches = stretches
        self.pad_id = next((id_ for name in _PAD_NAMES if (id_ := self._tokenizer.token_to_id(name)) is not None), 0)
        self._of_texts = _without_special_pieces(self._tokenizer)
        self._plain = lru_cache(maxsize=4096)(self._encode_plain)

    def encode(self, text: str, pair: str | None = None, *, max_length: int, stride: int = 0, pair_first: bool = False) -> list[Encoding]:
        """See kit.tasks.Tokens. A pair longer than `max_length` stays whole up to `limit`; beyond that its beginning goes."""
        first = self._plain(text)
        second = None if pair is None else self._plain(pair)
        special = self._tokenizer.num_special_tokens_to_add(pair is not None)
        limit = max(self.limit, max_length) if self._stretches else self.limit
        room = min(max_length, limit) - special - (len(second) if second else 0)
        if second is not None and room < 0:
            second = self._cut_start(pair, limit - special)
            room = 0
        if stride >= max(room, 1) > 0 and len(first) > room:
            raise ConfigError(f"stride of {stride} tokens leaves no step in windows of {room}: lower task.stride or raise task.max_length")
        windows = self._windows(first, room, stride)
        if second is None or not pair_first:
            return [_arrays(self._tokenizer.post_process(window, second), len(window)) for window in windows]
        swapped = [_arrays(self._tokenizer.post_process(second, window), len(second)) for window in windows]
        return [{**encoding, "segment": np.where(encoding["segment"] < 0, -1, 1 - encoding["segment"]).astype(np.int8)} for encoding in swapped]

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

    def prompt(self, text: str, cut: tuple[int, int], *, max_length: int) -> Encoding:
        """See kit.tasks.PromptTokens. Never empty: what has no token becomes the one that ends a text, as GPT-2 begins one."""
        shift = len(_CHAT) if text.startswith(_CHAT) else 0
        pieces = self._pieces(text[shift:])
        leading = [] if shift else self._leading
        kept = _fitting(pieces, (cut[0] - shift, cut[1] - shift), min(max_length, self.limit) - len(leading))
        ids = [*leading, *(pieces.ids[index] for index in kept)] or [self.pad_id if self.eos_id is None else self.eos_id]
        special = [True] * len(leading) + [pieces.special[index] for index in kept]
        offsets = [(0, 0)] * len(leading) + [(pieces.offsets[index][0] + shift, pieces.offsets[index][1] + shift) for index in kept]
        return _sequence(ids, special or [True], offsets or [(0, 0)])

    def branch(self, text: str, *, end: bool = False) -> Encoding:
        """See kit.tasks.PromptTokens."""
        pieces, begin = self._continued(text)
        offsets = [(start - begin, stop - begin) for start, stop in pieces.offsets]
        last = [self.eos_id] if end and self.eos_id is not None else []
        return _sequence([*pieces.ids, *last], [*pieces.special, *(True for _ in last)], [*offsets, *((0, 0) for _ in last)])

    def join(self, groups: Sequence[Sequence[Encoding]]) -> Batch:
        """See kit.tasks.PromptTokens."""
        shape = (len(groups), max(sum(len(encoding["input_ids"]) for encoding in group) for group in groups))
        ids = np.full(shape, self.pad_id, np.int64)
        positions = np.zeros(shape, np.int64)
        branch = np.full(shape, -1, np.int64)
        for row, group in enumerate(groups):
            column, trunk = 0, len(group[0]["input_ids"])
            for number, encoding in enumerate(group):
                length = len(encoding["input_ids"])
                place = slice(column, column + length)
                ids[row, place], branch[row, place] = encoding["input_ids"], number
                positions[row, place] = np.arange(length) + (trunk if number else 0)
                column += length
        return {name: torch.from_numpy(array) for name, array in (("input_ids", ids), ("position_ids", positions), ("branch", branch))}

    def letter_ids(self, letters: Sequence[str], after: str) -> list[int]:
        """See kit.tasks.PromptTokens: the letters with a space in front, unless `after` ends with white space, a bracket or a special token."""
        after = after.removeprefix(_CHAT)
        gap = "" if not after or after[-1].isspace() or after[-1] in _NO_SPACE_AFTER + _CLOSE else " "
        found: dict[int, str] = {}
        for letter in letters:
            ids = self._next(after, gap + letter)
            if not ids or self._marked.unknown in ids:  # neighbours that are unknown melt into one
                raise ConfigError(f"{letter!r} is unknown to this tokenizer: {_WAY_OUT}")
            if len(ids) != 1:
                raise ConfigError(f"{letter!r} is {len(ids)} tokens after {_end(after)!r} in this tokenizer, not one: {_WAY_OUT}")
            if ids[0] in found:
                raise ConfigError(f"{letter!r} and {found[ids[0]]!r} are the same token after {_end(after)!r} in this tokenizer: {_WAY_OUT}")
            found[ids[0]] = letter
        return list(found)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """See kit.tasks.PromptTokens: chat_template.jinja, or the template in tokenizer_config.json, rendered by transformers.

        What the template writes of special tokens is marked by noncharacters, which `prompt` and `branch` understand.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        if self._template is None:
            raise ConfigError(f"{self._folder}: neither {_TEMPLATE} nor {_CONFIG} holds a chat template: set task.chat = false, or take the chat model's tokenizer")
        looks_like_one = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))) or "(?!)")
        contents = [looks_like_one.sub(lambda found: found[0][0] + _BREAK + found[0][1:], self.plain(message["content"])) for message in messages]
        conversation = [{**message, "content": content} for message, content in zip(messages, contents, strict=True)]
        try:
            (rendered,), _ = render_jinja_template([conversation], chat_template=self._template, add_generation_prompt=True, **self._named)
        except Exception as error:  # jinja2's, and whatever a template does
            why = " ".join(str(error).split())[:200]
            raise ConfigError(f"{self._folder}: the chat template cannot be filled in ({why}): set task.chat = false, or mend it") from None
        return _CHAT + looks_like_one.sub(f"{_OPEN}\\g<0>{_CLOSE}", rendered).replace(_BREAK, "")

    def plain(self, text: str) -> str:
        """See kit.tasks.PromptTokens."""
        return text.translate(_MARKS)

    @cached_property
    def bos_id(self) -> int | None:
        """The token that begins a text: as tokenizer_config.json names it, else the first that the post-processor puts in front."""
        named = self._tokenizer.token_to_id(self._roles.get("bos_token", ""))
        return named if named is not None else next(iter(self._leading), None)

    @cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text: as tokenizer_config.json names it, else by its usual names."""
        special = {token.content: id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        names = [self._roles["eos_token"]] if "eos_token" in self._roles else _EOS_NAMES
        return next((special[name] for name in names if name in special), None)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def save(self, folder: Path) -> None:
        """See kit.tasks.Tokens: writes tokenizer.json; where they are known also the roles of special tokens and the chat template."""
        self._tokenizer.save(str(Path(folder) / FILE))
        if self._roles:
            settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **self._roles}, ensure_ascii=False, indent=2)
            (Path(folder) / _CONFIG).write_text(settings, encoding="utf-8")
        if self._template is not None:
            (Path(folder) / _TEMPLATE).write_bytes(self._template.encode())

    @cached_property
    def _leading(self) -> list[int]:
        """The special tokens that the post-processor puts before a single text."""
        made = self._tokenizer.post_process(self._encode_plain("a"))
        count = next((index for index, special in enumerate(made.special_tokens_mask) if not special), 0)
        return made.ids[:count]

    @cached_property
    def _named(self) -> dict[str, str]:
        """Special tokens by role, as a chat template asks for them."""
        found = {role: id_ for role, id_ in (("bos_token", self.bos_id), ("eos_token", self.eos_id)) if id_ is not None}
        return {role: str(self._tokenizer.id_to_token(id_)) for role, id_ in found.items()} | self._roles

    @cached_property
    def _control(self) -> set[str]:
        """Tokens that have a meaning of their own: the special ones, and what the chat template writes of the others that were added."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return {token.content for token in added if token.special or token.content in (self._template or "")}

    @cached_property
    def _marked(self) -> _Marked:
        """The tokenizer for prompts, to which a special token has a meaning between marks only."""
        values = json.loads(self._of_texts.to_str())
        for token in values["added_tokens"]:
            if token["content"] in self._control:
                token |= {"content": f"{_OPEN}{token['content']}{_CLOSE}", "normalized": False, "special": True}
        values["post_processor"] = None
        made = Tokenizer.from_str(json.dumps(values))
        vocabulary, model = made.get_vocab(), values["model"]
        ids = {vocabulary[token["content"]]: int(token["id"]) for token in values["added_tokens"]}
        special = {vocabulary[token["content"]] for token in values["added_tokens"] if token["special"]}
        return _Marked(made, ids, special, model["unk_id"] if "unk_id" in model else vocabulary.get(model.get("unk_token") or ""))

    def _pieces(self, text: str) -> _Pieces:
        """A text's tokens; marked special tokens in it are theirs."""
        marked = self._marked
        made = marked.tokenizer.encode(text, add_special_tokens=False)
        return _Pieces([marked.ids.get(id_, id_) for id_ in made.ids], made.offsets, [id_ in marked.special for id_ in made.ids])

    def _continued(self, text: str) -> tuple[_Pieces, int]:
        """A text's tokens where another text stands before it, and where it begins in their offsets.

        Tokenised behind a short text whose tokens stay as they are: a sentencepiece model then has its dummy prefix elsewhere.
        """
        for anchor in _ANCHORS:
            alone, both = self._pieces(anchor), self._pieces(anchor + text)
            count = len(alone.ids)
            if count and both.ids[:count] == alone.ids and both.offsets[count - 1][1] == len(anchor):
                return _Pieces(both.ids[count:], both.offsets[count:], both.special[count:]), len(anchor)
        return self._pieces(text), 0

    def _next(self, before: str, text: str) -> list[int]:
        """The tokens by which `text` goes on from `before`: those of the whole text where they begin as `before` does, else those of a branch."""
        head, whole = self._pieces(before).ids, self._pieces(before + text).ids
        return whole[len(head) :] if whole[: len(head)] == head else self._continued(text)[0].ids

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


class _Marked(NamedTuple):
    """A tokenizer whose special tokens have marks around their names. ids: of its added tokens → their real ones. special: its ids. unknown: the id."""

    tokenizer: Tokenizer
    ids: dict[int, int]
    special: set[int]
    unknown: int | None


class _Pieces(NamedTuple):
    """Tokens of a text: ids, characters, and whether they are special."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]


_WAY_OUT = 'end the template otherwise ("Answer:", "Answer: " or "("), or choose task.form = "likelihood"'


def _end(text: str) -> str:
    """The last line of a text, to show."""
    text = text.replace(_OPEN, "").replace(_CLOSE, "")
    shown = text.rstrip()
    return shown.rsplit("\n", 1)[-1][-_SHOWN:] + text[len(shown) :]


def _fitting(pieces: _Pieces, cut: tuple[int, int], room: int) -> list[int]:
    """Positions of the tokens that stay: at most `room`. First those within the characters `cut` go, from its end, then from the beginning of the text.

    Special tokens at the very beginning stay.
    """
    excess = max(0, len(pieces.ids) - room)
    inside = [index for index, (start, stop) in enumerate(pieces.offsets) if cut[0] <= start < stop <= cut[1] and not pieces.special[index]]
    gone = set(inside[max(0, len(inside) - excess) :])
    kept = [index for index in range(len(pieces.ids)) if index not in gone]
    head = next((place for place, index in enumerate(kept) if not pieces.special[index]), len(kept))
    return kept[:head] + kept[head + max(0, len(kept) - room) :]


def _sequence(ids: Sequence[int], special: Sequence[bool], offsets: Sequence[tuple[int, int]]) -> Encoding:
    """The arrays of one text."""
    return {
        "input_ids": np.array(ids, np.int32),
        "types": np.zeros(len(ids), np.int8),
        "segment": np.where(np.array(special, bool), -1, 0).astype(np.int8),
        "offsets": np.array(offsets, np.int32).reshape(-1, 2),
    }


def _read_settings(folder: Path) -> tuple[dict[str, str], str | None]:
    """Special tokens by role (bos_token …), and the chat template if there is one. Raises BundleError."""
    path, own = folder / _CONFIG, folder / _TEMPLATE
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        template = own.read_bytes().decode() if own.is_file() else values.get("chat_template")
        if isinstance(template, list):  # several by name
            template = next((one["template"] for one in template if one["name"] == "default"), None)
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: cannot be read ({error}): copy it again from where the model came") from None
    texts = {role: token.get("content") if isinstance(token, dict) else token for role, token in values.items() if role.endswith("_token")}
    return {role: token for role, token in texts.items() if isinstance(token, str)}, template


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
    """The arrays of one sequence whose first `first` tokens, specials not counted, are of segment 0 and the others of segment 1."""
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


def train_byte_level(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer as decoders have it, "<s> text", and write its tokenizer.json (the same bytes for the same texts).

    The answers that prompts ask for (" A", " Yes" …) become tokens of their own.
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    answers = "".join(f" {answer}" for answer in _ANSWERS)
    tokenizer.train_from_iterator([*texts, *[answers] * (len(texts) + 2)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / FILE))


def _untrained(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _inner_letters(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The pieces "##a" … for every letter that stands inside a word of the texts, sorted."""
    words = {word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))}
    return [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
