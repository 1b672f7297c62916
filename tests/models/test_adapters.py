"""LoRA and QLoRA: what is trained, files to and from peft, merging, and what bitsandbytes must not do to four-bit weights."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kit.errors import BundleError, ConfigError, DependencyError
from kit.models.adapters import (
    CONFIG,
    OPTIMIZERS,
    QUANTISATIONS,
    WEIGHTS,
    Base,
    adapter_state,
    attach,
    compute_in_float32,
    dequantised,
    four_bits,
    guard,
    load_adapter,
    make_optimizer,
    merge,
    quantised_loading,
    save_adapter,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
_SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "initializer_range": 0.1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_SHAPE, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "gpt2": {
        "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 64, "initializer_range": 0.1,
        "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    },
    "gemma": {**_SHAPE, "num_key_value_heads": 1, "head_dim": 32},
}
"""Sizes are multiples of 64, else bitsandbytes could not rewrite the weights, and would fail loudly."""
VOCABULARY = 96
BASE = Base("tiny-base", "0123abcd")
SETTINGS: dict[str, Any] = {"r": 4, "alpha": 8, "dropout": 0.0}
LINEAR = {"llama": 7, "gpt2": 4, "gemma": 7}  # per layer
SOME = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"], "gemma": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with random weights for each family."""
    made = {}
    for family, settings in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = AutoConfig.for_model(family, vocab_size=VOCABULARY, **special, **settings)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # else all are 0
                    nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        made[family] = folder
    return made


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> Path:
    return folders[family]


def loaded(folder: Path, kind: str = "none", *, dtype: torch.dtype = torch.float32, guarded: bool = True) -> Any:
    """The model as the kit loads it. Its layers say, as on a processor with AVX512-BF16, that they may be rewritten."""
    model = AutoModelForCausalLM.from_pretrained(folder, **quantised_loading(kind, dtype=dtype, device=CPU))
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    return guard(model).eval() if guarded else model.eval()


