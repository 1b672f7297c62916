"""Slow tokenizer files → a tokenizer.json that is proven to give the same ids. Knows no weights and no bundle.

Built from the vocabulary files themselves and not by loading the folder with transformers: its version 5 leaves out sentencepiece's own
normalisation for DeBERTa ("x²" becomes [UNK]; seen in 5.0 and 5.23), and 5.0 also [CLS] and [SEP]. The peer of the proof is the
sentencepiece library, transformers' slow BERT, or byte-level BPE written out plainly.
"""

# ruff: noqa: RUF001  # letters that look alike are what the texts are for
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kit.errors import BundleError, DependencyError

FILE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
AS_IT_IS = "PreTrainedTokenizerFast"  # the class that loads a tokenizer.json unchanged
DIFFICULT = (
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    " a leading and a trailing space ",
    "two  spaces   three    and\tone\ttab",
    "line\nbreaks\r\nof\n\n\nevery \n kind\u2028and\u2029separators",
    "  \t \n mixed at both ends \n\t ",
    "no-break\u00a0space\u00a0\u3000ideographic\u2009thin\u200bzero width\u200b",
    "\ufeffbyte order mark, soft\u00adhyphen, \x01control\x7f and \ufffd",
    "e\u0301 is é, \u212b is Å, ﬁ and ﬂ are ligatures, ß ẞ İ ı ǅ",
    "x² + y₂ = 10⁻³ µm, ½ of 5 °C ± 0.1 ‰, ≤ ∞ ™ ① Ⅳ",
    r"$\frac{\partial^2 u}{\partial t^2} = c^2 \nabla^2 u$ and \(E = mc^2\)",
    r"\begin{align} \int_0^\infty e^{-x^2}\,dx &= \frac{\sqrt{\pi}}{2} \\ \end{align}",
    "3.14159 1,234,567.89 0x1F 6.022e23 2024-01-02 12:34:56 007 1/2 100%",
    "Which is right? A) 1 B) 2 C) both; D) neither...",
    "It's what we'd call \"quoted\" text, isn't it? They're “curly” ‘too’ — and – dashed… I'LL",
    "CamelCase snake_case kebab-case SHOUTED dotted.name path/to/file.py user@example.org https://example.org/?q=1&r=2#s",
    "def f(x):\n    return {'a': [x ** 2, None]}  # comment\n\t\tif x != 0:",
    "物理学は楽しい。量子力学 한국어 텍스트 中文，标点！",
    "العربية עִבְרִית ไทย हिन्दी Ελληνικά Русский Việt Nam",
    "全角　ＡＢＣ１２３ ｶﾀｶﾅ",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺",
    "𝔽 𝓐 𝟙 𐍈 \U0001f9ec",
    "!!!???...,,,;;;:::---___***###",
    "(((nested [brackets {of <every> kind} ]))) ``quotes'' «ici» „hier“",
    "▁under▁score ▁ a",
    "<0x0A> <0xFF> ##ing Ġthe </w>",
    "[CLS] [SEP] [MASK]",
    "<s> </s> <mask>",
    "<|endoftext|> <|im_start|>",
    "H2O CO2 Na⁺Cl⁻ C6H12O6 α-helix β-sheet DNA→RNA",
    "a" * 150,
)
"""Texts on which tokenizers differ first: white space, normalisation, digits, scripts, emoji, formulas, look-alikes of special tokens."""

