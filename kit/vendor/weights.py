"""A model folder → bundle of kind "weights" with what inference needs and nothing else: safetensors, a fast tokenizer, no code, no pickle.

Goes by a list of what is allowed. Serves transformers models, PEFT adapters and sentence-transformers. Does not load or run the model.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from kit import manifest
from kit.errors import BundleError, ConfigError
from kit.vendor import tensors, tokenizer
from kit.vendor.tokenizer import read_json

KIND = "weights"
SHARD_MB = 4000
_CONFIG, _ADAPTER, _MODULES = "config.json", "adapter_config.json", "modules.json"
_COPIED: tuple[str, ...] = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json")
_COPIED += ("config_sentence_transformers.json", "sentence_bert_config.json", tokenizer.CONFIG)
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "license*", "licence*", "notice*", "USE_POLICY*")
_TITLES = {
    "Apache License": "apache-2.0",
    "MIT License": "mit",
    "GNU AFFERO GENERAL PUBLIC LICENSE": "agpl-3.0",
    "GNU GENERAL PUBLIC LICENSE": "gpl-3.0",
    "LLAMA 2 COMMUNITY LICENSE": "llama2",
    "LLAMA 3": "llama3",
}  # words at the top of a licence's text → its name
_SLUG = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")
_ABSOLUTE = re.compile(r"(?:~?(?:/[\w.~+-]+){2,}/?|[A-Za-z]:[\\/].+)")
_PRIVATE = {"_name_or_path", "name_or_path", "_commit_hash", "auto_map", "auto_mapping", "custom_pipelines", "trust_remote_code"}


class _Part(NamedTuple):
    """What was made of one folder. tokenizer: how its tokenizer came about; empty where it has none."""

    converted: list[str]
    tokenizer: str


def vendor_weights(
    source: Path, out: Path, *, name: str | None = None, licence: str | None = None, shard_mb: int = SHARD_MB,
    base: str | None = None, texts: Sequence[str] = tokenizer.DIFFICULT,
) -> Path:  # fmt: skip
    """Make the bundle `out`/`name` of a model folder; the same folder gives the same bytes.

    name: by default the folder's. licence: by default what README.md, config.json or the licence's text say. shard_mb: largest weights file.
    base: for an adapter, the bundle of the model it belongs to. texts: on which a tokenizer that has to be converted is proven.
    Raises BundleError naming the file that is missing, damaged or needs code, ConfigError naming the option to give.
    """
    source = Path(source).resolve()
    if not source.is_dir():
        raise BundleError(f"model folder {source} is missing: give the folder with {_CONFIG} and the weights")
    name = _checked_name(name, source)
    is_adapter = (source / _ADAPTER).is_file()
    _check_base(base, source, is_adapter)
    licence, found_in = (licence, "--licence") if licence else _licence(source)
    with _assembled(Path(out) / name) as part:
        made = _adapter(source, part, str(base), shard_mb, texts) if is_adapter else _model(source, part, shard_mb, texts)
        for path in sorted({path for pattern in _TEXTS for path in source.glob(pattern) if path.is_file()}):
            shutil.copyfile(path, part / path.name)
        meta = {"licence": licence, "licence_from": found_in, "source": source.name, "tokenizer": made.tokenizer, "converted": made.converted}
        manifest.write(part, name, KIND, **meta, **_described(part, base))
    return Path(out) / name


def _checked_name(name: str | None, source: Path) -> str:
    name = name or re.sub(r"[^a-z0-9]+", "-", source.name.lower()).strip("-")
    if not _SLUG.fullmatch(name):
        raise ConfigError(f"--name {name!r} is no name of a bundle: use small letters, digits and single hyphens")
    return name


def _check_base(base: str | None, source: Path, is_adapter: bool) -> None:
    if is_adapter and not base:
        raise ConfigError(f"{source / _ADAPTER}: an adapter needs its model beside it: vendor that too, and give its bundle's name as --base")
    if base and not is_adapter:
        raise ConfigError(f"--base {base} is for adapters, but {source} has no {_ADAPTER}: leave it out")
    if base and not _SLUG.fullmatch(base):
        raise ConfigError(f"--base {base!r} is no name of a bundle: give the name that the model's own bundle has")


@contextmanager
def _assembled(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block is done, and leaves nothing when it fails."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _described(part: Path, base: str | None) -> dict[str, Any]:
    """What the manifest says of the model: its kind, classes, size and type; of an adapter also its base."""
    folders = [part, *sorted(path for path in part.rglob("*") if path.is_dir())]
    config = next((read_json(folder / file) for folder in folders for file in (_ADAPTER, _CONFIG) if (folder / file).is_file()), {})
    sizes = [size for folder in folders if (size := tensors.summary(folder)).parameters]
    model_type = config.get("model_type") or config.get("peft_type", "")
    values = {"model_type": model_type, "architectures": config.get("architectures") or [], "dtype": max(sizes).dtype}
    return {**values, "parameters": sum(size.parameters for size in sizes), **({"base": base} if base else {})}


# --- the three kinds of folders ---------------------------------------------------------------------------------------------------


def _model(source: Path, part: Path, shard_mb: int, texts: Sequence[str]) -> _Part:
    """A transformers model, or a sentence-transformers folder with one in it."""
    modules = _modules(source) if (source / _MODULES).is_file() else []
    if modules:
        shutil.copyfile(source / _MODULES, part / _MODULES)
    main = modules[0] if modules else ""
    made = _transformer(source / main, part / main, shard_mb, texts)
    converted = list(made.converted)
    for module in sorted({"", *modules} - {main}):
        converted += _module(source / module, part / module, shard_mb)
    return _Part(converted, made.tokenizer)


def _transformer(source: Path, part: Path, shard_mb: int, texts: Sequence[str]) -> _Part:
    if not (source / _CONFIG).is_file():
        raise BundleError(f"{source}: no {_CONFIG}: give the folder that save_pretrained wrote")
    weights = tensors.find(source)
    if weights is None:
        raise BundleError(f"{source}: no weights (model.safetensors, pytorch_model.bin or their shards): give the folder that save_pretrained wrote")
    config = read_json(source / _CONFIG)
    tied = _ties(config, source)
    part.mkdir(parents=True, exist_ok=True)
    converted = [*_settings(source, part, _CONFIG), *_copied(source, part)]
    converted += tensors.vendor(weights, part, shard_mb=shard_mb, tied=tied)
    made, how = _tokenizer(source, part, config.get("model_type"), texts)
    return _Part([*converted, *made], how)


def _module(source: Path, part: Path, shard_mb: int) -> list[str]:
    """A further folder of sentence-transformers: Pooling, Dense, Normalize … Nothing where it has no files."""
    if not source.is_dir():
        return []
    part.mkdir(parents=True, exist_ok=True)
    names = [_CONFIG] if (source / _CONFIG).is_file() else []
    converted = [line for name in names for line in _settings(source, part, name)] + _copied(source, part)
    weights = tensors.find(source)
    return [*converted, *(tensors.vendor(weights, part, shard_mb=shard_mb) if weights else [])]


def _modules(source: Path) -> list[str]:
    """The folders that modules.json names, in order. Raises BundleError for a module that is code of its own."""
    try:
        found = [(str(entry["path"]), str(entry["type"])) for entry in json.loads((source / _MODULES).read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{source / _MODULES}: no list of modules ({error}): copy it again from where the model came") from None
    for path, kind in found:
        if not kind.startswith("sentence_transformers."):
            raise BundleError(f"{source / _MODULES}: the module {kind} is code of its own, which is not vendored: use a model of sentence_transformers' own modules")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise BundleError(f"{source / _MODULES}: the path {path!r} leads out of the folder")
    return [path for path, _ in found]


def _adapter(source: Path, part: Path, base: str, shard_mb: int, texts: Sequence[str]) -> _Part:
    weights = tensors.find(source, tensors.ADAPTER)
    if weights is None:
        raise BundleError(f"{source}: no adapter_model.safetensors or adapter_model.bin: give the folder that PEFT's save_pretrained wrote")
    config = {**read_json(source / _ADAPTER), "base_model_name_or_path": base}
    converted = _settings(source, part, _ADAPTER, {**config, **({"revision": None} if "revision" in config else {})})
    converted += _copied(source, part) + tensors.vendor(weights, part, name=tensors.ADAPTER, shard_mb=shard_mb)
    made, how = _tokenizer(source, part, None, texts) if (source / tokenizer.FILE).is_file() else ([], "")
    return _Part([*converted, *made], how)


# --- configs ----------------------------------------------------------------------------------------------------------------------


def _ties(config: dict[str, Any], source: Path) -> bool:
    """Whether transformers ties the embeddings of this model. Raises BundleError where it could not load it without code from the folder."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    path, model_type = source / _CONFIG, config.get("model_type")
    code = config.get("auto_map") or {}
    if code and (model_type not in CONFIG_MAPPING_NAMES or not set(config.get("architectures") or ()) <= set(transformers.__all__)):
        wanted = ", ".join(sorted(str(value) for value in code.values())) if isinstance(code, dict) else str(code)
        raise BundleError(f"{path}: auto_map needs code of the model's own ({wanted}), which is not vendored: use a model that transformers itself knows")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise BundleError(f"{path}: model_type {model_type!r} is none that transformers {transformers.__version__} knows: upgrade it, or use another model")
    return bool(getattr(transformers.AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False), "tie_word_embeddings", False))