def four_bit_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def ids(rows: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(input_ids=ids()).logits.clone()


def loss_of(model: nn.Module) -> Tensor:
    """Next-token loss; with the words as they are there is something to learn."""
    words = ids()
    return nn.functional.cross_entropy(model(input_ids=words).logits[:, :-1].flatten(0, 1).float(), words[:, 1:].flatten())


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    model.train()
    model.zero_grad()
    loss_of(model).backward()
    return {name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def stirred(model: Any, *, size: float = 0.05, seed: int = 5) -> Any:
    """The model with an adapter that does something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def adapted(folder: Path, kind: str = "none", **changes: Any) -> Any:
    return stirred(attach(loaded(folder, kind), {**SETTINGS, **changes}, seed=0))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def products(model: nn.Module) -> dict[str, Tensor]:
    """Name of an adapted module → scaling · B · A (out, in), by hand from the tensors and the settings."""
    modules = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")}
    return {name: module.scaling["default"] * (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach() for name, module in modules.items()}


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Name of a linear map → its weight (out, in) in float32, taken by bitsandbytes' own function where it is in four bits."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            found[name] = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).float()
        elif isinstance(module, nn.Linear | Conv1D):
            found[name] = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach().float().clone()
    return found


# --- attaching --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_all_linear_maps_of_the_layers_are_adapted_and_nothing_else_is_trained(folder: Path, family: str, kind: str) -> None:
    model = attach(loaded(folder, kind), SETTINGS, seed=0)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(products(model)) == 2 * LINEAR[family] and "lm_head" not in products(model)
    assert len(trained) == 2 * len(products(model)) and all(".lora_A." in name or ".lora_B." in name for name in trained)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    stirred(model)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients(model).values())
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_new_adapter_changes_no_output_and_a_trained_one_does(folder: Path, kind: str) -> None:
    before = logits(loaded(folder, kind))
    model = attach(loaded(folder, kind), SETTINGS, seed=0)
    assert torch.equal(logits(model), before)
    assert (logits(stirred(model)) - before).abs().max() > 0.01


def test_the_seed_decides_the_adapter_and_the_callers_random_numbers_go_on(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    after = torch.rand(1)
    torch.manual_seed(3)
    states = [adapter_state(attach(loaded(folder), SETTINGS, seed=seed)) for seed in (1, 1, 2)]
    save_adapter(adapted(folder), tmp_path, base=BASE)
    load_adapter(loaded(folder), tmp_path, base=BASE)
    assert torch.equal(torch.rand(1), after)
    assert same(states[0], states[1]) and not same(states[0], states[2])


def test_dropout_is_on_in_training_only_also_right_after_attaching(folder: Path) -> None:
    model = stirred(attach(loaded(folder), SETTINGS | {"dropout": 0.5}, seed=0))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
        model.train()
        assert not torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)


def test_half_precision_bases_get_float32_adapters(folder: Path) -> None:
    for kind in QUANTISATIONS:
        model = attach(loaded(folder, kind, dtype=torch.bfloat16), SETTINGS | {"modules_to_save": ["lm_head"]}, seed=0)
        types = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
        assert types == {(True, torch.float32), (False, torch.bfloat16)} | ({(False, torch.uint8)} if kind == "nf4" else set())
        with torch.autocast("cpu", torch.bfloat16):
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients(stirred(model)).values())


def test_only_the_named_modules_are_adapted(folder: Path, family: str) -> None:
    names = products(attach(loaded(folder), SETTINGS | {"modules": SOME[family]}, seed=0))
    assert len(names) == 4 and all(name.endswith(tuple(SOME[family])) for name in names)


def test_only_the_named_layers_are_adapted(folder: Path) -> None:
    names = list(products(attach(loaded(folder), SETTINGS | {"layers": [1]}, seed=0)))
    assert names and all(".1." in name for name in names)


def test_ranks_and_scalings_follow_the_patterns(folders: dict[str, Path]) -> None:
    settings = {"r": 4, "alpha": 8, "dropout": 0.0, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"v_proj": 1.5}}
    for stabilised in (False, True):
        model = attach(loaded(folders["llama"]), settings | {"rank_stabilised": stabilised}, seed=0)
        for name, module in model.named_modules():
            if name in products(model):
                rank = 2 if name.endswith("q_proj") else 6 if name.endswith("1.mlp.up_proj") else 4
                alpha = 1.5 if name.endswith("v_proj") else 8
                assert module.lora_A["default"].weight.shape[0] == module.lora_B["default"].weight.shape[1] == rank, name
                assert module.scaling["default"] == pytest.approx(alpha / (rank**0.5 if stabilised else rank)), name


@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_lowers_the_loss_and_leaves_the_base_alone(folder: Path, kind: str, optimizer: str) -> None:
    model = attach(loaded(folder, kind), SETTINGS, seed=0)
    base = {name: tensor for name, tensor in bits(model).items() if "lora" not in name}
    rate = 5.0 if optimizer == "adadelta" else 2e-2
    steps = make_optimizer([{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": rate}], optimizer)
    losses = []
    for _ in range(15):
        model.train()
        steps.zero_grad()
        loss = loss_of(model)
        loss.backward()
        steps.step()
        losses.append(float(loss.detach()))
        logits(model)  # an evaluation between the steps, as after each epoch
    assert losses[-1] < 0.6 * losses[0]
    assert same({name: tensor for name, tensor in bits(model).items() if "lora" not in name}, base)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_checkpointing_activations_gives_the_same_gradients(folder: Path, kind: str) -> None:
    model = adapted(folder, kind, layers=[1])  # nothing below needs a gradient
    before = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    after = gradients(model)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, atol=1e-7, rtol=1e-6)


# --- the guard --------------------------------------------------------------------------------------------------------------------


def test_gradients_after_an_evaluation_equal_those_before_it(folder: Path) -> None:
    model = adapted(folder, "nf4")
    before, stored = gradients(model), bits(model)
    scores = logits(model)
    with torch.no_grad():
        model(input_ids=ids(1, 1))
    after = gradients(model)
    assert all(gradient is not None for gradient in after.values())
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert same(bits(model), stored) and torch.equal(logits(model), scores)


def test_an_evaluation_of_a_guarded_base_rewrites_nothing(folder: Path) -> None:
    model = loaded(folder, "nf4")
    stored = bits(model)
    scores = logits(model)
    assert same(bits(model), stored)
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids()).logits, scores, atol=1e-6, rtol=1e-6)


def test_attaching_guards(folder: Path) -> None:
    model = attach(loaded(folder, "nf4", guarded=False), SETTINGS, seed=0)
    stored = bits(model)
    logits(model)
    assert same(bits(model), stored)


def test_a_copy_of_a_guarded_model_is_guarded(folder: Path) -> None:
    model = copy.deepcopy(loaded(folder, "nf4")).to(CPU)
    stored = bits(model)
    logits(model)
    assert same(bits(model), stored)


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="without AVX512-BF16 bitsandbytes rewrites nothing")
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit. an autograd kernel was not registered")
@pytest.mark.parametrize("family", ["gemma", "llama"])  # GPT-2's biases make it fail loudly
def test_without_the_guard_gradients_are_wrong_and_a_late_guard_says_so(folders: dict[str, Path], family: str) -> None:
    """If this fails, bitsandbytes was mended, and the guard is no longer needed."""
    model = adapted(folders[family], "nf4")
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = True
    before = gradients(model)
    logits(model)
    after = gradients(model)
    wrong = [name for name, gradient in before.items() if after[name] is None or (after[name] - gradient).norm() > 0.5 * gradient.norm()]
    assert len(wrong) > len(before) / 4, f"{len(wrong)} of {len(before)}"
    with pytest.raises(AssertionError, match="load the model again"):
        guard(model)
    with pytest.raises(AssertionError, match="guard was not called"):
        merge(model, into="fp32")


PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning", "ignore:Model has .tie_word_embeddings=True")


# --- files ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_a_saved_adapter_comes_back_bit_for_bit(folder: Path, kind: str, tmp_path: Path) -> None:
    model = adapted(folder, kind, rank_stabilised=True, rank_pattern={"c_fc|up_proj": 2})
    save_adapter(model, tmp_path / "new", base=BASE)
    again = load_adapter(loaded(folder, kind), tmp_path / "new", base=BASE)
    assert same(adapter_state(again), adapter_state(model)) and torch.equal(logits(again), logits(model))
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    filled = load_adapter(attach(loaded(folder, kind), SETTINGS | {"rank_stabilised": True, "rank_pattern": {"c_fc|up_proj": 2}}, seed=9), tmp_path / "new", base=BASE)
    assert torch.equal(logits(filled), logits(model))
    save_adapter(again, tmp_path / "other", base=BASE)
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_only_the_adapters_tensors_are_saved(folder: Path, family: str, tmp_path: Path) -> None:
    save_adapter(adapted(folder, "nf4"), tmp_path, base=BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    state = load_file(tmp_path / WEIGHTS)
    assert len(state) == 2 * 2 * LINEAR[family] and all("lora_" in name for name in state)


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_an_adapter_trained_on_four_bits_fits_the_plain_base_and_the_other_way_round(folder: Path, kind: str, tmp_path: Path) -> None:
    model = adapted(folder, kind)
    save_adapter(model, tmp_path, base=BASE)
    other = load_adapter(loaded(folder, "nf4" if kind == "none" else "none"), tmp_path, base=BASE)
    assert all(torch.equal(delta, products(model)[name]) for name, delta in products(other).items())


@PEFTS_OWN
@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize("changes", [{}, {"layers": [1], "modules_to_save": ["lm_head"]}], ids=["all", "some"])
def test_peft_reads_what_is_saved(folders: dict[str, Path], kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    for family in ("llama", "gpt2") if not changes else ("llama",):
        model = adapted(folders[family], kind, **changes)
        save_adapter(model, tmp_path, base=BASE)
        theirs = peft.PeftModel.from_pretrained(loaded(folders[family], kind), tmp_path)
        assert torch.equal(logits(theirs), logits(model))


@PEFTS_OWN
@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "use_rslora": True, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": r".*\.(up|down)_proj", "modules_to_save": ["lm_head"], "rank_pattern": {"up_proj": 5}},
    ],
    ids=["all", "layers", "regex"],
)  # fmt: skip
def test_what_peft_saved_is_read(folders: dict[str, Path], kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = stirred(peft.get_peft_model(loaded(folders["llama"], kind), peft.LoraConfig(r=3, lora_alpha=6, task_type="CAUSAL_LM", **settings)))
    theirs.save_pretrained(tmp_path)
    model = load_adapter(loaded(folders["llama"], kind), tmp_path, base=BASE)
    assert torch.equal(logits(model), logits(theirs))


def test_a_newer_pefts_unused_settings_are_passed_over(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["llama"])
    save_adapter(model, tmp_path, base=BASE)
    edit(tmp_path, use_something_new=False, other_config=None)
    assert torch.equal(logits(load_adapter(loaded(folders["llama"]), tmp_path, base=BASE)), logits(model))


def test_modules_to_save_are_trained_and_come_back(folder: Path, family: str, tmp_path: Path) -> None:
    name = {"llama": "lm_head", "gpt2": "ln_f", "gemma": "model.norm"}[family]
    model = attach(loaded(folder, "nf4"), SETTINGS | {"modules_to_save": [name]}, seed=0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.shape == model.get_input_embeddings().weight.shape for parameter in trained) == (family == "llama")
    assert all(gradient is not None for gradient in gradients(model).values())
    save_adapter(stirred(model), tmp_path, base=BASE)
    assert any(key.endswith(f"{name}.weight") for key in load_file(tmp_path / WEIGHTS))
    again = load_adapter(loaded(folder, "nf4"), tmp_path, base=BASE)
    assert torch.equal(logits(again), logits(model))
    without = load_adapter(attach(loaded(folder, "nf4"), SETTINGS | {"modules_to_save": [name]}, seed=0), tmp_path, base=BASE)
    assert torch.equal(logits(without), logits(model))
    merged = merge(again, into="fp32").model
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-4, rtol=1e-4)


# --- merging ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize("changes", [{}, {"rank_stabilised": True, "layers": [1]}], ids=["all", "some"])
def test_a_merge_is_the_dequantised_weight_and_the_scaled_product(folder: Path, kind: str, changes: dict[str, Any]) -> None:
    base = weights(loaded(folder, kind, guarded=False))  # no forward has run
    model = adapted(folder, kind, **changes)
    scores = logits(model)  # an evaluation, after which an unguarded merge gives garbage
    deltas = products(model)
    merged, drift = merge(model, into="fp32", scores=lambda: logits(model))
    found = weights(merged)
    assert found.keys() == base.keys() and merged is model
    for name, weight in found.items():
        torch.testing.assert_close(weight, base[name] + deltas.get(name, torch.zeros(())), atol=1e-5, rtol=0)
        assert name in deltas or torch.equal(weight, base[name])
    assert drift is not None and drift < 1e-4
    torch.testing.assert_close(logits(merged), scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize("into", ["fp32", "bf16"])
def test_a_merged_model_is_a_plain_one_that_transformers_saves_and_loads(folder: Path, family: str, kind: str, into: str, tmp_path: Path) -> None:
    merged = merge(adapted(folder, kind), into=into).model
    plain = loaded(folder)
    assert {name: (type(module), module.training) for name, module in merged.named_modules()} == {
        name: (type(module), module.training) for name, module in plain.named_modules()
    }
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[into]
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(logits(again), logits(merged))


def test_merging_into_four_bits_tells_the_drift_and_never_goes_unseen(folder: Path) -> None:
    model = adapted(folder, "nf4")
    before, deltas = logits(model), products(model)
    with pytest.raises(ConfigError, match='merge into "nf4" rounds away'):
        merge(model, into="nf4")
    exact = {name: weight + deltas.get(name.removesuffix(".base_layer"), 0) for name, weight in weights(model).items() if name.endswith(".base_layer")}
    merged, drift = merge(model, into="nf4", scores=lambda: logits(model))
    layers = four_bit_layers(merged)
    assert len(layers) == len(exact) and not products(merged) and drift is not None
    assert drift == float((logits(merged) - before).abs().max()) and 0 < drift < float(before.abs().max())
    for name, layer in layers.items():
        found, wanted = dequantised(layer), exact[f"{name}.base_layer"]
        step = wanted.abs().amax()  # of NF4 the widest gap is below a third of the block's largest
        assert 0 < float((found - wanted).abs().max()) < step / 3
    assert torch.equal(logits(merged), logits(merged))  # guarded, too
    again = merge(attach(merged, SETTINGS, seed=0), into="fp32").model
    assert {name: type(module) for name, module in again.named_modules()} == {name: type(module) for name, module in loaded(folder).named_modules()}


def test_what_was_trained_in_full_takes_the_bases_type_again(folders: dict[str, Path]) -> None:
    model = attach(loaded(folders["llama"], "nf4", dtype=torch.bfloat16), SETTINGS | {"modules_to_save": ["lm_head"]}, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge(stirred(model), into="nf4", scores=lambda: logits(model)).model
    assert {(parameter.dtype, parameter.requires_grad) for parameter in merged.parameters()} == {(torch.uint8, False), (torch.bfloat16, False)}


def test_merges_that_make_no_sense_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the base is not in four bits"):
        merge(adapted(folder), into="nf4", scores=lambda: torch.zeros(1))
    with pytest.raises(ConfigError, match="'fp23': unknown.*fp32"):
        merge(adapted(folder), into="fp23")


def test_a_head_trained_apart_from_tied_embeddings_survives_the_merge(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(folders["gemma"], "none", modules_to_save=["embed_tokens"])
    merged = merge(model, into="fp32").model
    merged.save_pretrained(tmp_path)
    assert not merged.config.tie_word_embeddings
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))
    assert not torch.equal(merged.get_input_embeddings().weight, merged.get_output_embeddings().weight)


def test_four_bits_are_those_that_loading_gives(folder: Path) -> None:
    plain = weights(loaded(folder))
    for name, layer in four_bit_layers(loaded(folder, "nf4")).items():
        made = four_bits(plain[name], layer.bias, dtype=torch.float32)
        assert same(bits(made), bits(layer)) and not made.support_avx512bf16_for_cpu
        rows = torch.randn(3, layer.in_features)
        assert torch.equal(made(rows), layer(rows))


# --- float32 ----------------------------------------------------------------------------------------------------------------------


def overflowing(folder: Path) -> Any:
    """A four-bit model in fp16 in which a layer's values are beyond the largest of fp16."""
    model = attach(loaded(folder, "nf4", dtype=torch.float16), SETTINGS, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith(("0.mlp.up_proj.lora_B.default.weight", "0.mlp.c_fc.lora_B.default.weight")):
            nn.init.constant_(parameter, 3e4)
    return model


@pytest.mark.parametrize("autocast", [False, True])
def test_what_overflows_in_half_precision_is_finite_in_float32(folder: Path, autocast: bool) -> None:
    model = overflowing(folder)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16, enabled=autocast):
        assert not model(input_ids=ids()).logits.isfinite().all()
        with compute_in_float32(model):
            scores = model(input_ids=ids()).logits
    assert scores.dtype == torch.float32 and scores.isfinite().all()


def test_float32_scores_are_those_of_the_same_weights_and_afterwards_all_is_as_before(folder: Path) -> None:
    half = stirred(attach(loaded(folder, "nf4", dtype=torch.float16), SETTINGS, seed=0))
    before, scores = bits(half), logits(half)
    compute = {name: layer.compute_dtype for name, layer in four_bit_layers(half).items()}
    with torch.inference_mode(), compute_in_float32(half):
        inside = half(input_ids=ids()).logits.clone()
    assert same(bits(half), before) and torch.equal(logits(half), scores)
    assert {name: layer.compute_dtype for name, layer in four_bit_layers(half).items()} == compute and set(compute.values()) == {torch.float16}
    with pytest.raises(ZeroDivisionError), compute_in_float32(half):
        raise ZeroDivisionError
    assert same(bits(half), before)
    merged = merge(half, into="fp32").model  # the same weights, by another way
    torch.testing.assert_close(inside, logits(merged), atol=1e-4, rtol=1e-4)
    assert (inside - scores).abs().max() > 1e-4


# --- the optimizer ----------------------------------------------------------------------------------------------------------------


def test_eight_bit_moments_take_a_byte_each_and_a_resumed_run_goes_on_alike() -> None:
    def run(steps: int, state: Any = None, start: Tensor | None = None) -> tuple[Tensor, Any]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(96, 96) if start is None else start.clone())
        optimizer = make_optimizer([{"params": [weight], "lr": 1e-2, "weight_decay": 0.1}], "paged_adamw_8bit")
        if state:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            optimizer.zero_grad()
            (weight**2).mean().backward()
            optimizer.step()
        moments = optimizer.state[weight]
        assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
        return weight.detach(), optimizer.state_dict()

    whole, _ = run(6)
    half, state = run(3)
    assert torch.equal(run(3, copy.deepcopy(state), half)[0], whole)


def test_parameter_groups_keep_their_rates() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(4))], "lr": lr, "weight_decay": decay} for lr, decay in ((1e-3, 0.0), (1e-2, 0.1))]
    for kind in OPTIMIZERS:
        assert [(group["lr"], group["weight_decay"]) for group in make_optimizer(groups, kind).param_groups] == [(1e-3, 0.0), (1e-2, 0.1)]


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.optimizer = 'paged_adam_8bit' is unknown \(did you mean 'paged_adamw_8bit'\?\)"):
        make_optimizer([], "paged_adam_8bit")


