"""What language-model members cost, beside how notebooks score them. `make bench-lm`, or `python -m tests.bench.lm [--only PART] [--quick]`.

prefix: log-likelihood of five options behind one context, a Llama-shaped decoder of 120 M parameters with random weights. Peer: five forwards of the
library's model (SDPA), each over context and option with the logits of every place, as lm-evaluation-harness and public notebooks do. Ours: the
packed tree and the expanded cache of kit.models.prefix. nf4: the same decoder in four bits, the peer guarded as well (kit.models.adapters).
seq2seq: the same questions, a decoder and encoder shaped as Flan-T5-base; the peer runs both for every option.
letters: five cyclic orders of the options behind one prefix beside one order. exactness: small models of every family, token by token.
streaming: see tests.bench.streaming. memory: the peak of kit.predict over rows of 2,000 tokens and 32,000 words, in a process of its own.

CPU time of one thread (on CUDA: wall time), all ways in turns, ratios are medians over the turns; streaming: wall time.
Writes artifacts/bench/lm.json, where parts that are not run keep what they had, and lm.png. --quick tries in a minute that everything runs, with
small models, and writes to artifacts/bench/quick. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kit import manifest, runtime
from kit.models import adapters
from kit.models.causal import Causal
from kit.models.prefix import ATTENTION
from kit.models.seq2seq import Seq2Seq
from kit.models.tokens import train_byte_level
from kit.predict import predict
from kit.tasks.multiple_choice import Question
from kit.tasks.prompted import Prompted
from tests import decoders
from tests.bench import streaming
from tests.bench.figures import BENCH, Bars, Figure, barred, draw, table
from tests.bench.turns import clock, in_turns, ratio

WORDS = 32_000
OPTION, OPTIONS = (6, 27), 5  # tokens of an option: 16 in the mean
QUESTION = 30  # tokens of the question's own words, which stand behind the context
ROW_TOKENS, BATCH_TOKENS = 2000, 8192
ORDERS = 5


@dataclass(frozen=True)
class Setting:
    """folder: for models and results. contexts: tokens, shortest and longest. long_contexts: of `letters`. rows: of `memory`, few and many."""

    folder: Path
    llama: dict[str, Any]
    t5: dict[str, Any]
    streaming: streaming.Shape
    questions: int
    repeats: int
    contexts: tuple[int, int]
    long_contexts: tuple[int, ...]
    families: tuple[str, ...]
    rows: tuple[int, int]


_T5 = {
    "model_type": "t5", "vocab_size": WORDS, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
FULL = Setting(
    folder=BENCH,
    llama={
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
        "num_key_value_heads": 12, "max_position_embeddings": 4096,
    },
    t5=_T5 | {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12},
    streaming=streaming.Shape(), questions=4, repeats=5, contexts=(270, 630), long_contexts=(450, 1000, 2000), families=tuple(decoders.FAMILIES),
    rows=(40, 4000),
)  # fmt: skip
QUICK = Setting(
    folder=BENCH / "quick",
    llama=FULL.llama | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    t5=FULL.t5 | {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    streaming=streaming.SMALL, questions=1, repeats=1, contexts=(270, 630), long_contexts=(450,), families=("llama", "gpt2"), rows=(4, 40),
)  # fmt: skip
_EAGER = ("gemma2", "gpt_oss")  # capped scores, and sinks: SDPA has neither
ROWS_MODEL = {
    "model_type": "llama", "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


# --- questions of random tokens ------------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """Token ids."""

    context: Tensor
    options: list[Tensor]


def questions(count: int, contexts: tuple[int, int], seed: int = 0) -> list[Asked]:
    """In the lengths of real ones."""
    rng = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> Tensor:
        return torch.randint(3, WORDS, (int(torch.randint(low, high, (), generator=rng)),), generator=rng)

    return [Asked(text(*(QUESTION + size for size in contexts)), [text(*OPTION) for _ in range(OPTIONS)]) for _ in range(count)]


def token_ratio(some: Sequence[Asked]) -> float:
    """Tokens that the naive way computes, for one of ours."""
    naive = sum(OPTIONS * len(one.context) + sum(map(len, one.options)) for one in some)
    return naive / sum(len(one.context) + sum(map(len, one.options)) for one in some)


def batch_of(trunk: Tensor, branches: Sequence[Tensor], asked: Sequence[tuple[int, int]] | None = None) -> dict[str, Tensor]:
    """One tree. asked: (column, token) pairs; every token of every branch, if None."""
    ids = torch.cat([trunk, *branches])
    branch = torch.cat([torch.full((len(part),), number) for number, part in enumerate([trunk, *branches])])
    positions = torch.cat([torch.arange(len(trunk)), *(len(trunk) + torch.arange(len(part)) for part in branches)])
    if asked is None:
        starts = np.cumsum([len(trunk), *map(len, branches)])[:-1]
        asked = [
            (len(trunk) - 1 if j == 0 else int(start) + j - 1, int(token))
            for start, part in zip(starts, branches, strict=True) for j, token in enumerate(part)
        ]  # fmt: skip
    at, token = (torch.tensor(values) for values in zip(*asked, strict=True))
    return {"input_ids": ids[None], "branch": branch[None], "position_ids": positions[None], "at": at, "token": token}


def made(folder: Path, config: dict[str, Any], kind: Any = AutoModelForCausalLM) -> Path:
    """A folder with a model of random weights, made once."""
    if not (folder / "config.json").is_file():
        torch.manual_seed(0)
        settings = dict(config)
        kind.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).save_pretrained(folder)
    return folder


# --- ways of scoring: each gives the log-probabilities of all tokens of all options ------------------------------------------------------------


def each_alone(model: Any, device: torch.device, some: Sequence[Asked]) -> Tensor:
    """A forward per option."""
    found = []
    for one in some:
        for option in one.options:
            logits = model(input_ids=torch.cat([one.context, option])[None].to(device), use_cache=False).logits[0]
            log_p = logits[len(one.context) - 1 : -1].float().log_softmax(-1)
            found.append(log_p.gather(-1, option[:, None].to(device))[:, 0])
    return torch.cat(found).cpu()


def each_answer_alone(model: Any, device: torch.device, some: Sequence[Asked]) -> Tensor:
    """A forward of encoder and decoder per option."""
    found = []
    for one in some:
        text = torch.cat([one.context, torch.tensor([_T5["eos_token_id"]])])[None].to(device)
        for option in one.options:
            answer = torch.cat([torch.tensor([_T5["decoder_start_token_id"]]), option])[None, :-1].to(device)
            log_p = model(input_ids=text, decoder_input_ids=answer, use_cache=False).logits[0].float().log_softmax(-1)
            found.append(log_p.gather(-1, option[:, None].to(device))[:, 0])
    return torch.cat(found).cpu()


def in_trees(model: Any, device: torch.device, some: Sequence[Asked]) -> Tensor:
    """A tree per question."""
    batches = [batch_of(one.context, one.options) for one in some]
    return torch.cat([model({name: tensor.to(device) for name, tensor in batch.items()}) for batch in batches]).cpu()


# --- measuring -----------------------------------------------------------------------------------------------------------------------------


def timed(ways: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every way, `repeats` times in turns, and what each gives. The first turn only warms up."""

    def watched(way: Callable[[], Any]) -> tuple[float, Any]:
        begun = clock(device)
        with torch.inference_mode():
            given = way()
        return clock(device) - begun, given

    return in_turns({name: partial(watched, way) for name, way in ways.items()}, repeats)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