_GENERIC = (AS_IT_IS, "TokenizersBackend")
_SPM_FILES = ("spm.model", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_UNIGRAM, _BPE, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # numbers in sentencepiece_model.proto
_BAKED = {"add_bos_token", "add_eos_token", "add_prefix_space", "do_basic_tokenize", "do_lower_case", "extra_ids", "legacy", "never_split"}
_BAKED |= {"sp_model_kwargs", "split_by_punct", "strip_accents", "tokenize_chinese_chars", "use_fast", "vocab_type"}
_SHOWN = 40  # ids of an error message
_Settings = Mapping[str, Any]
_Peer = Callable[[str], list[int]]


class Converted(NamedTuple):
    """tokenizer: the fast one. settings: for tokenizer_config.json. source: the file it was made from. peer: what it equals."""

    tokenizer: Tokenizer
    settings: dict[str, Any]
    source: str
    peer: str


class _Made(NamedTuple):
    tokenizer: Tokenizer
    ids: _Peer
    source: Path
    peer: str


class _Family(NamedTuple):
    """Tokenizers of one kind. names: classes and model types. special: role → token. single, pair: what is put around texts, by role."""

    names: tuple[str, ...]
    make: Callable[[Path, _Settings, _Family], _Made]
    special: dict[str, str]
    single: str
    pair: str
    has_types: bool = False
    fairseq: bool = False  # ids are sentencepiece's plus one, behind <s> <pad> </s> <unk>


def convert(folder: Path, *, model_type: str | None, texts: Sequence[str] = DIFFICULT) -> Converted:
    """The fast tokenizer of a folder that has none.

    Raises BundleError where there is nothing to make it from, where its kind is unknown, and where it gives other ids than its peer.
    """
    settings = read_settings(folder)
    given = settings.get("tokenizer_class")
    name = str(model_type if given in (None, *_GENERIC) else given).removesuffix("Fast")
    family = next((family for family in _FAMILIES if name in family.names), None)
    if family is None:
        raise BundleError(f"{folder}: no {FILE}, and none can be made and proven for {name!r}: save one where the model came from with save_pretrained")
    family = family._replace(special={role: _text(settings.get(role)) or token for role, token in family.special.items()})
    made = family.make(folder, settings, family)
    _add_tokens(made, folder, settings, family)
    _add_template(made.tokenizer, settings, family)
    _prove(made, texts)
    types = ["token_type_ids"] if family.has_types else []
    kept = {key: value for key, value in settings.items() if key not in _BAKED}
    named = {"tokenizer_class": AS_IT_IS, "model_input_names": ["input_ids", *types, "attention_mask"]}
    return Converted(made.tokenizer, {**kept, **named, **family.special}, made.source.name, made.peer)


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; nothing where there is none. Raises BundleError."""
    return read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises BundleError where it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}): copy it again from where the model came") from None
    if not isinstance(values, dict):
        raise BundleError(f"{path}: holds a {type(values).__name__} instead of an object: copy it again from where the model came")
    return values


def pins(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json by which AutoTokenizer loads tokenizer.json as it is; empty where the folder's own does so already.

    Otherwise the classes of transformers 5 rebuild it, each version in another way (5.0 does not lower-case for an uncased BERT).
    """
    settings = read_settings(folder)
    if settings.get("tokenizer_class") in _GENERIC:
        return {}
    loaded = _load(folder)
    named = {role: str(token) for role, token in loaded.special_tokens_map.items() if not isinstance(token, list | tuple)}
    return {**settings, "tokenizer_class": AS_IT_IS, "model_input_names": list(loaded.model_input_names), **named}


def check_loading(folder: Path, texts: Sequence[str] = DIFFICULT) -> None:
    """Raises BundleError where AutoTokenizer gives other ids than tokenizer.json itself (special tokens left out)."""
    loaded = _load(folder)
    direct = Tokenizer.from_file(str(folder / FILE))
    direct.no_truncation()
    direct.no_padding()
    wrong = next((text for text in texts if direct.encode(text, add_special_tokens=False).ids != loaded(text, add_special_tokens=False).input_ids), None)
    if wrong is not None:
        raise BundleError(f"{folder.name}: transformers gives other ids than {FILE} itself for {wrong[:80]!r}: save the tokenizer again where the model came from")


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare Exception, transformers whatever its classes raise
        raise BundleError(f"{folder.name}: {FILE} cannot be loaded ({' '.join(str(error).split())[:200]}): save it again where the model came from") from None


# --- sentencepiece: DeBERTa-v2 and -v3, Llama, T5, XLM-RoBERTa --------------------------------------------------------------------


def _sentencepiece(folder: Path, settings: _Settings, family: _Family) -> _Made:
    source = _first(folder, _SPM_FILES, family)
    if settings.get("split_by_punct") or settings.get("add_prefix_space") is False:
        raise BundleError(f"{folder / CONFIG}: split_by_punct and add_prefix_space=false change the text before sentencepiece sees it: give a {FILE}")
    processor, proto = _read_model(source)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unk, shift = proto.trainer_spec.unk_id, 0
    if family.fairseq:
        pieces, unk, shift = [*((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")), *pieces[3:]], 3, 1
    tokenizer = Tokenizer(_spm_model(source, proto, pieces, unk))
    lower = bool(settings.get("do_lower_case"))
    tokenizer.normalizer = _spm_normalizer(proto.normalizer_spec, lower)
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *prefix])
    _add(tokenizer, [piece.piece for piece in proto.pieces if piece.type == _CONTROL and tokenizer.token_to_id(piece.piece) is not None])
    _add(tokenizer, [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED], special=False)

    def ids(text: str) -> list[int]:
        return [unk if id_ == processor.unk_id() else id_ + shift for id_ in processor.encode(text.lower() if lower else text)]

    return _Made(tokenizer, ids, source, "sentencepiece")


def _read_model(path: Path) -> tuple[Any, Any]:
    """The model as sentencepiece's processor and as its protocol buffer."""
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError:
        raise DependencyError(f"{path} is a sentencepiece model: pip install submission-kit[vendor] for it, or give a folder with {FILE}") from None
    try:
        proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # type: ignore[attr-defined]
        return SentencePieceProcessor(model_file=str(path)), proto
    except Exception as error:  # protobuf's DecodeError, RuntimeError from C++
        raise BundleError(f"{path}: not a sentencepiece model ({error}): copy it again from where it came") from None


def _spm_model(source: Path, proto: Any, pieces: list[tuple[str, float]], unk: int) -> models.Model:
    """pieces: (piece, score) in the order of the ids."""
    spec = proto.trainer_spec
    if spec.model_type == _UNIGRAM:
        return models.Unigram(pieces, unk_id=unk, byte_fallback=spec.byte_fallback)
    if spec.model_type != _BPE:
        raise BundleError(f"{source}: sentencepiece model_type {spec.model_type} is neither unigram nor BPE: give a {FILE}")
    from transformers.convert_slow_tokenizer import generate_merges

    vocab = {piece: id_ for id_, (piece, _) in enumerate(pieces)}
    control = {piece.piece for piece in proto.pieces if piece.type == _CONTROL}  # which sentencepiece never puts together from a text
    merges = generate_merges(vocab, [(piece, score) for piece, score in pieces if piece not in control])
    return models.BPE(vocab, merges, unk_token=pieces[unk][0], fuse_unk=True, byte_fallback=spec.byte_fallback)


def _spm_normalizer(spec: Any, lower: bool) -> normalizers.Normalizer:
    """What sentencepiece does to a text before it looks for pieces, step by step as its normalizer_spec says."""
    steps: list[normalizers.Normalizer] = [normalizers.Lowercase()] if lower else []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


# --- WordPiece: BERT, DistilBERT, ELECTRA -----------------------------------------------------------------------------------------


def _wordpiece(folder: Path, settings: _Settings, family: _Family) -> _Made:
    from transformers.convert_slow_tokenizer import BertConverter
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    source = _first(folder, ("vocab.txt",), family)
    options = {key: settings[key] for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars") if key in settings}
    slow = BertTokenizerLegacy(str(source), **options, **family.special)
    return _Made(BertConverter(slow).converted(), partial(slow.encode, add_special_tokens=False), source, "transformers' slow BERT")


# --- byte-level BPE: GPT-2, RoBERTa, BART -----------------------------------------------------------------------------------------


def _byte_level(folder: Path, settings: _Settings, family: _Family) -> _Made:
    source, merges_file = _first(folder, ("vocab.json",), family), _first(folder, ("merges.txt",), family)
    vocab = read_json(source)
    lines = merges_file.read_text(encoding="utf-8").splitlines()
    merges = [(left, right) for line in lines if not line.startswith("#version") and line.count(" ") == 1 for left, right in [line.split(" ")]]
    prefix = bool(settings.get("add_prefix_space", False))
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _Made(tokenizer, partial(_byte_level_ids, vocab=vocab, ranks={pair: rank for rank, pair in enumerate(merges)}, prefix=prefix), source, "plain BPE")


def _byte_level_ids(text: str, *, vocab: Mapping[str, int], ranks: Mapping[tuple[str, str], int], prefix: bool) -> list[int]:
    """GPT-2's encoder as its authors wrote it (openai/gpt-2, src/encoder.py): words, bytes as letters, the earliest merge first."""
    import regex
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    text = f" {text}" if prefix and text and not text[0].isspace() else text
    words = regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text)
    return [vocab[part] for word in words for part in _merged([letters[byte] for byte in word.encode()], ranks)]


def _merged(parts: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        best, joined, at = min(pairs, key=ranks.__getitem__), [], 0
        while at < len(parts):
            step = 2 if tuple(parts[at : at + 2]) == best else 1
            joined.append("".join(parts[at : at + step]))
            at += step
        parts = joined
    return parts


# --- what surrounds the vocabulary ------------------------------------------------------------------------------------------------


def _add_tokens(made: _Made, folder: Path, settings: _Settings, family: _Family) -> None:
    """Special tokens and those added later, each at the id that the folder gives it."""
    extra = int(settings.get("extra_ids", 100)) if family.names[0] == "T5Tokenizer" else 0
    given = {int(id_): token for id_, token in settings.get("added_tokens_decoder", {}).items()}
    added = read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}
    given = {**{id_: {"content": token} for token, id_ in added.items()}, **given}
    known = {_text(token) for token in given.values()}
    behind = [f"<extra_id_{number}>" for number in reversed(range(extra))]
    _add(made.tokenizer, [token for token in behind if token not in known])
    for role, token in family.special.items():
        if role != "mask_token" and made.tokenizer.token_to_id(token) is None:
            raise BundleError(f"{made.source}: has no {token!r}, the {role}: name the right one in {CONFIG}, or give a {FILE}")
    _add(made.tokenizer, list(family.special.values()))
    for id_, token in sorted(given.items()):
        flags = {key: token[key] for key in ("lstrip", "rstrip", "single_word", "normalized", "special") if key in token}
        made.tokenizer.add_tokens([AddedToken(token["content"], **{"normalized": False, "special": True, **flags})])
        if made.tokenizer.token_to_id(token["content"]) != id_:
            actual = made.tokenizer.token_to_id(token["content"])
            raise BundleError(f"{folder}: the added token {token['content']!r} has id {id_}, but would get {actual} behind {made.source.name}: give a {FILE}")


def _add(tokenizer: Tokenizer, tokens: Sequence[str], *, special: bool = True) -> None:
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in tokens])