@pytest.mark.gpu
def test_on_cuda_training_in_four_bits_lowers_the_loss_with_paged_moments(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"], **quantised_loading("nf4", dtype=torch.float16, device=torch.device("cuda:0")))
    attach(guard(model), SETTINGS | {"modules": ["down_proj"], "r": 64}, seed=0)
    optimizer = make_optimizer([{"params": [parameter for parameter in model.parameters() if parameter.requires_grad], "lr": 1e-2}], "paged_adamw_8bit")
    words, losses = ids().cuda(), []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(input_ids=words).logits[:, :-1].flatten(0, 1).float(), words[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert type(optimizer).__name__ == "PagedAdamW8bit" and losses[-1] < losses[0]


# --- loading ----------------------------------------------------------------------------------------------------------------------


def test_linear_maps_are_quantised_twice_and_the_rest_is_of_the_products_type(folder: Path, family: str) -> None:
    model = loaded(folder, "nf4", dtype=torch.bfloat16)
    layers = four_bit_layers(model)
    assert len(layers) == 2 * LINEAR[family]
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype, layer.support_avx512bf16_for_cpu) == ("nf4", True, torch.bfloat16, False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.bfloat16}
    plain = weights(loaded(folder))
    for name, layer in layers.items():
        error = (dequantised(layer) - plain[name]).norm() / plain[name].norm()
        assert 0 < error < 0.12  # NF4 of normal numbers: 0.09; a transposed weight: 1.4


_MEASURED = """
import threading, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from kit.models.adapters import quantised_loading

def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, **quantised_loading("nf4", dtype=torch.float32, device=torch.device("cpu")))
load({small!r})  # what is imported is not counted
def used():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
before, most, done = used(), 0, threading.Event()
def watch():
    global most
    while not done.wait(0.002):
        most = max(most, used())
watcher = threading.Thread(target=watch)
watcher.start()
load({folder!r})
done.set()
watcher.join()
print(most - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
def test_loading_in_four_bits_never_holds_the_weights_in_full(folders: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 96}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    full = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    model.bfloat16().save_pretrained(tmp_path)  # a type that must be converted, else what is read is the mapped file
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, and can be measured
    environment["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else transformers 5.0 reads all tensors while the first one is quantised
    code = _MEASURED.format(folder=str(tmp_path), small=str(folders["llama"]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert full / 8 < float(done.stdout) < full / 2, f"{done.stdout} of {full} MB"


def test_an_unknown_quantisation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model.quantise = 'nf3' is unknown \(did you mean 'nf4'\?\)"):
        quantised_loading("nf3", dtype=torch.float32, device=CPU)


# --- bad input --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 8}, r"model.adapter.rank is unknown \(known: alpha, .* r, rank_pattern"),
        ({"dropuot": 0.1}, r"model.adapter.dropuot is unknown \(did you mean 'dropout'\?\)"),
        ({"r": 0}, "model.adapter.r = 0: give a whole number from 1"),
        ({"r": True}, "model.adapter.r = true: give a whole number from 1"),
        ({"r": 2.5}, "model.adapter.r = 2.5: give a whole number from 1"),
        ({"alpha": -1}, "model.adapter.alpha = -1: give a number above 0"),
        ({"dropout": 1}, "model.adapter.dropout = 1: give a number from 0 to below 1"),
        ({"rank_stabilised": 1}, "model.adapter.rank_stabilised = 1: give true or false"),
        ({"modules": "q_proj"}, 'model.adapter.modules = "q_proj": give "all-linear" or a list of names'),
        ({"modules": []}, r"model.adapter.modules = \[\]: give"),
        ({"modules": ["q_prj"]}, r"model.adapter.modules: 'q_prj' is no linear map of the model's layers \(did you mean 'q_proj'\?\)"),
        ({"modules": ["input_layernorm"]}, "model.adapter.modules: 'input_layernorm' is no linear map"),
        ({"modules": ["lm_head"]}, "model.adapter.modules: 'lm_head' is no linear map"),
        ({"modules_to_save": ["lm_haed"]}, r"model.adapter.modules_to_save: 'lm_haed' is no module of the model \(did you mean 'lm_head'\?\)"),
        ({"modules_to_save": "lm_head"}, 'model.adapter.modules_to_save = "lm_head": give a list of names'),
        ({"layers": [2]}, r"model.adapter.layers = \[2\]: there is no layer 2: the model has 2, give 0 to 1"),
        ({"layers": [-1]}, r"model.adapter.layers = \[-1\]: there is no layer -1"),
        ({"layers": []}, r"model.adapter.layers = \[\]: give a list of layers"),
        ({"rank_pattern": {"q_prj": 2}}, r"model.adapter.rank_pattern: 'q_prj' fits no module that is adapted \(did you mean 'q_proj'\?\)"),
        ({"modules": ["v_proj"], "rank_pattern": {"q_proj": 2}}, "model.adapter.rank_pattern: 'q_proj' fits no module that is adapted"),
        ({"rank_pattern": {"q_proj": 0}}, "model.adapter.rank_pattern.q_proj = 0: give a whole number from 1"),
        ({"rank_pattern": ["q_proj"]}, "model.adapter.rank_pattern = .*: give a table"),
        ({"alpha_pattern": {"q_proj": 0}}, "model.adapter.alpha_pattern.q_proj = 0: give a number above 0"),
        ({"alpha_pattern": {"(": 2}}, r"model.adapter.alpha_pattern: '\(' is no regular expression"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name_in_one_line(folders: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    model = loaded(folders["llama"])
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        attach(model, settings, seed=0)
    assert "\n" not in str(error.value)
    assert not products(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_in_four_bits_is_not_trained_in_full(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="modules_to_save: 'q_proj' is in four bits and cannot be trained in full"):
        attach(loaded(folders["llama"], "nf4"), SETTINGS | {"modules_to_save": ["q_proj"]}, seed=0)


def test_modules_to_save_that_peft_would_confuse_are_refused(folders: dict[str, Path]) -> None:
    decoder = loaded(folders["llama"]).model  # "norm" is also the end of "layers.0.input_layernorm"
    with pytest.raises(ConfigError, match=r"peft cannot tell \['norm'\] from 'layers.0.input_layernorm'"):
        attach(decoder, SETTINGS | {"modules_to_save": ["norm"]}, seed=0)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, "pt") as file:
        told = file.metadata()
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata=told)


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), f"{CONFIG}: cannot be read: .*: give the folder of an adapter"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS}: cannot be read"),
    "cut config": (lambda folder: (folder / CONFIG).write_text('{"r": 4'), f"{CONFIG}: cannot be read"),
    "list as config": (lambda folder: (folder / CONFIG).write_text("[1]"), f"{CONFIG}: cannot be read"),
    "cut weights": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500]), f"{WEIGHTS}: cannot be read"),
    "another kind": (lambda folder: edit(folder, peft_type="IA3"), f"{CONFIG}: peft_type 'IA3'"),
    "biases": (lambda folder: edit(folder, bias="all"), f"{CONFIG}: peft_type 'LORA' with bias 'all'"),
    "dora": (lambda folder: edit(folder, use_dora=True), f"{CONFIG}: use_dora = true is more than plain LoRA"),
    "pissa": (lambda folder: edit(folder, init_lora_weights="pissa"), f'{CONFIG}: init_lora_weights = "pissa" is more than plain LoRA'),
    "unknown": (lambda folder: edit(folder, use_something_new=True), f"{CONFIG}: use_something_new = true is more than plain LoRA"),
    "another rank": (lambda folder: edit(folder, r=8), f"{WEIGHTS}: .*lora_A.weight has rank 4, the adapter 8: set model.adapter.r = 4"),
    "no rank": (lambda folder: edit(folder, r=0), f"{CONFIG}: "),
    "another module": (lambda folder: edit(folder, target_modules=["query"]), f"{CONFIG}: does not fit 'tiny-base'"),
    "fewer modules": (lambda folder: edit(folder, target_modules=["q_proj"]), f"{WEIGHTS}: also holds 24 tensors"),
    "missing tensors": (lambda folder: rewrite(folder, lambda state: dict(list(state.items())[1:])), f"{WEIGHTS}: lacks 1 tensors"),
    "another shape": (
        lambda folder: rewrite(folder, lambda state: {name: tensor[:, :3].contiguous() if "lora_A" in name else tensor for name, tensor in state.items()}),
        f"{WEIGHTS}: .* has shape .*: take the base",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_refused_by_name_in_one_line(folders: dict[str, Path], damage: str, tmp_path: Path) -> None:
    save_adapter(adapted(folders["llama"]), tmp_path, base=BASE)
    harm, message = DAMAGES[damage]
    harm(tmp_path)
    with pytest.raises(BundleError, match=f"^{re.escape(str(tmp_path))}/{message}") as error:
        load_adapter(loaded(folders["llama"]), tmp_path, base=BASE)
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(adapted(folders["llama"]), tmp_path, base=BASE)
    with pytest.raises(BundleError, match=r"belongs to the base 'tiny-base' \(0123abcd\), and this is 'other' \(ffff0000\): mount the former"):
        load_adapter(loaded(folders["llama"]), tmp_path, base=Base("other", "ffff0000"))
    renamed = Base("another-name", BASE.digest)
    assert adapter_state(load_adapter(loaded(folders["llama"]), tmp_path, base=renamed))


def test_an_adapter_on_a_model_of_another_family_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(adapted(folders["llama"]), tmp_path, base=BASE)
    with pytest.raises(BundleError, match="does not fit 'tiny-base'.*take the base that the adapter was trained on"):
        load_adapter(loaded(folders["gpt2"]), tmp_path, base=BASE)
    with pytest.raises(BundleError, match=r"has shape \(4, 64\), the model needs \(4, 128\): take the base"):
        load_adapter(loaded(folders["gemma"]), tmp_path, base=BASE)


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [("r", 2, "r"), ("alpha", 4, "lora_alpha"), ("rank_stabilised", True, "use_rslora"), ("rank_pattern", {"q_proj": 2}, "rank_pattern")],
)
def test_a_recipe_that_says_otherwise_than_the_adapter_is_refused(folders: dict[str, Path], key: str, value: Any, name: str, tmp_path: Path) -> None:
    save_adapter(adapted(folders["llama"]), tmp_path, base=BASE)
    with pytest.raises(BundleError, match=f"{CONFIG}: {name} = .*, and model.adapter.{key} = .*: set the latter to the former"):
        load_adapter(attach(loaded(folders["llama"]), SETTINGS | {key: value}, seed=0), tmp_path, base=BASE)


# --- packages that are not there --------------------------------------------------------------------------------------------------

_WITHOUT = "import sys; sys.modules[{package!r}] = None\nimport torch\nfrom pathlib import Path\n"


def run_without(package: str, code: str) -> subprocess.CompletedProcess[str]:
    program = _WITHOUT.format(package=package) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)


def test_plain_lora_needs_no_bitsandbytes(folders: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
from transformers import AutoModelForCausalLM
from kit.models.adapters import Base, attach, guard, load_adapter, merge, quantised_loading, save_adapter
def base():
    return guard(AutoModelForCausalLM.from_pretrained({str(folders["llama"])!r}, **quantised_loading("none", dtype=torch.float32, device=torch.device("cpu"))))
model = attach(base(), {{"r": 2}}, seed=0)
save_adapter(model, Path({str(tmp_path)!r}), base=Base("a", "b"))
print(merge(load_adapter(base(), Path({str(tmp_path)!r}), base=Base("a", "b")), into="fp16").model.lm_head.weight.dtype)
"""
    done = run_without("bitsandbytes", code)
    assert done.stdout.strip() == "torch.float16", done.stderr


def test_a_missing_package_is_named_with_the_command_and_the_setting_that_avoids_it(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(folders["llama"])
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match='^bitsandbytes cannot be imported .*: pip install bitsandbytes, or set model.quantise = "none"$'):
        quantised_loading("nf4", dtype=torch.float32, device=CPU)
    with pytest.raises(DependencyError, match='pip install bitsandbytes, or set train.optimizer = "adamw"$'):
        make_optimizer([], "paged_adamw_8bit")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(DependencyError, match="^peft cannot be imported .*: pip install peft, or leave model.adapter out of the recipe$"):
        attach(model, SETTINGS, seed=0)


def test_importing_the_file_imports_neither_library() -> None:
    done = run_without("nothing", "import kit.models.adapters\nprint(sorted({'peft', 'bitsandbytes'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr
