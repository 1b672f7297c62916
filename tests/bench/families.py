"""What the task families reach, beside a plain `transformers` Trainer. `make bench-families`, or `python -m tests.bench.families [--only PART] [--quick]`.

causal_lm: a GPT-2-shaped model from scratch on the Python files of this installation that use numpy, pandas or torch; files of other packages are
held out. Peer: the library's Trainer on the same weights and tokens, documents on end in blocks of the same length, as run_clm.py and CodeParrot
pack them. Both train the same number of tokens in every turn; perplexity on the held-out files is of both models by the same code. Beside them: random
weights, and how often each token stands in the training files.
essay_regression, extractive_qa: see tests.bench.family_essays and tests.bench.family_reading. They need the folder that KIT_DATA names (default
../shared/data), take 70 to 100 minutes each, and keep every model's predictions, so that an interrupted run goes on.

CPU time of one thread (on CUDA: wall time), ways in turns, the first turn only warms up, ratios are medians over the turns. Writes
artifacts/bench/families.json, where parts that are not run keep what they had. --quick tries in a minute that everything runs, with small models,
and writes to artifacts/bench/quick. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator

from kit import manifest, runtime
from kit.config import TrainPart
from kit.data.tables import read_table
from kit.data.texts import write_corpus
from kit.metrics import bootstrap
from kit.models.causal import Causal
from kit.models.generate import Decoding, Writer
from kit.models.tokens import HFTokens
from kit.predict import predict
from kit.tasks.causal_lm import CausalLM, Document
from kit.training.loop import fit
from tests.bench import family_essays, family_reading
from tests.bench.turns import clock, emptied, in_turns, peak_flops, ratio

BENCH = Path("artifacts/bench")
WORDS = ("numpy", "pandas", "torch")


@dataclass(frozen=True)
class Setting:
    """folder: for corpora, models and results. essays, reading: of these sections; the rest is of causal_lm.

    packages, held: folders and files below site-packages to train on, and to evaluate on. documents: at most so many are trained on; held_documents: evaluated.
    """

    folder: Path
    essays: family_essays.Setting
    reading: family_reading.Setting
    turns: int
    gpt2: dict[str, Any]
    packages: tuple[str, ...]
    held: tuple[str, ...]
    documents: int
    held_documents: int
    vocab_size: int = 8000
    max_length: int = 256
    batch_size: int = 16


_GPT2 = {"model_type": "gpt2", "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FULL = Setting(
    folder=BENCH, essays=family_essays.FULL, reading=family_reading.FULL,
    turns=5, gpt2=_GPT2 | {"n_embd": 256, "n_layer": 4, "n_head": 4}, packages=("sklearn", "scipy/optimize", "scipy/stats"),
    held=("scipy/signal", "scipy/interpolate"), documents=24, held_documents=12,
)  # fmt: skip
QUICK = Setting(
    folder=BENCH / "quick", essays=family_essays.QUICK, reading=family_reading.QUICK,
    turns=1, gpt2=_GPT2 | {"n_embd": 32, "n_layer": 1, "n_head": 2}, packages=("sklearn/tree",),
    held=("sklearn/isotonic.py",), documents=2, held_documents=1, vocab_size=1000, max_length=128, batch_size=4,
)  # fmt: skip


# --- causal_lm -----------------------------------------------------------------------------------------------------------------------------


class Code(NamedTuple):
    """A corpus of code, and a decoder of random weights with a tokenizer trained on it."""

    train: list[Document]
    held: list[Document]
    backbone: Path
    kept: dict[str, Any]


def causal_lm(setting: Setting) -> dict[str, Any]:
    """Tokens a second, model FLOP utilisation and held-out perplexity of one epoch, beside the Trainer's."""
    chosen, code = runtime.choose(), prepared(setting)
    tokens = Causal.tokens(code.backbone)
    ways = {"own": lambda: own_epoch(setting, code, tokens, chosen), "trainer": lambda: trainer_epoch(setting, code, tokens, chosen)}
    peaks = [peak_flops(chosen)]
    seconds, given = in_turns(ways, setting.turns)
    peaks.append(peak_flops(chosen))
    task = CausalLM(max_length=setting.max_length, packing=True)
    start = AutoModelForCausalLM.from_pretrained(code.backbone, dtype=torch.float32)
    guess, unigram = _perplexity(start, setting, code, tokens, chosen), _unigram(setting, code, tokens)
    flops = model_flops(start, setting.max_length)
    learnt = sum(feature.tokens for feature in task.encode(task.augment(code.train, np.random.default_rng(0)), tokens))
    speed = {name: learnt / statistics.median(took) for name, took in seconds.items()}
    folder = setting.folder / "code" / "own"
    written = Writer.load(folder).complete("import numpy", Decoding(tokens=12))[0].text
    return {
        "causal_lm": {
            "perplexity": {name: _perplexity(given[name], setting, code, tokens, chosen) for name in ways} | {"random_weights": guess, "unigram": unigram},
            "tokens_s": speed,
            "mfu": {name: flops * rate / max(peaks) for name, rate in speed.items()},
            "speed_ratio": ratio(seconds, "trainer", "own"),
            "completion": {"prompt": "import numpy", "text": written},
            "kept": code.kept,
        },
        "details": {
            "seconds": seconds, "peaks": peaks, "flops_per_token": flops, "tokens": learnt, "device": str(chosen.device), "dtype": str(chosen.dtype)
        },
    }  # fmt: skip


def prepared(setting: Setting) -> Code:
    """Corpora of two groups of packages, and a backbone; made anew, as installations differ."""
    site, folder = Path(sysconfig.get_path("purelib")), setting.folder / "code"
    parts = {}
    for name, packages in (("train", setting.packages), ("held", setting.held)):
        parts[name] = write_corpus([site / package for package in packages], folder / f"{name}.jsonl", words=WORDS).summary()
    task = CausalLM()
    train, held = (task.read(read_table(folder / f"{name}.jsonl")) for name in ("train", "held"))
    rng = np.random.default_rng(0)
    train = [train[row] for row in rng.permutation(len(train))[: setting.documents]]
    held = [held[row] for row in rng.permutation(len(held))[: setting.held_documents]]
    Causal.invent(folder / "backbone", lambda: [one.text for one in train], seed=0, config=setting.gpt2, vocab_size=setting.vocab_size)
    return Code(train, held, folder / "backbone", parts)


_TRAIN = {"lr": 1e-3, "weight_decay": 0.1, "warmup": 0.02, "clip": 1.0}


def own_epoch(setting: Setting, code: Code, tokens: HFTokens, chosen: runtime.Runtime) -> tuple[float, Any]:
    """Seconds from documents to a trained model on disk, and the model."""
    task = CausalLM(max_length=setting.max_length, packing=True)
    settings = TrainPart(epochs=1, batch_size=setting.batch_size, schedule="cosine", keep="last", **_TRAIN)
    folder = emptied(setting.folder / "code" / "own")
    begun = clock(chosen.device)
    model = Causal.create(code.backbone, outputs=1)
    fit(model, task, tokens, code.train, [], settings=settings, runtime=chosen, accelerator=Accelerator(cpu=chosen.device.type == "cpu"), folder=folder, seed=0)
    took = clock(chosen.device) - begun
    tokens.save(folder)
    return took, model.backbone