def _add_template(tokenizer: Tokenizer, settings: _Settings, family: _Family) -> None:
    single, pair = family.single, family.pair
    if family.names[0] == "LlamaTokenizer":
        start = "{bos_token} " if settings.get("add_bos_token", True) else ""
        end = " {eos_token}" if settings.get("add_eos_token", False) else ""
        single, pair = f"{start}$A{end}", f"{start}$A{end} {start.replace('}', '}:1')}$B:1{end.replace('}', '}:1')}"
    used = sorted(set(family.special.values()))
    ids = [(token, tokenizer.token_to_id(token)) for token in used]
    template = processors.TemplateProcessing(single=single.format(**family.special), pair=pair.format(**family.special), special_tokens=ids)
    trims = isinstance(tokenizer.post_processor, processors.ByteLevel)
    tokenizer.post_processor = processors.Sequence([tokenizer.post_processor, template]) if trims else template


def _prove(made: _Made, texts: Sequence[str]) -> None:
    """Raises BundleError at the first text whose ids differ. Texts that name one of its special tokens are left out: the peers read those in other ways."""
    special = [token.content for token in made.tokenizer.get_added_tokens_decoder().values()]
    for text in texts:
        if any(token in text for token in special):
            continue
        fast, slow = made.tokenizer.encode(text, add_special_tokens=False).ids, made.ids(text)
        if fast != slow:
            shown = f"{text[:80]!r} becomes {fast[:_SHOWN]} instead of {slow[:_SHOWN]}"
            raise BundleError(f"{made.source}: the {FILE} made from it differs from {made.peer}: {shown}: give a {FILE} from where the model came")


def _first(folder: Path, names: Sequence[str], family: _Family) -> Path:
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise BundleError(f"{folder}: no tokenizer: neither {FILE} nor, for {family.names[0]}, {' or '.join(names)}: copy it from where the model came")
    return found


def _text(token: object) -> str:
    """A token of tokenizer_config.json, written as text or as an object with its content."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


_BERT = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "sep_token": "</s>", "pad_token": "<pad>", "cls_token": "<s>", "mask_token": "<mask>"}
_BERT_PAIR = "{cls_token} $A {sep_token} $B:1 {sep_token}:1"
_ROBERTA_PAIR = "{cls_token} $A {sep_token} {sep_token} $B {sep_token}"
_BETWEEN = "{cls_token} $A {sep_token}"

_FAMILIES = (
    _Family(("DebertaV2Tokenizer", "deberta-v2"), _sentencepiece, {"bos_token": "[CLS]", "eos_token": "[SEP]", **_BERT}, _BETWEEN, _BERT_PAIR, has_types=True),
    _Family(("LlamaTokenizer", "llama", "mistral", "mixtral"), _sentencepiece, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, "$A", "$A $B"),
    _Family(
        ("T5Tokenizer", "MT5Tokenizer", "t5", "mt5"), _sentencepiece, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        "$A {eos_token}", "$A {eos_token} $B {eos_token}",
    ),
    _Family(("XLMRobertaTokenizer", "xlm-roberta"), _sentencepiece, _ROBERTA, _BETWEEN, _ROBERTA_PAIR, fairseq=True),
    _Family(
        ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "bert", "distilbert", "electra"), _wordpiece, _BERT,
        _BETWEEN, _BERT_PAIR, has_types=True,
    ),
    _Family(("RobertaTokenizer", "BartTokenizer", "roberta", "bart"), _byte_level, _ROBERTA, _BETWEEN, _ROBERTA_PAIR),
    _Family(("GPT2Tokenizer", "gpt2"), _byte_level, dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), "$A", "$A $B"),
)  # fmt: skip
