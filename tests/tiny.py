"""Small real models, tokenizers, questions and tables, built in code in milliseconds. Knows no test."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModel

from kit.config import Recipe
from kit.models.encoder import Encoder
from kit.models.tokens import FILE, HFTokens, train_wordpiece
from kit.models.words import Vectors
from kit.tasks.causal_lm import Document
from kit.tasks.essay_regression import Essay, EssayRegression
from kit.tasks.extractive_qa import Answer, Reading, Span, as_prediction
from kit.tasks.multiple_choice import LETTERS, Question

TEXTS = (
    "Albedo is the share of light that a surface sends back. Fresh snow has a high albedo and dark soil a low one.",
    "Entropy measures disorder. The second law says that entropy never falls in an isolated system.",
    "The speed of light in vacuum is the same for every observer, whatever the motion of its source.",
    "An enzyme is a catalyst. Enzymes speed up the reactions in cells and are not used up by them.",
    "Mitosis divides the nucleus of a cell; two daughter nuclei with equal chromosomes follow.",
    "A magnet that moves through a coil drives an electric current in it, as Faraday found.",
    "Plates of the crust collide, and where one dives below the other a trench and volcanoes form.",
    "Plants bind carbon dioxide with the energy of sunlight, and oxygen is set free.",
    "The moon raises tides on two sides of the Earth, for its pull falls with distance.",
    "Naïve café, 10⁻¹⁰ m, Größe, 物理学 and Ωμέγα are words of other scripts.",
)
_WORDS = (*TEXTS, *("Which words stand in text 0 1 2 3 4 5 6 7 8 9?",) * 3)
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.2}
_DEBERTA = {
    **_SIZES,
    "model_type": "deberta-v2",
    "max_position_embeddings": 64,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
_DISTILBERT = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {**_SIZES, "model_type": "bert", "max_position_embeddings": 64},
    "deberta": {**_DEBERTA, "share_att_key": True},
    "deberta_conv": {**_DEBERTA, "share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"},
    "electra": {**_SIZES, "model_type": "electra", "max_position_embeddings": 64, "embedding_size": 8},
    "distilbert": {**_DISTILBERT, "model_type": "distilbert", "max_position_embeddings": 64},
    "roberta": {**_SIZES, "model_type": "roberta", "max_position_embeddings": 66, "type_vocab_size": 1},
}
"""Settings of every encoder family, 64 positions, 16 dimensions, 2 layers."""
LAYERS, HIDDEN, POSITIONS = 2, 16, 64

_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "relative_attention_num_buckets": 8, "dropout_rate": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "causal": {"config": {**_SIZES, "model_type": "llama", "num_key_value_heads": 1}, "vocab_size": 500},
    "encoder": {"config": FAMILIES["bert"], "vocab_size": 500},
    "frozen": {"config": FAMILIES["bert"], "vocab_size": 500},
    "bidaf": {"config": {"dimension": 8}, "vocab_size": 200},
    "lstm": {"config": {"dimension": 8}, "vocab_size": 200},
    "rules": {"config": {"least_documents": 1}},
    "seq2seq": {"config": {**_T5, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "vocab_size": 500},
}
"""Options for `invent` of every kind of model."""
AT_ONCE = {"frozen"}
"""Kinds of model that are fitted at once, not by gradient."""
UNTRAINED = {"zero_shot": "causal"}
"""Kinds of model that are never trained, and the kind whose folders they read."""
WAYS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "causal": (("next_token", {}), ("place", {"head": "score", "others": True}), ("next_token", {"adapter": {"r": 4, "dropout": 0.0}, "precision": "fp32"})),
    "encoder": (("row", {}), ("token", {"pooling": "none"})),
    "bidaf": (("token", {"hidden_size": 6}),),
    "lstm": (("token", {"hidden_size": 6}),),
    "frozen": (("row", {}),),
    "rules": (("row", {}),),
    "seq2seq": (("answer_token", {}), ("place", {"head": "score"})),
    "zero_shot": (("next_token", {"precision": "fp32"}),),
}
"""What every kind of model may give, and its options then; the usual ones first."""
RETRIEVERS: dict[str, dict[str, Any]] = {"bm25": {}, "dense": {"model": "{encoder}"}, "hybrid": {"dense": {"model": "{encoder}"}}}
"""Options for `build` of every kind of retriever; "{encoder}" stands for a folder that `encoder_folder` wrote (of family "bert")."""


def tokens(folder: Path, *, byte_level: bool = False, vocab_size: int = 500, limit: int = POSITIONS) -> HFTokens:
    """The tokens of a tokenizer trained on TEXTS and written into `folder`: WordPiece as BERT's, or byte-level BPE as RoBERTa's."""
    if byte_level:
        train_byte_level(folder, vocab_size=vocab_size)
    else:
        train_wordpiece(_WORDS, folder, vocab_size=vocab_size)
    return HFTokens(folder, limit=limit)


def train_byte_level(folder: Path, *, vocab_size: int = 500) -> None:
    """RoBERTa's kind of tokenizer: no unknown token, "<s> text </s></s> pair </s>", <pad> has id 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_WORDS, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=False, add_prefix_space=False)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / FILE))


def encoder_folder(path: Path, family: str = "bert", *, seed: int = 0, dropout: float = 0.0, **changes: Any) -> Path:
    """A Hugging Face encoder folder (config.json, model.safetensors, tokenizer.json) with random weights; `changes` go to its config."""
    settings = {**FAMILIES[family], **changes}
    kind = settings.pop("model_type")
    made = tokens(path, byte_level=kind == "roberta")
    drops = {"dropout": dropout, "attention_dropout": dropout}
    if kind != "distilbert":
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = AutoConfig.for_model(kind, vocab_size=len(made), pad_token_id=made.pad_id, **{**drops, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModel.from_config(config).save_pretrained(path)
    return path


def encoder(path: Path, family: str = "bert", *, outputs: int = 1, seed: int = 0, **options: Any) -> Encoder:
    """A model on the backbone of `encoder_folder`, written into `path` if there is none; no dropout unless asked for."""
    if not (path / "config.json").is_file():
        encoder_folder(path, family, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder.create(path, outputs=outputs, **{"dropout": 0.0, **options})


def questions(n: int, options: int = 5, *, answers: bool = True, context: bool = True) -> list[Question]:
    """Different questions about TEXTS with `options` options each; the right one is what the context says (without context: "")."""
    return [_question(row, options, answers, TEXTS[row % len(TEXTS)] if context else "") for row in range(n)]


def _question(row: int, options: int, answers: bool, context: str) -> Question:
    start, answer = row // len(TEXTS) % 5, (3 * row + row // options) % options
    choices = [_words(row + 1 + i, start) + (f" {i}" if i + 1 >= len(TEXTS) else "") for i in range(options)]
    choices[answer] = _words(row, start)
    return Question(f"q{row}", f"Which words stand in text {row}?", tuple(choices), answer if answers else None, context)


def _words(text: int, start: int) -> str:
    return " ".join(TEXTS[text % len(TEXTS)].split()[start : start + 4])


def write_questions(path: Path, examples: Sequence[Question], *, answers: bool = True, context: bool = False) -> Path:
    """The questions as a CSV in the competition's format: id, prompt, A, B, …, and answer and context if wanted."""
    letters = LETTERS[: len(examples[0].options)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", *letters, *["answer"] * answers, *["context"] * context])
        for question in examples:
            right = [LETTERS[question.answer]] if answers and question.answer is not None else [""] * answers
            writer.writerow([question.id, question.prompt, *question.options, *right, *[question.context] * context])
    return path


def write_vectors(vectors: Vectors, path: Path) -> None:
    """Write word2vec's text form, as .gz where the name says so."""
    lines = [f"{len(vectors.words)} {len(vectors.mean)}"]
    lines += [f"{word} {' '.join(f'{number:.6g}' for number in row)}" for word, row in zip(vectors.words, vectors.table.tolist(), strict=True)]
    content = "".join(f"{line}\n" for line in lines).encode()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)


def write_corpus(path: Path, texts: Sequence[str] = TEXTS) -> Path:
    """The texts as a passages file with columns id and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *((f"p{i}", text) for i, text in enumerate(texts))])
    return path


def recipe(folder: Path, *overrides: str, source: str = "encoder", retrieve: bool = False, **parts: Any) -> Recipe:
    """A recipe on the data in `folder`, fp32 and without dropout, whose backbone is `folder`/`source` unless `parts` say otherwise."""
    values: dict[str, Any] = {
        "name": "tiny",
        "task": {"kind": "multiple_choice", "max_length": 48},
        "model": {"kind": "encoder", "source": source, "dropout": 0.0},
        "data": {"folder": str(folder), "folds": 2},
        "train": {"epochs": 1, "batch_size": 4, "lr": 1e-3, "precision": "fp32"},
        "infer": {"precision": "fp32"},
    }
    if retrieve:
        values["retrieve"] = {"corpus": "passages.csv", "retriever": {"kind": "bm25"}, "context": {"passages": 2}}
    for name, part in parts.items():
        values[name] = {**values.get(name, {}), **part} if isinstance(part, dict) else part
    return Recipe.of(values).with_overrides(overrides)


def competition(folder: Path, *, train: int = 12, test: int = 6, options: int = 5) -> Path:
    """A folder with train.csv, test.csv, test_answers.csv, sample_submission.csv, passages.csv and a BERT in `encoder`."""
    examples = questions(train + test, options)
    write_questions(folder / "train.csv", examples[:train])
    write_questions(folder / "test.csv", examples[train:], answers=False)
    for name, column in (("test_answers.csv", "answer"), ("sample_submission.csv", "prediction")):
        texts = ["A B C" if column == "prediction" else LETTERS[question.answer or 0] for question in examples[train:]]
        lines = [f"{question.id},{text}" for question, text in zip(examples[train:], texts, strict=True)]
        (folder / name).write_text("\n".join([f"id,{column}", *lines]) + "\n", encoding="utf-8")
    write_corpus(folder / "passages.csv")
    encoder_folder(folder / "encoder")
    return folder


def documents(n: int) -> list[Document]:
    """TEXTS, over and over."""
    return [Document(f"p{row}", TEXTS[row % len(TEXTS)]) for row in range(n)]


class Predictions(NamedTuple):
    """Rows of a prediction (…, C): such as cannot be surer, others, and one (1, C) that says nothing."""

    sure: np.ndarray
    others: np.ndarray
    nothing: np.ndarray


def _probabilities(width: int) -> Predictions:
    others = np.random.default_rng(0).dirichlet(np.ones(width), 20)
    return Predictions(*(rows.astype(np.float32) for rows in (np.eye(width), others, np.full((1, width), 1 / width))))


def _log_probabilities(width: int) -> Predictions:
    others = np.random.default_rng(0).uniform(-15, -0.1, (20, width))
    return Predictions(*(rows.astype(np.float32) for rows in (np.zeros((1, width)), others, np.full((1, width), -20.0))))


def essays(n: int) -> list[Essay]:
    """Essays of several of the TEXTS, with grades from 1 to 5."""
    rng = np.random.default_rng(0)
    return [Essay(f"e{row}", " ".join(TEXTS[row % len(TEXTS)] for _ in range(1 + row % 3)), tuple(rng.integers(2, 11, 6) / 2)) for row in range(n)]


def write_essays(path: Path, examples: Sequence[Essay]) -> Path:
    """A table of essays."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text_id", "full_text", *EssayRegression().columns])
        writer.writerows([one.id, one.text, *(one.grades or ())] for one in examples)
    return path


def _values(width: int) -> Predictions:
    others = np.random.default_rng(0).uniform(1, 5, (20, width))
    return Predictions(*(rows.astype(np.float32) for rows in (np.full((3, width), 3.0), others, np.full((1, width), np.nan))))


def readings(n: int) -> list[Reading]:
    """Questions about TEXTS."""
    made = []
    for row in range(n):
        text = TEXTS[row % len(TEXTS)]
        answer = " ".join(text.split()[1 + row % 3 : 3 + row % 3]).strip(".,")
        made.append(Reading(f"r{row}", f"Which words stand in text {row}?", text, (Answer(answer, text.index(answer)),), f"text {row % 10}"))
    return made


def write_readings(path: Path, examples: Sequence[Reading]) -> Path:
    """A flat table of readings."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title", "question", "context", "answers"])
        for one in examples:
            answers = [{"text": answer.text, "answer_start": answer.start} for answer in one.answers or ()]
            writer.writerow([one.id, one.title, one.question, one.context, json.dumps(answers)])
    return path


def _spans(width: int) -> Predictions:
    rng = np.random.default_rng(0)

    def row(top: float) -> list[Span]:
        starts = rng.permutation(40)[:8]
        logs = np.sort(np.append(rng.uniform(-6, top - 0.3, 7), top))[::-1]
        return [Span(int(start), int(start + rng.integers(3, 12)), float(log_p)) for start, log_p in zip(starts, logs, strict=True)]

    sure, others = as_prediction([row(0.0) for _ in range(3)]), as_prediction([row(float(rng.uniform(-2, -0.1))) for _ in range(20)])
    return Predictions(sure, others, as_prediction([[Span(0, 5, -1e4)]]))


class TaskExample(NamedTuple):
    """What a test needs to try a kind of task: settings by name, examples of it, how they become a table and an answers table, predictions of a width.

    spoilt: what no cell of a prediction may hold; empty where there is nothing such.
    """

    settings: dict[str, dict[str, Any]]
    examples: Callable[[int], list[Any]]
    write: Callable[[Path, Sequence[Any]], Path]
    predictions: Callable[[int], Predictions]
    spoilt: str = "no prediction at all"


_FORMS: dict[str, dict[str, Any]] = {
    "letter": {}, "orders": {"orders": 2}, "likelihood": {"form": "likelihood", "normalise": True}, "yes_no": {"form": "yes_no"},
    "binary": {"form": "yes_no", "objective": "binary"}, "score": {"form": "score"},
}  # fmt: skip
_QA = {"max_length": 48, "stride": 12, "max_question": 12}
TASKS: dict[str, TaskExample] = {
    "causal_lm": TaskExample(
        {"usual": {"max_length": 24}, "packed": {"max_length": 24, "packing": True}, "keyed": {"max_length": 24, "key_words": ["of"], "key_alpha": 0.5}},
        documents, lambda path, examples: write_corpus(path, [one.text for one in examples]), _log_probabilities
    ),
    "essay_regression": TaskExample({"usual": {"max_length": 24}}, essays, write_essays, _values),
    "extractive_qa": TaskExample({"usual": _QA}, readings, write_readings, _spans, " "),
    "multiple_choice": TaskExample({"usual": {"max_length": 48}}, questions, write_questions, _probabilities),
    "multiple_choice_prompt": TaskExample({name: {"max_length": 180, **form} for name, form in _FORMS.items()}, questions, write_questions, _probabilities),
}  # fmt: skip
"""An example of every kind of task."""


_NAMED = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
_PLAIN = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deberta-v2": ("DebertaV2Tokenizer", "spm.model", _NAMED),
    "llama": ("LlamaTokenizer", "tokenizer.model", _PLAIN),
    "t5": ("T5Tokenizer", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "xlm-roberta": ("XLMRobertaTokenizer", "sentencepiece.bpe.model", {}),
}
"""Of every family whose tokenizer is a sentencepiece model: class, file, and how such a model is trained."""


def sentencepiece_model(path: Path, family: str, **changes: Any) -> Path:
    """A sentencepiece model as `family` has it, trained on TEXTS; `changes` go to its trainer. path: ends with .model."""
    from sentencepiece import SentencePieceTrainer

    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"vocab_size": 600, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2, **SENTENCEPIECE[family][2]}
    SentencePieceTrainer.train(**{"sentence_iterator": iter(_WORDS * 3), "model_prefix": str(path.with_suffix("")), **settings, **changes})
    path.with_suffix(".vocab").unlink()
    return path


LETTERED = (*TEXTS, *("Question: Which one? (A) A. Yes (B) B. No (C) C. D. E. F. Answer: A B C D E F Yes No; Yes: A B C D E F Yes No\n",) * 20)
"""Texts on whose tokenizers the first letters and "Yes" and "No" are single tokens, with and without a space in front."""
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PROMPTING = ("wordpiece", "roberta", "gpt2", "llama3", "llama", "llama_first", "t5", "xlm-roberta", "deberta-v2")
"""Families of tokenizers, as `prompting` makes them."""


def prompting(folder: Path, family: str) -> HFTokens:
    """A tokenizer of the family that knows letters, with special tokens for chats, written into `folder`.

    llama: sentencepiece BPE as Llama 2 had it first (a dummy prefix before every part), llama_first: as it has it now (before the first only);
    gpt2: byte-level, nothing around a text; llama3: byte-level with BOS, letters and newlines joined with punctuation as in Llama 3 and Qwen.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = _WRITTEN[family](folder) if family in _WRITTEN else _converted(family)
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in ("<|im_start|>", "<|im_end|>")])
    made.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    made.save(str(folder / FILE))
    return HFTokens(folder, limit=2048)


@cache
def _sentencepieces() -> dict[str, str]:
    """tokenizer.json of the families that are sentencepiece models. From a process of its own: sentencepiece 0.2.1 crashes in one where pytest has loaded more."""
    code = "import json; from tests import tiny; print(json.dumps(tiny.convert_sentencepieces()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def convert_sentencepieces() -> dict[str, str]:
    """For `prompting`: a sentencepiece model of every family, trained on LETTERED, as tokenizer.json."""
    from kit.vendor.tokenizer import convert

    found = {}
    with TemporaryDirectory() as folder:
        for family, (_, file, _) in SENTENCEPIECE.items():
            sentencepiece_model(Path(folder) / family / file, family, sentence_iterator=iter(LETTERED))
            found[family] = convert(Path(folder) / family, model_type=family).tokenizer.to_str()
    return found


def _converted(family: str) -> Tokenizer:
    made = Tokenizer.from_str(_sentencepieces()[family.removesuffix("_first")])
    if family == "llama_first":
        made.normalizer = None
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


def _byte_level(special: Sequence[str], pattern: str | None = None) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(LETTERED, trainers.BpeTrainer(vocab_size=700, special_tokens=[], initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return made


def _gpt2(folder: Path) -> Tokenizer:
    made = _byte_level(["<|endoftext|>"])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made


def _llama3(folder: Path) -> Tokenizer:
    made = _byte_level(["<|begin_of_text|>", "<|end_of_text|>"], _LLAMA3)
    bos = made.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(single="<|begin_of_text|> $A", pair="$A $B", special_tokens=[("<|begin_of_text|>", bos)])
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return made


def _wordpiece(folder: Path) -> Tokenizer:
    train_wordpiece(LETTERED, folder, vocab_size=500)
    return Tokenizer.from_file(str(folder / FILE))


def _roberta(folder: Path) -> Tokenizer:
    made = _byte_level(["<s>", "<pad>", "</s>"])
    ends = (("</s>", made.token_to_id("</s>")), ("<s>", made.token_to_id("<s>")))
    made.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    return made


_WRITTEN: dict[str, Callable[[Path], Tokenizer]] = {"wordpiece": _wordpiece, "roberta": _roberta, "gpt2": _gpt2, "llama3": _llama3}
