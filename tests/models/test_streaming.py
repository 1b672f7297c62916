"""Decoders that are run layer by layer: the same scores as in memory, every byte read once, states on disk, runs that were cut off."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from kit.errors import BundleError, ConfigError
from kit.models import adapters
from kit.models.causal import Causal
from kit.models.encoder import layers_of
from kit.models.streaming import LayerStream, Pace
from tests import decoders, tiny

Damage = Callable[[Path], None]
LAYERS = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A decoder of every family as its library saves it."""
    made = {}
    for family in decoders.FAMILIES:
        made[family] = tmp_path_factory.mktemp(family)
        decoders.stock(family).save_pretrained(made[family])
    return made


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "llama"))


def many(rows: tuple[int, ...] = (1, 4, 2), branches: int = 3) -> list[decoders.Trees]:
    """Batches of uneven numbers of rows."""
    return [decoders.trees(count, branches, seed=seed) for seed, count in enumerate(rows)]


def batches_of(trees: list[decoders.Trees]) -> list[dict[str, Tensor]]:
    return [own.batch for own in trees]


def in_memory(folder: Path, trees: list[decoders.Trees]) -> list[Tensor]:
    """The kit's model, all of it in memory."""
    model = Causal.create(folder, outputs=1).eval()
    with torch.no_grad():
        return [model(own.batch) for own in trees]


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, its, rtol=0, atol=atol)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def read(folder: Path) -> dict[str, Tensor]:
    """Its tensors, none of which is the file itself."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def tensor_bytes(folder: Path) -> int:
    """Of all tensors in a folder's files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            entries = json.loads(file.read(length))
        total += sum(end - begin for begin, end in (entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"))
    return total


# --- the same scores -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(decoders.FAMILIES))
def test_scores_are_those_of_the_librarys_model_and_every_byte_is_read_once(folders: dict[str, Path], family: str) -> None:
    trees = many()
    stream = LayerStream(folders[family])
    found = stream.score(batches_of(trees))
    reference = decoders.stock(family)
    assert_close(found, [decoders.one_by_one(reference, own.texts) for own in trees])
    assert stream.pace.read_bytes == stream.model_bytes == tensor_bytes(folders[family])
    assert_same(stream.score(batches_of(trees)), found)  # a second pass


@pytest.mark.parametrize("rows", [(1,), (5,), (1, 1, 1, 1)])
@pytest.mark.parametrize("left", [False, True])
def test_batches_may_be_one_or_many_and_padded_on_any_side(folders: dict[str, Path], rows: tuple[int, ...], left: bool) -> None:
    trees = [decoders.trees(count, 5, seed=seed, left=left) for seed, count in enumerate(rows)]
    assert_close(LayerStream(folders["mistral"]).score(batches_of(trees)), in_memory(folders["mistral"], trees))


def test_nothing_to_score_and_nothing_asked(folders: dict[str, Path]) -> None:
    stream = LayerStream(folders["llama"])
    empty = torch.zeros(0, dtype=torch.long)
    one = decoders.trees(2, 2)
    silent = {**decoders.trees(1, 2, seed=3).batch, "at": empty, "token": empty}
    assert stream.score([]) == []
    found = stream.score([one.batch, silent])
    assert_close(found[:1], in_memory(folders["llama"], [one]))
    assert found[1].shape == (0,)


def test_plain_texts_without_branches_and_many_places(folders: dict[str, Path]) -> None:
    ids = torch.randint(3, decoders.VOCABULARY, (6, 100), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.arange(100).expand(6, -1), "branch": torch.zeros_like(ids)}
    at = torch.cat([row * 100 + torch.arange(99) for row in range(6)])  # more than go through the head at one time
    found = LayerStream(folders["llama"]).score([{**batch, "at": at, "token": ids[:, 1:].flatten()}])[0]
    with torch.no_grad():
        logits = decoders.stock("llama")(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found, logits.gather(-1, ids[:, 1:, None]).flatten(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_two_devices_give_the_same(folders: dict[str, Path], family: str) -> None:
    trees = many((2, 1, 3, 1, 2))
    stream = LayerStream(folders[family], devices=["cpu", "cpu"])
    assert_same(stream.score(batches_of(trees)), LayerStream(folders[family]).score(batches_of(trees)))
    assert stream.pace.read_bytes == stream.model_bytes


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_gpu_gives_the_same(folders: dict[str, Path], family: str) -> None:
    trees = many()
    found = LayerStream(folders[family], devices=["cuda:0"]).score(batches_of(trees))
    assert_close(found, in_memory(folders[family], trees), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_layers_in_four_bits_score_as_they_do_in_memory(folders: dict[str, Path], family: str) -> None:
    pytest.importorskip("bitsandbytes")
    trees = many()
    model = Causal.create(folders[family], outputs=1).eval()
    for layer in layers_of(model.decoder):
        for path, module in list(layer.named_modules()):
            if isinstance(module, torch.nn.Linear | Conv1D):
                values = module.weight.T if isinstance(module, Conv1D) else module.weight
                layer.set_submodule(path, adapters.four_bits(values, module.bias, dtype=torch.float32))
    with torch.no_grad():
        expected = [model(own.batch) for own in trees]
    stream = LayerStream(folders[family], quantise="nf4")
    assert_close(stream.score(batches_of(trees)), expected)
    assert stream.pace.read_bytes == stream.model_bytes
    assert not torch.allclose(expected[0], in_memory(folders[family], trees)[0], atol=1e-2)


def test_a_context_manager_of_the_caller_is_not_needed_for_gradients(folders: dict[str, Path]) -> None:
    assert not any(scores.requires_grad for scores in LayerStream(folders["llama"]).score(batches_of(many())))


# --- folders in four bits ------------------------------------------------------------------------------------------------------------------

FOUR_BITS = {
    "double": {},
    "single": {"bnb_4bit_use_double_quant": False},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},
    "partly": {"llm_int8_skip_modules": ["lm_head", "down_proj"]},
}


def in_memory_as_stored(folder: Path, trees: list[decoders.Trees]) -> list[Tensor]:
    """The library's model of a folder in four bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.float32, attn_implementation="eager").eval()
    adapters.guard(model)
    return [decoders.one_by_one(model, own.texts) for own in trees]


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in FOUR_BITS), ("gemma2", "double"), ("phi3", "double"), ("gpt2", "double")])
def test_a_folder_in_four_bits_is_streamed_as_it_is_stored(folders: dict[str, Path], tmp_path: Path, family: str, kind: str) -> None:
    source = Path(shutil.copytree(folders[family], tmp_path / "source"))
    state = read(source)  # new models have biases of zero
    state |= {name: torch.randn_like(tensor) * 0.3 for name, tensor in state.items() if name.endswith(".bias")}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    folder, trees = decoders.in_four_bits(source, tmp_path / "stored", **FOUR_BITS[kind]), many()
    stream = LayerStream(folder)
    found = stream.score(batches_of(trees))
    assert_close(found, in_memory_as_stored(folder, trees), atol=1e-4)
    assert stream.pace.read_bytes == stream.model_bytes == tensor_bytes(folder)
    assert not torch.allclose(found[0], in_memory(source, trees)[0], atol=1e-2)
    assert_same(LayerStream(folder, devices=["cpu", "cpu"]).score(batches_of(trees)), found)
    rough = LayerStream(folder, dtype=torch.bfloat16).score(batches_of(trees))
    assert float((torch.cat(rough) - torch.cat(found)).abs().mean()) < 0.1


def test_layers_in_four_bits_are_an_eighth_of_what_they_are_in_float32(tmp_path: Path) -> None:
    settings = {**decoders.FAMILIES["llama"], "hidden_size": 512, "intermediate_size": 1024}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(tmp_path / "plain")
    plain, stored = (LayerStream(folder).pace.layer_bytes for folder in (tmp_path / "plain", decoders.in_four_bits(tmp_path / "plain", tmp_path / "nf4")))
    assert stored < plain / 7.5


def test_what_a_folder_holds_in_full_precision_is_rounded_when_that_is_asked(folders: dict[str, Path], tmp_path: Path) -> None:
    """The rest of a folder that is partly in four bits already."""
    folder, trees = decoders.in_four_bits(folders["llama"], tmp_path / "partly", **FOUR_BITS["partly"]), many()
    whole = in_memory_as_stored(decoders.in_four_bits(folders["llama"], tmp_path / "whole"), trees)
    assert_close(LayerStream(folder, quantise="nf4").score(batches_of(trees)), whole, atol=1e-4)


def test_a_linear_map_as_it_was_stored_stays_so_in_evaluation(folders: dict[str, Path], tmp_path: Path) -> None:
    """bitsandbytes rewrites weights in an evaluation forward, where it is not kept from it (see kit.models.adapters.guard)."""
    folder = decoders.in_four_bits(folders["llama"], tmp_path)
    merge_shards(folder)
    state = read(folder)
    beside = {name.removeprefix(f"{UP}."): tensor for name, tensor in state.items() if name.startswith(f"{UP}.")}
    layer = adapters.stored_four_bits(state[UP], beside, None, dtype=torch.float32).eval()
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = layer(rows)
    assert layer.weight.data_ptr() == state[UP].data_ptr() and torch.equal(state[UP], read(folder)[UP])
    torch.testing.assert_close(found, rows @ adapters.dequantised(layer).T, rtol=0, atol=1e-6)


def without(part: str) -> Damage:
    def damage(folder: Path) -> None:
        state = read(folder)
        save_file({name: tensor for name, tensor in state.items() if not name.endswith(f"layers.1.mlp.up_proj.weight.{part}")}, folder / "model.safetensors")

    return damage


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(folder: Path) -> None:
        state = read(folder)
        save_file({**state, name: change(state[name])}, folder / "model.safetensors")

    return damage


UP = "model.layers.1.mlp.up_proj.weight"
STATE = f"{UP}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("absmax"), rf"{UP} in four bits is damaged \(no \.absmax\): copy"),
        (without("nested_quant_map"), rf"{UP} in four bits is damaged \(no \.nested_quant_map\): copy"),
        (without("quant_state.bitsandbytes__nf4"), rf"{UP} in four bits is damaged \(no quant_state\): copy"),
        (replaced(STATE, lambda state: state[:-3]), rf"{UP} in four bits is damaged \(.+\): copy"),
        (replaced(UP, lambda weight: weight[:-1]), rf"{UP} in four bits is damaged \(767 bytes for 48 × 32\): copy"),
        (lambda folder: changed(folder, intermediate_size=96), r"gate_proj\.weight is 48 × 32, by config\.json 96 × 32: take"),
    ],
)  # fmt: skip
def test_a_folder_in_four_bits_that_is_damaged_says_so_in_one_line(folders: dict[str, Path], tmp_path: Path, damage: Damage, message: str) -> None:
    folder = decoders.in_four_bits(folders["llama"], tmp_path)
    merge_shards(folder)
    damage(folder)
    with pytest.raises(BundleError, match=message) as caught:
        LayerStream(folder)
    assert "\n" not in str(caught.value)


def merge_shards(folder: Path) -> None:
    """All tensors in one file."""
    state: dict[str, Tensor] = {}
    for path in folder.glob("model-*.safetensors"):
        state |= {name: tensor.clone() for name, tensor in load_file(path).items()}
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(state, folder / "model.safetensors")


def test_four_bits_outside_the_layers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = decoders.in_four_bits(folders["llama"], tmp_path, llm_int8_skip_modules=["nothing"])
    with pytest.raises(BundleError, match=r"lm_head\.weight is stored in four bits, but is no linear map of a layer: quantise the folder again without it"):
        LayerStream(folder)


# --- files ---------------------------------------------------------------------------------------------------------------------------------


def scatter(folder: Path) -> None:
    """Three shards, every third tensor in the same one: no layer lies in one file, or side by side."""
    state = read(folder)
    names = sorted(state)
    shards = {f"model-0000{number + 1}-of-00003.safetensors": names[number::3] for number in range(3)}
    for file, own in shards.items():
        save_file({name: state[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def only_the_decoder(folder: Path) -> None:
    """Names without the model's prefix, as in the hub's GPT-2, and a buffer that nobody reads."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in read(folder).items()}
    save_file({**state, "h.0.attn.bias": torch.ones(1, 1, 128, 128, dtype=torch.bool)}, folder / "model.safetensors")


def tied_under_the_heads_name(folder: Path) -> None:
    state = read(folder)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, folder / "model.safetensors")


def of_the_kit(folder: Path) -> None:
    model = Causal.create(folder, outputs=1)
    (folder / "model.safetensors").unlink()
    model.save(folder)


def types_mixed(folder: Path) -> None:
    """Norms in float64 behind halves of odd lengths: tensors that cannot all be read where they lie side by side."""
    state = read(folder)
    save_file({name: tensor.double() if "norm" in name else tensor for name, tensor in state.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", scatter),
        ("gemma3", scatter),
        ("gpt2", only_the_decoder),
        ("gemma", tied_under_the_heads_name),
        ("qwen2", of_the_kit),
        ("gemma", of_the_kit),
        ("phi3", types_mixed),
    ],
)
def test_tensors_are_found_wherever_they_lie(folders: dict[str, Path], tmp_path: Path, family: str, change: Damage) -> None:
    trees = many()
    expected = in_memory(folders[family], trees)
    folder = Path(shutil.copytree(folders[family], tmp_path / family))
    change(folder)
    stream = LayerStream(folder)
    assert_close(stream.score(batches_of(trees)), expected)
    assert stream.pace.read_bytes == stream.model_bytes


def test_tensors_that_lie_oddly_are_read_where_their_type_wants_them(tmp_path: Path) -> None:
    """A file whose header has an odd length, where halves of an odd number stand before floats without a gap."""
    settings = {**decoders.FAMILIES["llama"], "mlp_bias": True, "intermediate_size": 49}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(tmp_path)
    state = {name: tensor.half() if "gate" in name else tensor for name, tensor in read(tmp_path).items()}
    header, data = {}, b""
    for name in sorted(state):
        raw = state[name].numpy().tobytes()
        kind = "F16" if "gate" in name else "F32"
        header[name] = {"dtype": kind, "shape": list(state[name].shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    trees = many()
    found = LayerStream(tmp_path).score(batches_of(trees))
    save_file({name: tensor.float() for name, tensor in state.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_close(found, in_memory(tmp_path, trees))


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3"])
def test_weights_in_half_precision_are_computed_with_as_asked(family: str, tmp_path: Path) -> None:
    trees = many()
    decoders.stock(family).to(torch.bfloat16).save_pretrained(tmp_path)
    stream = LayerStream(tmp_path)
    assert_close(stream.score(batches_of(trees)), in_memory(tmp_path, trees))
    assert stream.pace.read_bytes == tensor_bytes(tmp_path)
    rough = LayerStream(tmp_path, dtype=torch.bfloat16).score(batches_of(trees))
    assert_close(rough, in_memory(tmp_path, trees), atol=1.0)
    assert not torch.equal(rough[0], in_memory(tmp_path, trees)[0])


# --- states on disk ------------------------------------------------------------------------------------------------------------------------


def bytes_of(batches: list[dict[str, Tensor]]) -> list[int]:
    return [batch["input_ids"].numel() * 32 * 4 for batch in batches]


@pytest.mark.parametrize("fitting", [0, 1, 2])
def test_states_that_do_not_fit_are_spilled_in_half_precision(folders: dict[str, Path], tmp_path: Path, fitting: int) -> None:
    batches = batches_of(many())
    sizes = bytes_of(batches)
    spill = tmp_path / "spill"
    seen: list[list[Path]] = []
    stream = LayerStream(folders["llama"])
    found = stream.score(batches, memory=sum(sizes[:fitting]), spill=spill, on_layer=lambda *_: seen.append(sorted(spill.rglob("*.safetensors"))))
    exact = stream.score(batches)
    assert_same(found[:fitting], exact[:fitting])
    assert_close(found, exact, atol=0.05)
    assert not torch.equal(found[-1], exact[-1])
    assert [len(paths) for paths in seen] == [3 - fitting] * LAYERS
    assert list(spill.iterdir()) == []


def test_spilled_states_take_two_bytes_a_number_and_are_float16_while_its_range_is_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    batches = batches_of(many((2,)))
    for scale, dtype in ((1.0, torch.float16), (1e5, torch.bfloat16)):
        folder = Path(shutil.copytree(folders["gpt2"], tmp_path / str(scale)))
        state = read(folder)
        state["transformer.wte.weight"] *= scale
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        seen: list[Tensor] = []
        found = LayerStream(folder).score(
            batches, memory=0, spill=tmp_path, on_layer=lambda *_, seen=seen: seen.append(load_file(next(tmp_path.glob("states-*/*.safetensors")))["states"])
        )
        assert {states.dtype for states in seen} == {dtype} and all(torch.isfinite(scores).all() for scores in found)


def test_without_a_folder_to_spill_to_it_says_what_states_take(folders: dict[str, Path]) -> None:
    batches = batches_of(many())
    with pytest.raises(ConfigError, match=f"3 batches take {sum(bytes_of(batches))} bytes, but memory = 100: name a folder"):
        LayerStream(folders["llama"]).score(batches, memory=100)


class InterruptionError(Exception):
    """What a test raises."""


def cut_off(after: int) -> Callable[[int, int, float], None]:
    def on_layer(layer: int, layers: int, seconds: float) -> None:
        if layer == after:
            raise InterruptionError

    return on_layer


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("after", range(1, LAYERS + 1))
def test_a_run_that_was_cut_off_goes_on_after_its_last_layer(folders: dict[str, Path], tmp_path: Path, family: str, after: int, memory: int | None) -> None:
    batches, state = batches_of(many()), tmp_path / "state"
    expected = LayerStream(folders[family]).score(batches, memory=memory, spill=tmp_path)
    with pytest.raises(InterruptionError):
        LayerStream(folders[family]).score(batches, memory=memory, state=state, on_layer=cut_off(after))
    done: list[int] = []
    stream = LayerStream(folders[family])
    found = stream.score(batches, memory=memory, state=state, on_layer=lambda layer, *_: done.append(layer))
    assert_same(found, expected)
    assert done == list(range(after + 1, LAYERS + 1))
    assert stream.pace.read_bytes < stream.model_bytes and list(state.iterdir()) == []


def test_a_run_that_was_cut_off_between_two_batches_goes_on_there(folders: dict[str, Path], tmp_path: Path) -> None:
    """Also one whose last file was cut short: that batch starts anew."""
    batches, state = batches_of(many((2, 1, 3, 1))), tmp_path / "state"
    stream = LayerStream(folders["mistral"])
    expected = stream.score(batches)
    for after in (1, 2):
        with pytest.raises(InterruptionError):
            stream.score(batches, state=state, on_layer=cut_off(after))
        (older, newer) = (tmp_path / "1", tmp_path / "2")
        shutil.copytree(state, (older, newer)[after - 1])
    shutil.copy(older / "batch-00002.safetensors", state)
    (state / "batch-00003.safetensors").write_bytes((newer / "batch-00003.safetensors").read_bytes()[:200])
    (state / "batch-00001.part").write_bytes(b"half a file")
    assert_same(stream.score(batches, state=state), expected)
    assert list(state.iterdir()) == []


def test_a_killed_process_goes_on_in_another(folders: dict[str, Path], tmp_path: Path) -> None:
    batches, state = batches_of(many()), tmp_path / "state"
    torch.save(batches, tmp_path / "batches.pt")
    program = (
        "import os, sys, torch; from pathlib import Path; from kit.models.streaming import LayerStream\n"
        "folder, batches, state = sys.argv[1:]\n"
        "LayerStream(Path(folder)).score(torch.load(batches), state=Path(state), on_layer=lambda layer, *_: os._exit(9) if layer == 2 else None)"
    )
    killed = subprocess.run([sys.executable, "-c", program, folders["llama"], tmp_path / "batches.pt", state], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == 9
    done: list[int] = []
    found = LayerStream(folders["llama"]).score(batches, state=state, on_layer=lambda layer, *_: done.append(layer))
    assert done == [3]
    assert_same(found, LayerStream(folders["llama"]).score(batches))


def other_batches(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {"batches": batches[:2]}


def other_memory(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {"batches": batches, "memory": 10**9}


def other_weights(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    state = read(folder)
    save_file({name: tensor * 1.5 for name, tensor in state.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return {"batches": batches}


@pytest.mark.parametrize("change", [other_batches, other_memory, other_weights])
def test_states_of_another_run_are_refused(llama: Path, tmp_path: Path, change: Callable[..., dict[str, Any]]) -> None:
    batches, state = batches_of(many()), tmp_path / "state"
    with pytest.raises(InterruptionError):
        LayerStream(llama).score(batches, state=state, on_layer=cut_off(1))
    with pytest.raises(BundleError, match=r"run\.json: .* other batches, weights or settings: empty the folder"):
        LayerStream(llama).score(state=state, **change(llama, batches))


# --- forecast ------------------------------------------------------------------------------------------------------------------------------


def test_a_forecast_is_the_slower_of_reading_and_computing() -> None:
    reading = Pace(layers=10, layer_bytes=100.0, other_bytes=300, read_bytes=50, read_s=1.0, tokens=1000, compute_s=1.0)
    assert reading.seconds(100) == pytest.approx(10 * 2 + (300 + 100) / 50)
    assert reading.seconds(50_000) == pytest.approx(10 * 50 + (300 + 100) / 50)
    assert reading.of_layers(3, 100) == pytest.approx(6)


def test_every_layer_is_told_with_what_is_left(folders: dict[str, Path]) -> None:
    told: list[tuple[int, int, float]] = []
    stream = LayerStream(folders["llama"])
    batches = batches_of(many())
    stream.score(batches, on_layer=lambda *values: told.append(values))
    assert [(layer, layers) for layer, layers, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0][2] > 0 and told[-1][2] == 0
    assert stream.pace.tokens == LAYERS * sum(batch["input_ids"].numel() for batch in batches)


def test_a_pace_is_measured_on_the_first_layers_alone(folders: dict[str, Path]) -> None:
    stream = LayerStream(folders["llama"])
    batches = batches_of(many())
    pace = stream.measure(batches, layers=1)
    head = decoders.VOCABULARY * 32 * 4
    assert pace.read_bytes == stream.model_bytes - 2 * pace.layer_bytes - head
    assert pace.seconds(10**9) > pace.seconds(10**6) > 0
    assert_close(stream.score(batches), in_memory(folders["llama"], many()))


# --- what is refused -----------------------------------------------------------------------------------------------------------------------


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def a_shard_less(folder: Path) -> None:
    scatter(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def a_shard_less_and_no_index(folder: Path) -> None:
    a_shard_less(folder)
    (folder / "model.safetensors.index.json").unlink()


def broken_index(folder: Path) -> None:
    scatter(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def a_tensor_less(folder: Path) -> None:
    state = read(folder)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors")


def changed(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def larger_vocabulary(folder: Path) -> None:
    changed(folder, vocab_size=130)


def large_tokenizer(folder: Path) -> None:
    tiny.train_byte_level(folder, vocab_size=300)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 40)


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def eight_bits(folder: Path) -> None:
    state = read(folder)
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(state, folder / "model.safetensors")


def in_gptq(folder: Path) -> None:
    changed(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def in_awq(folder: Path) -> None:
    changed(folder, quantization_config={"quant_method": "awq", "bits": 4})


def in_eight_bits(folder: Path) -> None:
    changed(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False})


def remote_code(folder: Path) -> None:
    changed(folder, auto_map={"AutoModelForCausalLM": "evil.py"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (only_bin, r"llama: no model\.safetensors: convert the checkpoint"),
        (a_shard_less, r"model-00002-of-00003\.safetensors is missing: copy all 3 files"),
        (a_shard_less_and_no_index, r"1 of 3 shards is missing: copy all 3 files"),
        (broken_index, r"model\.safetensors\.index\.json: is no index of weights .*: copy the file again"),
        (a_tensor_less, r"lack 1 tensors of the decoder, such as model\.layers\.1\.mlp\.up_proj\.weight: take"),
        (larger_vocabulary, r"model\.safetensors: model\.embed_tokens\.weight is 120 × 32, by config\.json 130 × 32: take"),
        (large_tokenizer, r"tokenizer\.json: has tokens up to \d+, but the weights know 120: take the tokenizer"),
        (no_tokenizer, r"tokenizer\.json: cannot be read: .*: copy the file again"),
        (cut_short, r"model\.safetensors: ends before its tensors do: copy the file again"),
        (no_safetensors, r"model\.safetensors: is no safetensors file or damaged .*: copy the file again"),
        (empty_file, r"model\.safetensors: is no safetensors file or damaged .*: copy the file again"),
        (eight_bits, r"model\.layers\.0\.mlp\.up_proj\.weight is stored as I8"),
        (in_gptq, r"config\.json: the weights are quantised by 'gptq': take the folder in full precision or in bitsandbytes' four bits"),
        (in_awq, r"config\.json: the weights are quantised by 'awq': take"),
        (in_eight_bits, r"config\.json: the weights are quantised by 'bitsandbytes': take"),
        (remote_code, r"config\.json: asks for remote code"),
    ],
)
def test_a_folder_that_cannot_be_streamed_says_why_in_one_line(llama: Path, damage: Damage, message: str) -> None:
    damage(llama)
    with pytest.raises(BundleError, match=message) as caught:
        LayerStream(llama)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_file_that_shrinks_while_it_is_read_says_so(llama: Path) -> None:
    stream = LayerStream(llama)
    cut_short(llama)
    with pytest.raises(BundleError, match=r"model\.safetensors: ends before its tensors do"):
        stream.score(batches_of(many()))


def test_a_token_that_the_weights_do_not_know_is_refused(folders: dict[str, Path]) -> None:
    batch = decoders.trees(1, 2).batch
    batch["input_ids"][0, 0] = decoders.VOCABULARY
    with pytest.raises(BundleError, match="a text has token 120, but the weights know 120: take the tokenizer"):
        LayerStream(folders["llama"]).score([batch])


SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4, "initializer_range": 0.3}, "choose a model of another family"),
        ("mamba", {}, "makes its attention masks itself"),
        ("mixtral", {"num_local_experts": 2}, "parts cannot be streamed: choose a model of another family"),
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}, "'t5'"),
    ],
)
def test_families_that_cannot_be_streamed_are_refused_before_any_work(kind: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(kind, **({} if kind == "t5" else SIZES), **settings)
    (AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM).from_config(config).save_pretrained(tmp_path)
    with pytest.raises((ConfigError, BundleError), match=message):
        LayerStream(tmp_path).score(batches_of(many()))


# --- memory --------------------------------------------------------------------------------------------------------------------------------

MEMORY = """
import re, sys
from pathlib import Path
from kit.models.streaming import LayerStream
from tests import decoders
def memory(what):  # getrusage would count the process that started this one
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
batches = [decoders.trees(2, 5, seed=seed).batch for seed in range(4)]
stream = LayerStream(Path(sys.argv[1]))
before = memory("VmRSS")
stream.score(batches)
print(before, memory("VmHWM"), stream.model_bytes, stream.pace.layer_bytes)
"""


@pytest.mark.slow
@pytest.mark.parametrize("words", [decoders.VOCABULARY, 50_000])
def test_no_more_than_two_layers_are_in_memory(tmp_path: Path, words: int) -> None:
    """Nor more than one of the two tables of words."""
    settings = {**decoders.FAMILIES["llama"], "hidden_size": 768, "intermediate_size": 2560, "num_hidden_layers": 14, "vocab_size": words}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="100MB")
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    before, peak, model, layer = map(float, re.findall(r"[\d.]+", done.stdout.splitlines()[-1]))
    table = words * 768 * 4
    assert model > 400e6
    assert peak - before < 2 * layer + table + 100e6, f"before {before / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, layer {layer / 1e6:.0f} MB"