def _copied(source: Path, part: Path) -> list[str]:
    """Copy the small files that inference reads, JSON without what names a machine."""
    converted = []
    for name in _COPIED:
        if (source / name).is_file():
            if name.endswith(".json"):
                converted += _settings(source, part, name)
            else:
                shutil.copyfile(source / name, part / name)
    return converted


def _settings(source: Path, part: Path, name: str, values: dict[str, Any] | None = None) -> list[str]:
    """Write a JSON file without paths of a machine and without references to code; equal to the byte where there was nothing to change."""
    given = read_json(source / name)
    kept = _scrubbed(values or given)
    if kept == given:
        shutil.copyfile(source / name, part / name)
        return []
    _write_json(part / name, kept)
    changed = sorted(key for key in given if key not in kept or kept[key] != given[key])
    return [f"{name} without or with other {', '.join(changed)}"]


def _scrubbed(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _scrubbed(inner) for key, inner in value.items() if key not in _PRIVATE and not (isinstance(inner, str) and _ABSOLUTE.fullmatch(inner))}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --- tokenizer and licence --------------------------------------------------------------------------------------------------------


def _tokenizer(source: Path, part: Path, model_type: str | None, texts: Sequence[str]) -> tuple[list[str], str]:
    """Copy or make tokenizer.json, so that AutoTokenizer loads it as it is. Returns what was changed, and how it came about."""
    _refuse_code(tokenizer.read_settings(source), source / tokenizer.CONFIG)
    if (source / tokenizer.FILE).is_file():
        shutil.copyfile(source / tokenizer.FILE, part / tokenizer.FILE)
        settings, how = tokenizer.pins(part), "copied"
        done = [f"{tokenizer.CONFIG} with tokenizer_class {tokenizer.AS_IT_IS}"] if settings else []
    else:
        made = tokenizer.convert(source, model_type=model_type, texts=texts)
        made.tokenizer.save(str(part / tokenizer.FILE))
        settings, how = made.settings, f"made from {made.source}"
        done = [f"{made.source} to {tokenizer.FILE}, equal to {made.peer}"]
    if settings:
        _write_json(part / tokenizer.CONFIG, _scrubbed(settings))
    tokenizer.check_loading(part, texts)
    return done, how


