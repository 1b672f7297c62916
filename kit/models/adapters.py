"""LoRA and QLoRA by peft and bitsandbytes: loading in four bits, attach, save, load, merge; and guards against what these libraries get wrong.

The only file that imports either, and only inside functions: nothing else in the kit needs them. Knows no task, no batch and no recipe file.
LoRA: Hu et al. 2021. QLoRA (NF4, double quantisation, paged optimizer): Dettmers et al. 2023. Rank-stabilised scaling: Kalajdzievski 2023.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kit.errors import BundleError, ConfigError, DependencyError, nearest
from kit.manifest import write_atomically

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL_LINEAR = "all-linear"
QUANTISATIONS = ("none", "nf4")
OPTIMIZERS = ("adamw", "paged_adamw_8bit", "adam", "adadelta")
_OWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {  # torch's optimizers
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "adadelta": partial(torch.optim.Adadelta, rho=0.95, eps=1e-6),
}
_NAME = "default"  # of the adapter, to peft
_PREFIX = "base_model.model."  # what peft puts before a parameter's name in its files
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SHOWN = 300  # characters of a library's error


class Base(NamedTuple):
    """The weights an adapter belongs to: the bundle's name, and a digest that changes when they do."""

    name: str
    digest: str


class Merged(NamedTuple):
    """model: what was given, now without an adapter. drift: the largest change of a score, None where no scores were asked for."""

    model: PreTrainedModel
    drift: float | None