# --- the parts: each gives the figures, and beside them under "details" what they come from ----------------------------------------------------


def prefix(setting: Setting) -> dict[str, Any]:
    """Five options behind one context."""
    chosen, some = runtime.choose(), questions(setting.questions, setting.contexts)
    folder = made(setting.folder / "llama", setting.llama)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen.dtype).eval().to(chosen.device)
    models = {name: Causal.create(folder, outputs=1, sharing=name).eval().to(chosen.device, chosen.dtype) for name in ("tree", "cache")}
    ways = {"alone": lambda: each_alone(peer, chosen.device, some)}
    ways |= {name: lambda model=model: in_trees(model, chosen.device, some) for name, model in models.items()}  # type: ignore[misc]
    seconds, given = timed(ways, setting.repeats, chosen.device)
    return {
        "tree_ratio": ratio(seconds, "alone", "tree"),
        "cache_ratio": ratio(seconds, "alone", "cache"),
        "tree_over_cache": ratio(seconds, "cache", "tree"),
        "token_ratio": token_ratio(some),
        "large_max_abs_diff": {name: difference(given[name], given["alone"]) for name in models},
        "details": {"seconds": seconds, "device": str(chosen.device), "dtype": str(chosen.dtype)},
    }


def nf4(setting: Setting) -> dict[str, Any]:
    """The same in four bits, without what bitsandbytes does to weights in evaluation."""
    chosen, some = runtime.choose(), questions(max(1, setting.questions // 2), setting.contexts)
    folder = made(setting.folder / "llama", setting.llama)
    loading = adapters.quantised_loading("nf4", dtype=chosen.dtype, device=chosen.device)

    def loaded(attention: str) -> Any:
        return adapters.guard(AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, **loading).eval())

    peer, model = loaded("sdpa"), Causal.create(folder, outputs=1).eval()
    model.backbone = loaded(ATTENTION)
    ways = {"alone": lambda: each_alone(peer, chosen.device, some), "tree": lambda: in_trees(model, chosen.device, some)}
    seconds, given = timed(ways, setting.repeats, chosen.device)
    return {
        "nf4_tree_ratio": ratio(seconds, "alone", "tree"),
        "nf4_max_abs_diff": difference(given["tree"], given["alone"]),
        "details": {"seconds": seconds, "token_ratio": token_ratio(some)},
    }


def seq2seq(setting: Setting) -> dict[str, Any]:
    """Five options behind one context, which an encoder reads."""
    chosen, some = runtime.choose(), questions(max(1, setting.questions // 2), setting.contexts)
    folder = made(setting.folder / "t5", setting.t5, AutoModelForSeq2SeqLM)
    peer = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=chosen.dtype).eval().to(chosen.device)
    model = Seq2Seq.create(folder, outputs=1).eval().to(chosen.device, chosen.dtype)
    ways = {"alone": lambda: each_answer_alone(peer, chosen.device, some), "tree": lambda: in_trees(model, chosen.device, some)}
    seconds, given = timed(ways, setting.repeats, chosen.device)
    return {
        "seq2seq_ratio": ratio(seconds, "alone", "tree"),
        "seq2seq_max_abs_diff": difference(given["tree"], given["alone"]),
        "details": {"seconds": seconds},
    }


def letters(setting: Setting) -> dict[str, Any]:
    """Five cyclic orders of the options behind one context and question, beside one order; by the tokens of the context."""
    chosen = runtime.choose()
    model = Causal.create(made(setting.folder / "llama", setting.llama), outputs=1).eval().to(chosen.device, chosen.dtype)
    found: dict[str, Any] = {"tta_cost": {}, "details": {}}
    for length in setting.long_contexts:
        some = questions(1, (length, length + 1))
        ways = {str(orders): lambda orders=orders, some=some: in_orders(model, chosen.device, some, orders) for orders in (1, ORDERS)}
        seconds, _ = timed(ways, setting.repeats, chosen.device)  # type: ignore[arg-type]
        tokens = {orders: sum(len(one.context) + orders * len(_block(one, 0)) for one in some) for orders in (1, ORDERS)}
        found["tta_cost"][str(length)] = {"cost": ratio(seconds, str(ORDERS), "1"), "tokens": tokens[ORDERS] / tokens[1]}
        found["details"][str(length)] = seconds
    return found


def in_orders(model: Causal, device: torch.device, some: Sequence[Asked], orders: int) -> Tensor:
    """Log-probabilities of the letters, averaged over so many cyclic orders: one branch each, asked at its end."""
    found = []
    for one in some:
        blocks = [_block(one, turn) for turn in range(orders)]
        ends = np.cumsum([len(one.context), *map(len, blocks)])[1:]
        batch = batch_of(one.context, blocks, [(int(end) - 1, 10 + letter) for end in ends for letter in range(OPTIONS)])
        found.append(model({name: tensor.to(device) for name, tensor in batch.items()}).view(orders, OPTIONS).mean(0))
    return torch.stack(found).cpu()


def _block(one: Asked, turn: int) -> Tensor:
    """All options, and two tokens that ask for a letter."""
    return torch.cat([*one.options[turn:], *one.options[:turn], torch.tensor([5, 6])])


def exactness(setting: Setting) -> dict[str, Any]:
    """The largest difference of a token's log-probability from the library's model, text by text: one row and many, padded on either side.

    The peer attends by SDPA, as in `prefix`. Beside each, what the library's two kinds of attention differ by: rounding, which neither is free of.
    """
    found: dict[str, dict[str, float]] = {}
    rounding: dict[str, float] = {}
    for family in setting.families:
        folder, eager = setting.folder / "families" / family, decoders.stock(family)
        eager.save_pretrained(folder)
        peer = eager if family in _EAGER else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        trees = [decoders.trees(rows, OPTIONS, seed=rows, left=left) for rows, left in ((1, False), (6, False), (6, True))]
        expected, other = ([decoders.one_by_one(model, own.texts) for own in trees] for model in (peer, eager))
        rounding[family] = max(map(difference, expected, other))
        found[family] = {}
        for way in ("tree", "cache"):
            model = Causal.create(folder, outputs=1, sharing=way).eval()
            with torch.inference_mode():
                found[family][way] = max(difference(model(own.batch), scores) for own, scores in zip(trees, expected, strict=True))
    return {"max_abs_diff": found, "library_max_abs_diff": rounding}


def stream(setting: Setting) -> dict[str, Any]:
    """Layer streaming: the worse of two lengths of prompts. warm: accelerate's files are in the page cache, as they cannot be where streaming is needed."""
    found = streaming.bench(setting.streaming, setting.repeats, setting.folder)
    both = [found["short"], found["long"]]
    return {
        "streaming_over_bound": max(one["over_bound"] for one in both),
        "accelerate_bs1_ratio": min(one["bs1_ratio"] for one in both),
        "accelerate_bs1_warm_ratio": min(one["bs1_warm_ratio"] for one in both),
        "accelerate_best_ratio": min(one["best_ratio"] for one in both),
        "streaming_max_abs_diff": max(one["max_abs_diff"] for one in both),
        "streaming_peak_mb": found["peak_mb"]["streamed"],
        "accelerate_peak_mb": found["peak_mb"]["accelerate"],
        "streaming_allowed_mb": found["allowed_mb"],
        "details": found,
    }


def memory(setting: Setting) -> dict[str, Any]:
    """MB of a process that scores few rows, and of one that scores many."""
    found = []
    for rows in setting.rows:
        done = subprocess.run([sys.executable, "-m", "tests.bench.lm", "--rows", str(rows)], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    few, many = found
    return {
        "peak_mb": many["peak"],
        "peak_few_rows_mb": few["peak"],
        "batch_logits_mb": BATCH_TOKENS * WORDS * 4 / 1e6,
        "all_logits_mb": setting.rows[1] * ROW_TOKENS * WORDS * 4 / 1e6,
        "details": {str(rows): own for rows, own in zip(setting.rows, found, strict=True)},
    }


def score_rows(count: int) -> dict[str, float]:
    """So many questions with long contexts through the kit's own task and `predict`: MB before the model, before scoring and at the peak, and seconds."""
    folder = made(BENCH / "rows", ROWS_MODEL)
    rng = np.random.default_rng(0)
    words = [f"{stem}{end}" for stem in ("light", "cell", "rock", "moon", "salt", "wave") for end in ("", "s", "ing", "ed", "er", "less", "ful")]
    if not (folder / "tokenizer.json").is_file():
        train_byte_level([" ".join(words)] * 50, folder, vocab_size=600)
    tokens = Causal.tokens(folder)
    before = streaming.memory("VmRSS")
    some = [
        Question(str(row), "Which of these?", tuple(" ".join(rng.choice(words, 9)) for _ in range(OPTIONS)), None, " ".join(rng.choice(words, ROW_TOKENS)))
        for row in range(count)
    ]
    task = Prompted(form="likelihood", max_length=ROW_TOKENS)
    features = task.encode(some, tokens)
    assert min(len(feature.encodings[0]["input_ids"]) for feature in features) > ROW_TOKENS - 100
    model, encoded, began = Causal.create(folder, outputs=1), streaming.memory("VmRSS"), time.perf_counter()
    scores = predict(model, task, features, tokens, runtime=runtime.choose(), batch_tokens=BATCH_TOKENS)
    assert len(scores) == count and all(np.isfinite(own).all() for own in scores)
    return {"before": before, "encoded": encoded, "peak": streaming.memory("VmHWM"), "seconds": time.perf_counter() - began}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "prefix": prefix, "letters": letters, "exactness": exactness, "nf4": nf4, "seq2seq": seq2seq, "streaming": stream, "memory": memory,
}  # fmt: skip


# --- what came of it -------------------------------------------------------------------------------------------------------------------------


_BARS: Bars = {
    "tree_ratio": ("packed tree, times as fast as five forwards", 4.7, True),
    "cache_ratio": ("expanded cache, times as fast as five forwards", 4.0, True),
    "tree_over_cache": ("packed tree, times as fast as the cache", 1.15, True),
    "nf4_max_abs_diff": ("largest difference in four bits", 1e-4, False),
    "streaming_over_bound": ("streaming ÷ max(reading, computing)", 1.5, False),
    "accelerate_bs1_ratio": ("streaming, times as fast as accelerate by single prompts", 3.0, True),
    "accelerate_best_ratio": ("streaming, times as fast as accelerate at its best", 1.0, True),
    "streaming_max_abs_diff": ("largest difference when streamed", 1e-5, False),
}


def figures(found: dict[str, Any]) -> list[Figure]:
    """Of the parts that were run, what has a bar."""
    rows = barred(found, _BARS)
    rows += [Figure(f"largest difference, {family}", max(own.values()), 1e-5, False) for family, own in found.get("max_abs_diff", {}).items()]
    rows += [Figure(f"five orders ÷ one, contexts of {length} tokens", own["cost"], 1.6, False) for length, own in found.get("tta_cost", {}).items()]
    if "streaming_peak_mb" in found:
        rows.append(Figure("memory of streaming, MB", found["streaming_peak_mb"], found["streaming_allowed_mb"], False))
    if "peak_mb" in found:
        rows.append(Figure("memory of many long rows, MB", found["peak_mb"], found["peak_few_rows_mb"] + found["batch_logits_mb"], False))
    return rows


def main() -> None:
    """Run the parts, and keep the results of those that are not run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="small models, one turn")
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    runtime.go_offline()
    torch.set_num_threads(1)
    if given.rows:
        print(json.dumps(score_rows(given.rows)))
        return
    setting = QUICK if given.quick else FULL
    setting.folder.mkdir(parents=True, exist_ok=True)
    results = setting.folder / "lm.json"
    found = json.loads(results.read_text()) if results.is_file() else {}
    for name in [given.only] if given.only else PARTS:
        began = time.perf_counter()
        own = PARTS[name](setting)
        details = {**found.get("details", {}), name: own.pop("details", {})}
        found = {**found, **own, "details": details}
        manifest.write_atomically(results, json.dumps(found, indent=1))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
    draw(figures(found), setting.folder / "lm.png")
    plain = [key for key, value in found.items() if isinstance(value, float) and key not in (*_BARS, "streaming_peak_mb", "peak_mb")]
    print(table(figures(found), {key: found[key] for key in plain}))
    if given.quick:
        print("Bars are for a run without --quick.")


if __name__ == "__main__":
    main()