def _refuse_code(settings: dict[str, Any], path: Path) -> None:
    """Raises BundleError where the tokenizer is a class that only code in the folder has."""
    import transformers

    name = str(settings.get("tokenizer_class"))
    if "auto_map" in settings and not {name, name.removesuffix("Fast")} & set(transformers.__all__):
        advice = f"where {tokenizer.FILE} is all there is to it, set tokenizer_class to {tokenizer.AS_IT_IS}"
        raise BundleError(f"{path}: auto_map needs code of the tokenizer's own ({name}), which is not vendored: {advice}")


def _licence(source: Path) -> tuple[str, str]:
    """The licence that the folder names, and where. Raises ConfigError where it names none."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    with suppress(OSError, ValueError, YAMLError):  # no card, or one without readable front matter
        card = metadata_load(source / "README.md") or {}
        if named := _named(card.get("license_name") or card.get("license")):
            return named, "README.md"
    with suppress(OSError, ValueError):
        if named := _named(json.loads((source / _CONFIG).read_text(encoding="utf-8")).get("license")):
            return named, _CONFIG
    for path in sorted(path for pattern in _TEXTS for path in source.glob(pattern) if path.is_file()):
        top = path.read_text(encoding="utf-8", errors="replace")[:500].lower()
        if title := next((title for title in _TITLES if title.lower() in top), None):
            return _TITLES[title], path.name
    raise ConfigError(f"{source}: its licence stands neither in README.md nor in {_CONFIG} nor in a LICENSE file: look it up, and give it as --licence")


def _named(value: object) -> str:
    """A licence or several as text; empty where it says that it is not known."""
    text = ", ".join(str(part) for part in value) if isinstance(value, list) else str(value or "")
    return "" if text.lower() in ("unknown", "none") else text