@dataclass(frozen=True)
class Adapter:
    """The recipe's model.adapter."""

    r: int = 16
    alpha: float = 32
    """The product B·A counts alpha / r; rank-stabilised: alpha / √r."""
    dropout: float = 0.05
    rank_stabilised: bool = False
    modules: str | list[str] = ALL_LINEAR
    """Names, or ends of names, of linear maps; "all-linear": all of those inside the layers."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full beside the adapter and saved with it. One of two that share a weight no longer shares it."""
    layers: list[int] | None = None
    """Layers to adapt, from 0; without it, all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """End of a module's name (a regular expression) → its r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(_whole(self.r) and self.r >= 1, "r", self.r, "a whole number from 1")
        _require(_number(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a number above 0")
        _require(_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "a number from 0 to below 1")
        _require(isinstance(self.rank_stabilised, bool), "rank_stabilised", self.rank_stabilised, "true or false")
        _require(self.modules == ALL_LINEAR or (_words(self.modules) and self.modules != []), "modules", self.modules, f'"{ALL_LINEAR}" or a list of names')
        _require(_words(self.modules_to_save), "modules_to_save", self.modules_to_save, "a list of names")
        for key, least in (("rank_pattern", 1), ("alpha_pattern", 0)):
            _check_pattern(key, getattr(self, key), least)
        layers: Any = self.layers
        listed = isinstance(layers, list) and layers != [] and all(map(_whole, layers))
        _require(layers is None or listed, "layers", layers, "a list of layers, from 0, or leave it out")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Adapter:
        """From the recipe's values. Raises ConfigError."""
        if not settings:
            raise ConfigError("[model.adapter] is empty: give at least r, or leave it out")
        known = [each.name for each in fields(cls)]
        for key in settings:
            if key not in known:
                raise ConfigError(f"model.adapter.{key} is unknown{nearest(key, known)}")
        return cls(**settings)


# --- loading in four bits ---------------------------------------------------------------------------------------------------------


def quantised_loading(kind: str, *, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keywords for from_pretrained, which then puts each tensor on the device as it is read: there is no second copy of the weights.

    kind: "nf4" (four bits, double quantisation; products are of type `dtype`, and what stays unquantised is held in it) or "none" (all of
    type `dtype`). Pass the model to `guard` before its first forward. Raises ConfigError, DependencyError.
    """
    if kind not in QUANTISATIONS:
        raise ConfigError(f"model.quantise = {kind!r} is unknown{nearest(str(kind), QUANTISATIONS)}")
    keywords: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if kind == "none":
        return keywords
    _bitsandbytes('set model.quantise = "none"')
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )  # fmt: skip
    return keywords | {"quantization_config": settings}


def four_bits(weight: Tensor, bias: Tensor | None, *, dtype: torch.dtype) -> nn.Module:
    """A linear map in NF4 with double quantisation, guarded, on the device of weight (out, in). dtype: of its products."""
    bitsandbytes = _bitsandbytes('set model.quantise = "none"')
    rows, columns = weight.shape
    layer: Any = bitsandbytes.nn.Linear4bit(
        columns, rows, bias=bias is not None, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )  # fmt: skip
    values = weight.detach().contiguous()
    quantised = bitsandbytes.nn.Params4bit(values, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = quantised.to(weight.device)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return guard(layer)


def guard(model: nn.Module) -> nn.Module:
    """Keep the four-bit weights of a model as they were loaded; returns the model.

    In an evaluation forward on a processor with AVX512-BF16, bitsandbytes (0.50.0 to 0.50.2) rewrites them in place in another order, after
    which adapters get no gradients, a merge gives garbage and scores lose precision. To be called before the first forward.
    """
    layers = [module for module in model.modules() if _is_four_bits(module)]
    for layer in layers:
        assert not _is_rewritten(layer), f"{type(layer).__name__} was rewritten by a forward before kit.models.adapters.guard: load the model again"
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if any(layer.weight.device.type == "cpu" for layer in layers):
        _check_that_the_guard_works()
    return model


@cache
def _check_that_the_guard_works() -> None:
    """Raise DependencyError where the installed bitsandbytes rewrites guarded weights all the same."""
    bitsandbytes = _bitsandbytes('set model.quantise = "none"')
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4").to("cpu").eval()
    layer.support_avx512bf16_for_cpu = False
    before = layer.weight.data.clone()
    with torch.no_grad():
        layer(torch.ones(1, 64))
    if _is_rewritten(layer) or not torch.equal(layer.weight.data, before):
        version = bitsandbytes.__version__
        raise DependencyError(f"bitsandbytes {version} rewrites four-bit weights in a forward: pip install bitsandbytes==0.50.2, or set model.quantise = \"none\"")


@contextmanager
def compute_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, a model that computes in half precision computes in float32, four-bit products, norms and embeddings included; afterwards it is as before.

    For scoring again what was not finite. Takes the memory of the unquantised weights in float32. Ends autocasting as well.
    """
    quantised = [module for module in model.modules() if _is_four_bits(module)]
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers()) if _is_half(tensor)]
    products = [module.compute_dtype for module in quantised]
    devices = {tensor.device.type for tensor in model.parameters()}
    try:
        for tensor, values in kept:
            tensor.data = values.float()
        for module in quantised:
            module.compute_dtype = torch.float32  # type: ignore[assignment]
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        for tensor, values in kept:
            tensor.data = values
        for module, dtype in zip(quantised, products, strict=True):
            module.compute_dtype = dtype


# --- the adapter ------------------------------------------------------------------------------------------------------------------


def attach(model: PreTrainedModel, settings: Mapping[str, Any], *, seed: int) -> PreTrainedModel:
    """Put a new adapter into the model, in place, and freeze all else; it changes no output until it is trained. Returns the model.

    settings: model.adapter of a recipe, see `Adapter`. What is trained is in float32: a model in half precision is to be run under autocast.
    Gradient checkpointing must not be reentrant, and then needs nothing more. Raises ConfigError, DependencyError.
    """
    wanted = Adapter.of(settings)
    peft = _peft()
    assert not _is_adapted(model), "the model has an adapter: attach to the base"
    linear = _linear_names(model)
    chosen = _chosen(wanted, linear)
    config = peft.LoraConfig(
        r=wanted.r,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        use_rslora=wanted.rank_stabilised,
        target_modules=_shortest(chosen, [name for name, _ in model.named_modules()]),
        modules_to_save=_to_save(wanted, model) or None,
        rank_pattern=_of_chosen("rank_pattern", wanted.rank_pattern, chosen),
        alpha_pattern=_of_chosen("alpha_pattern", wanted.alpha_pattern, chosen),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in chosen),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        return _inject(model, config)


def adapter_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors, and no others, by their names in peft's files. They are the model's own, not copies."""
    state = _peft().get_peft_model_state_dict(model, adapter_name=_NAME, save_embedding_layers=False)
    return {_PREFIX + name: tensor for name, tensor in sorted(state.items())}


def save_adapter(model: PreTrainedModel, folder: Path, *, base: Base) -> None:
    """Write adapter_config.json and adapter_model.safetensors as peft reads them; the latter also says which base they belong to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_state(model).items()}
    write_atomically(folder / WEIGHTS, save(state, metadata={"base": json.dumps(base._asdict())}))
    values = _saved_values(_config_of(model)) | {"base_model_name_or_path": base.name}
    write_atomically(folder / CONFIG, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())