def trainer_epoch(setting: Setting, code: Code, tokens: HFTokens, chosen: runtime.Runtime) -> tuple[float, Any]:
    """The same by the library: documents tokenised, joined with the token that ends a text and cut into blocks, as its example run_clm.py has it."""
    folder = setting.folder / "code" / "trainer"
    begun = clock(chosen.device)
    rng = np.random.default_rng(0)
    texts = [code.train[row].text for row in rng.permutation(len(code.train))]
    ids = [id_ for text in texts for id_ in (tokens.bos_id, *tokens._tokenizer.encode(text, add_special_tokens=False).ids, tokens.eos_id)]
    size = setting.max_length
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    model = AutoModelForCausalLM.from_pretrained(code.backbone, dtype=torch.float32)
    given = TrainingArguments(
        str(folder), num_train_epochs=1, per_device_train_batch_size=setting.batch_size, learning_rate=_TRAIN["lr"], weight_decay=_TRAIN["weight_decay"],
        lr_scheduler_type="cosine", warmup_steps=_TRAIN["warmup"], max_grad_norm=_TRAIN["clip"], report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=chosen.device.type == "cpu", bf16=chosen.dtype == torch.bfloat16, fp16=chosen.dtype == torch.float16, seed=0,
    )  # fmt: skip
    rows: Any = [{"input_ids": block, "labels": block} for block in blocks]
    Trainer(model, given, train_dataset=rows, data_collator=default_data_collator).train()
    model.save_pretrained(folder)
    return clock(chosen.device) - begun, model


def _perplexity(backbone: Any, setting: Setting, code: Code, tokens: HFTokens, chosen: runtime.Runtime) -> dict[str, float]:
    """Of the held-out files, by any decoder of the library's, with its 95 % interval over files."""
    folder = setting.folder / "code" / "judged"
    backbone.save_pretrained(folder)
    model, task = Causal.load(folder, outputs=1), CausalLM(max_length=setting.max_length, packing=True)
    features = task.encode(code.held, tokens)
    return _with_interval(task, task.decode(predict(model, task, features, tokens, runtime=chosen, batch_tokens=4096), features, code.held), code)


def _unigram(setting: Setting, code: Code, tokens: HFTokens) -> dict[str, float]:
    """Of the same tokens, by how often each stands in the training files, one more for all: what knowing no order is worth."""
    task = CausalLM(max_length=setting.max_length, packing=True)
    learnt, asked = ([feature.encodings[0]["input_ids"][1:] for feature in task.encode(part, tokens)] for part in (code.train, code.held))
    counts = np.bincount(np.concatenate(learnt), minlength=len(tokens)) + 1
    log_p = np.log(counts / counts.sum())
    return _with_interval(task, task.decode([log_p[ids].sum(keepdims=True) for ids in asked], task.encode(code.held, tokens), code.held), code)


def _with_interval(task: CausalLM, prediction: np.ndarray, code: Code) -> dict[str, float]:
    found = bootstrap(task.metrics["negative_perplexity"], prediction, task.targets(code.held))
    return {"value": -found.value, "ci95": [-found.high, -found.low]}  # type: ignore[dict-item]


def model_flops(model: Any, length: int) -> float:
    """Operations a token of training takes: six for each weight that a product uses, and attention over half the text in the mean (Kaplan et al. 2020)."""
    config = model.config
    products = sum(parameter.numel() for name, parameter in model.named_parameters() if parameter.ndim == 2 and "wpe" not in name)  # tied words: the head's
    return 6 * products + 12 * config.num_hidden_layers * config.hidden_size * length / 2


PARTS: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "essay_regression": lambda setting: _named("essay_regression", family_essays.essay_regression(setting.essays, setting.folder / "essays")),
    "extractive_qa": lambda setting: _named("extractive_qa", family_reading.extractive_qa(setting.reading, setting.folder / "reading")),
    "causal_lm": lambda setting: iter([causal_lm(setting)]),
}
"""Each gives its section of the results, and the details beside it, once or after every model."""


def _named(name: str, sections: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return ({name: section} for section in sections)


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
    results = setting.folder / "families.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    for name in [given.only] if given.only else PARTS:
        began = time.perf_counter()
        for own in PARTS[name](setting):
            details = {**found.get("details", {}), name: own.pop("details", {})}
            found = {**found, **own, "details": details}
            manifest.write_atomically(results, json.dumps(found, indent=1))
        print(f"{name}: {time.perf_counter() - began:.0f} s\n{json.dumps(found[name], indent=1)}", flush=True)


if __name__ == "__main__":
    main()