def load_adapter(model: PreTrainedModel, folder: Path, *, base: Base) -> PreTrainedModel:
    """Put the adapter that `save_adapter` (or peft) wrote into a model that has none, or fill the one it has; returns the model.

    base: what the model was loaded from. Raises BundleError where the adapter belongs to other weights, or does not fit.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    state = _read_weights(folder / WEIGHTS, base)
    if _is_adapted(model):
        _check_settings(folder / CONFIG, config, _config_of(model))
    else:
        config.fan_in_fan_out = any(isinstance(module, Conv1D) for module in model.modules())
        try:
            with torch.random.fork_rng(devices=[]):
                _inject(model, config)
        except (ValueError, RuntimeError) as error:
            raise BundleError(f"{folder / CONFIG}: does not fit {base.name!r}: {_one_line(error)}: take the base that the adapter was trained on") from None
    _fill(folder / WEIGHTS, adapter_state(model), state)
    return model


def _inject(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    model.requires_grad_(False)
    guard(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # see modules_to_save and `merge`
        _peft().inject_adapter_in_model(config, model, adapter_name=_NAME)
    trained = {id(tensor) for name, tensor in model.named_parameters() if f".{_NAME}." in name}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
        if id(parameter) in trained:
            parameter.data = parameter.data.float()
    return model.train(model.training)  # else dropout is on in the new modules of a model in evaluation


def _linear_names(model: nn.Module) -> list[str]:
    """Names of the linear maps inside the numbered layers: without the vocabulary's head and such."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and _layer_of(name) is not None]


def _layer_of(name: str) -> int | None:
    """The first number in a module's name: of the layer, not of an expert in it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _chosen(wanted: Adapter, linear: list[str]) -> list[str]:
    """The linear maps that the settings name, in the model's order."""
    chosen = set(linear) if wanted.modules == ALL_LINEAR else set()
    for end in [] if wanted.modules == ALL_LINEAR else wanted.modules:
        found = [name for name in linear if _ends(name, end)]
        if not found:
            known = {name.rpartition(".")[2] for name in linear}
            raise ConfigError(f"model.adapter.modules: {end!r} is no linear map of the model's layers{nearest(end, known)}")
        chosen |= set(found)
    if wanted.layers is not None:
        count = 1 + max(_layer_of(name) or 0 for name in linear)
        wrong = [layer for layer in wanted.layers if not 0 <= layer < count]
        if wrong:
            raise ConfigError(f"model.adapter.layers = {wanted.layers}: there is no layer {wrong[0]}: the model has {count}, give 0 to {count - 1}")
        chosen = {name for name in chosen if _layer_of(name) in wanted.layers}
        if not chosen:
            raise ConfigError(f"model.adapter.layers = {wanted.layers}: none of them has the modules {wanted.modules}: choose others of either")
    return [name for name in linear if name in chosen]


def _shortest(chosen: list[str], every: list[str]) -> list[str]:
    """Ends of names that fit the chosen modules and no other one; their whole names where there are none."""
    ends = {name.rpartition(".")[2] for name in chosen}
    also = [name for name in every if name.rpartition(".")[2] in ends]
    return sorted(ends if len(also) == len(chosen) else chosen)


def _to_save(wanted: Adapter, model: nn.Module) -> list[str]:
    """Whole names of the modules to save."""
    modules = {name: module for name, module in model.named_modules() if name}
    names: list[str] = []
    for end in wanted.modules_to_save:
        found = [name for name in modules if _ends(name, end)]
        key = f"model.adapter.modules_to_save: {end!r}"
        if not found:
            raise ConfigError(f"{key} is no module of the model{nearest(end, {name.rpartition('.')[2] for name in modules})}")
        if any(_is_four_bits(inner) for name in found for inner in modules[name].modules()):
            raise ConfigError(f'{key} is in four bits and cannot be trained in full: put it into model.adapter.modules, or set model.quantise = "none"')
        names += found
    also = [name for name in modules if name.endswith(tuple(names)) and name not in names] if names else []  # as peft compares them
    if also:
        raise ConfigError(f"model.adapter.modules_to_save: peft cannot tell {names} from {also[0]!r}: name that, too, or neither")
    return names


def _of_chosen(key: str, pattern: dict[str, Any], chosen: list[str]) -> dict[str, Any]:
    """The pattern, every part of which fits a chosen module as peft compares them. Raises ConfigError."""
    for end in pattern:
        if not any(re.match(rf"(.*\.)?({end})$", name) for name in chosen):
            known = {name.rpartition(".")[2] for name in chosen}
            raise ConfigError(f"model.adapter.{key}: {end!r} fits no module that is adapted{nearest(end, known)}")
    return dict(pattern)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


# --- files ------------------------------------------------------------------------------------------------------------------------

_PLAIN: dict[str, Any] = {"peft_type": "LORA", "task_type": None, "bias": "none", "inference_mode": True}
_KEPT = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
_KEYS = {"r": "r", "lora_alpha": "alpha", "use_rslora": "rank_stabilised", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
_HARMLESS = {*_PLAIN, *_KEPT, "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "init_lora_weights", "layers_pattern"}
_HARMLESS |= {"layers_to_transform", "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "exclude_modules", "runtime_config"}


def _saved_values(config: Any) -> dict[str, Any]:
    """What any version of peft needs to know, in a fixed order."""
    values = {key: getattr(config, key) for key in _KEPT}
    return _PLAIN | {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}


def _read_config(path: Path) -> Any:
    """A LoraConfig from a file of any version of peft. Raises BundleError for kinds of adapters that are not LoRA, or more than it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path}: cannot be read: {_one_line(error)}: give the folder of an adapter, with {CONFIG} and {WEIGHTS}") from None
    if kind != "LORA" or values.get("bias", "none") != "none":
        raise BundleError(f"{path}: peft_type {kind!r} with bias {values.get('bias')!r}: only LoRA without biases can be read: train the adapter again")
    foreign = [key for key, value in values.items() if value and key not in _HARMLESS]
    if foreign or values.get("init_lora_weights", True) not in (True, False, "gaussian"):
        key = foreign[0] if foreign else "init_lora_weights"
        raise BundleError(f"{path}: {key} = {json.dumps(values[key])} is more than plain LoRA: train the adapter without it, or merge it where it was made")
    shape = {key: values[key] for key in (*_KEPT, "layers_to_transform", "layers_pattern", "exclude_modules") if values.get(key) is not None}
    try:
        return _peft().LoraConfig(**shape)
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path}: {_one_line(error)}: train the adapter again") from None


def _read_weights(path: Path, base: Base) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            told = (file.metadata() or {}).get("base")
        known = Base(**json.loads(told)) if told else base  # peft's own files do not say
    except Exception as error:  # safetensors raises unrelated types for missing and damaged files
        raise BundleError(f"{path}: cannot be read: {_one_line(error)}: copy the adapter again, or train it") from None
    if known.digest != base.digest:
        there, here = f"{known.name!r} ({known.digest})", f"{base.name!r} ({base.digest})"
        raise BundleError(f"{path}: belongs to the base {there}, and this is {here}: mount the former, or train the adapter again")
    return state


def _check_settings(path: Path, config: Any, attached: Any) -> None:
    for name, key in _KEYS.items():
        there, here = getattr(config, name), getattr(attached, name)
        if there != here:
            raise BundleError(f"{path}: {name} = {there}, and model.adapter.{key} = {here}: set the latter to the former, or train the adapter again")


def _fill(path: Path, own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy tensors from a file into the adapter's own. Raises BundleError where names or shapes differ."""
    for names, what in ((own.keys() - state.keys(), "lacks"), (state.keys() - own.keys(), "also holds")):
        if names:
            raise BundleError(f"{path}: {what} {len(names)} tensors, such as {min(names)}: give the model.adapter it was trained with, and its base")
    for name, tensor in own.items():
        there, here = tuple(state[name].shape), tuple(tensor.shape)
        if there != here:
            side = {"lora_A": 0, "lora_B": 1}.get(name.split(".")[-2])
            if side is not None and there[1 - side] == here[1 - side]:
                raise BundleError(f"{path}: {name} has rank {there[side]}, the adapter {here[side]}: set model.adapter.r = {there[side]}, or train the adapter again")
            raise BundleError(f"{path}: {name} has shape {there}, the model needs {here}: take the base that the adapter was trained on")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


# --- merging ----------------------------------------------------------------------------------------------------------------------


def merge(model: PreTrainedModel, *, into: str, scores: Callable[[], Tensor] | None = None) -> Merged:
    """Add the adapter to the weights, in place, layer by layer: dequantise, add scaling · B·A in float32, store.

    into: "fp32", "fp16" or "bf16": a plain model of that type; "nf4": the layers that were in four bits are so again, which changes what the
    adapter learnt, so `scores` must be given. It is called before and after, and its largest change is the drift. Raises ConfigError.
    """
    if into not in (*_DTYPES, "nf4"):
        raise ConfigError(f"merge into {into!r}: unknown{nearest(str(into), (*_DTYPES, 'nf4'))}")
    if into == "nf4" and scores is None:
        raise ConfigError('merge into "nf4" rounds away a part of the adapter: give scores, so that the drift is known, or merge into "fp16"')
    quantised = any(_is_four_bits(module) for module in model.modules())
    if into == "nf4" and not quantised:
        raise ConfigError('merge into "nf4": the base is not in four bits: set model.quantise = "nf4" and train on it, or merge into "fp16"')
    before = scores() if scores else None
    for name in _to_replace(model):
        model.set_submodule(name, _merged(model.get_submodule(name), into))
    _forget_adapter(model)
    if into in _DTYPES:
        _forget_quantisation(model, _DTYPES[into])
    model.requires_grad_(False).train(model.training)
    drift = float((scores() - before).abs().max()) if scores and before is not None else None
    return Merged(model, drift)


def _to_replace(model: nn.Module) -> list[str]:
    """Names of adapted, quantised and wholly trained modules, without what is inside them."""
    names: list[str] = []
    for name, module in model.named_modules():
        outer = any(name.startswith(f"{other}.") for other in names)
        if not outer and (_adapts(module) or _is_four_bits(module) or _is_saved_whole(module)):
            names.append(name)
    return names


def _merged(module: Any, into: str) -> nn.Module:
    """What stands in place of an adapted, quantised or wholly trained module."""
    if _is_saved_whole(module):
        dtype = next(module.original_module.parameters()).dtype
        trained: nn.Module = module.modules_to_save[_NAME].to(dtype)
        return trained
    layer = module.get_base_layer() if _adapts(module) else module
    if _is_four_bits(layer):
        if not _adapts(module) and into == "nf4":
            return layer
        weight = dequantised(layer)
        if _adapts(module):
            weight += module.get_delta_weight(_NAME)
        return _four_bits_like(layer, weight) if into == "nf4" else _plain_like(layer, weight.to(_DTYPES[into]))
    layer.weight.data = (layer.weight.data.float() + module.get_delta_weight(_NAME)).to(_DTYPES[into])
    return layer


def dequantised(layer: Any) -> Tensor:
    """The weight (out, in) of a four-bit layer in float32, whatever type it had before."""
    assert not _is_rewritten(layer), "the weights were rewritten by a forward: kit.models.adapters.guard was not called"
    state = copy(layer.weight.quant_state)
    state.dtype = torch.float32
    functional = _bitsandbytes('set model.quantise = "none"').functional
    weight: Tensor = functional.dequantize_4bit(layer.weight.data, state)
    return weight


def _four_bits_like(layer: Any, weight: Tensor) -> nn.Module:
    made = four_bits(weight, layer.bias, dtype=layer.compute_dtype)
    if hasattr(layer, "source_cls"):
        made.source_cls = layer.source_cls  # transformers' note of what the layer was
    return made


def _plain_like(layer: Any, weight: Tensor) -> nn.Module:
    """The linear map a four-bit layer was made of, GPT-2's transposed kind as well."""
    rows, columns = weight.shape
    if getattr(layer, "source_cls", nn.Linear) is Conv1D:
        with torch.device("meta"):
            made: Any = Conv1D(rows, columns)
        weight = weight.T.contiguous()
    else:
        made = nn.Linear(columns, rows, bias=layer.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
    return made


def _forget_adapter(model: Any) -> None:
    del model.peft_config
    out = model.get_output_embeddings()
    if out is not None and out.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # one of them may have been trained alone


def _forget_quantisation(model: Any, dtype: torch.dtype) -> None:
    """Hold all that is left in `dtype`, and remove transformers' notes that the model is quantised."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_4bit_serializable"):
        model.__dict__.pop(name, None)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


# --- the optimizer ----------------------------------------------------------------------------------------------------------------


def make_optimizer(groups: list[dict[str, Any]], kind: str) -> torch.optim.Optimizer:
    """Over parameter groups: AdamW, "adamw", fused, or "paged_adamw_8bit", whose moments take 2 bytes a parameter instead of 8; "adam", fused; "adadelta".

    On CUDA the latter's moments move to the machine's memory when the GPU's runs out; on the CPU there is nothing to move, the numbers are the
    same. Moments of tensors with fewer than 4,096 elements stay in float32. In the last two weight decay is a part of the gradient. Adadelta (Zeiler
    2012) finds the size of its steps itself: rates are near 1. Raises ConfigError, DependencyError.
    """
    if kind not in OPTIMIZERS:
        raise ConfigError(f"train.optimizer = {kind!r} is unknown{nearest(str(kind), OPTIMIZERS)}")
    if kind in _OWN:
        return _OWN[kind](groups)
    optimizers = _bitsandbytes('set train.optimizer = "adamw"').optim
    on_cuda = any(parameter.is_cuda for group in groups for parameter in group["params"])
    made: torch.optim.Optimizer = (optimizers.PagedAdamW8bit if on_cuda else optimizers.AdamW8bit)(groups)
    return made


# --- the two libraries ------------------------------------------------------------------------------------------------------------


def _peft() -> Any:
    _hush()
    try:
        import peft
    except ImportError as error:
        raise _missing("peft", "leave model.adapter out of the recipe", error) from None
    return peft


def _bitsandbytes(instead: str) -> Any:
    _hush()
    try:
        import bitsandbytes
    except ImportError as error:
        raise _missing("bitsandbytes", instead, error) from None
    return bitsandbytes


def _missing(package: str, instead: str, error: ImportError) -> DependencyError:
    return DependencyError(f"{package} cannot be imported ({_one_line(error)}): pip install {package}, or {instead}")


def _hush() -> None:
    """Silence a warning about a kernel that only rewritten weights would use."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _is_four_bits(module: Any) -> bool:
    return isinstance(module, nn.Linear) and type(module.weight).__name__ == "Params4bit"


def _is_rewritten(layer: Any) -> bool:
    return bool(getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4 and type(tensor).__name__ != "Params4bit"


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _config_of(model: Any) -> Any:
    return model.peft_config[_NAME]


def _adapts(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a linear map."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")


def _is_saved_whole(module: nn.Module) -> bool:
    """Whether this is peft's wrapper of a module that is trained in full."""
    return hasattr(module, "original_module") and hasattr(module, "modules_to_save")


# --- checks of values -------------------------------------------------------------------------------------------------------------


def _require(holds: bool, key: str, value: Any, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"model.adapter.{key} = {json.dumps(value, default=str)}: give {wanted}")


def _check_pattern(key: str, pattern: Any, least: int) -> None:
    _require(isinstance(pattern, dict), key, pattern, 'a table such as { "q_proj" = 8 }')
    for end, value in pattern.items():
        good = _whole(value) if key == "rank_pattern" else _number(value)
        _require(good and value >= least and value > 0, f"{key}.{end}", value, "a number above 0" if key == "alpha_pattern" else "a whole number from 1")
        try:
            re.compile(end)
        except re.error as error:
            raise ConfigError(f"model.adapter.{key}: {end!r} is no regular expression: {error}") from None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) and word for word in value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN]


# --- four bits as they are stored -------------------------------------------------------------------------------------------------


def stored_four_bits(weight: Tensor, beside: Mapping[str, Tensor], bias: Tensor | None, *, dtype: torch.dtype) -> nn.Module:
    """The linear map that transformers saved in four bits, guarded; nothing is copied. dtype: of its products.

    weight: its bytes (N, 1). beside: what bitsandbytes stored with it, such as "absmax".
    """
    bitsandbytes = _bitsandbytes("take the model's folder in full precision")
    values = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(beside), device=weight.device)
    rows, columns = values.quant_state.shape
    layer: Any = bitsandbytes.nn.Linear4bit(columns, rows, bias=bias is not None, compute_dtype=dtype, quant_type=values.quant_type, device="meta")
    layer.weight = values
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return guard(layer)
