"""How well the kit answers real questions, beside a plain `transformers` Trainer and two rules. `make bench-quality`.

Trains on public exam-like questions and tests on the 150 official ones, contexts retrieved from a Wikipedia subset; the Trainer gets the
same data, contexts, backbone, epochs, batch size and token limit. Needs the data folder that KIT_DATA names (default ../shared/data).
Writes artifacts/bench/quality.json with kit, trainer, longest, overlap and the kit's members, each with map@3 and ci95.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from kit import assemble, runtime
from kit.config import Recipe
from kit.data.audit import overlaps
from kit.data.tables import read_table
from kit.inference.pipeline import infer
from kit.manifest import write_atomically
from kit.metrics import bootstrap, map_at_k
from kit.rehearsal.baselines import longest, overlap, random_map
from kit.retrieval.bm25 import BM25
from kit.tasks.multiple_choice import MultipleChoice, Question
from kit.training.crossval import train
from kit.vendor.bundle import pack

DATA = Path(os.environ.get("KIT_DATA", "../shared/data"))
ROOT = Path("artifacts/bench/llm-science")
RECIPES = ("llm_science_minilm", "llm_science_rules")
TRAIN = ("extra500_with_context", "stem1k_with_context")
RESULTS = ROOT.parent / "quality.json"
CORPUS = "corpus/wikipedia_stem_2015.parquet"


def main(overrides: list[str]) -> None:
    """Run everything and print one table. `overrides` are recipe settings, e.g. train.epochs=1; --keep-trainer: do not train the peer again."""
    if not (DATA / CORPUS).is_file():
        sys.exit(f"{DATA / CORPUS} is missing: set KIT_DATA to the folder with mcq/ and corpus/")
    runtime.go_offline()
    questions, targets = write_competition(ROOT)
    recipes = [Recipe.load(name, [f'data.folder="{ROOT}"', f'retrieve.corpus="{(DATA / CORPUS).resolve()}"']) for name in RECIPES]
    recipes[0] = recipes[0].with_overrides(overrides)
    runs = [train(recipe, artifacts=ROOT) for recipe in recipes]
    bundles = pack([run.folder for run in runs], artifacts=ROOT)
    outcome = infer(bundles, test=ROOT / "test.csv", out=ROOT / "submission.csv", root=bundles[0].parent)
    library = assemble.Library.open(assemble.build_index(recipes[0], ROOT))
    assert isinstance(library.retriever, BM25)
    best = library.retriever.search([question.prompt for question in questions], 1).ids[:, 0]
    predictions = {
        "kit": _ranks(ROOT / "submission.csv"),
        **outcome.predictions,
        "longest": longest(questions),
        "overlap": overlap(questions, [library.corpus[int(hit)].text if hit >= 0 else "" for hit in best]),
    }
    earlier = json.loads(RESULTS.read_text()) if RESULTS.is_file() and "--keep-trainer" in sys.argv else {}
    if "trainer" not in earlier:
        predictions["trainer"] = _trainer(recipes[0], questions, library)
    results = {name: _entry(prediction, targets) for name, prediction in predictions.items()}
    results |= {name: earlier[name] for name in ("trainer",) if name in earlier}
    results["random"] = {"map@3": random_map(5)}
    results["oof"] = {name: run.metrics["oof"]["map@3"] for name, run in zip(RECIPES, runs, strict=True)} | {"blend": outcome.oof["blend"]}
    results["weights"] = outcome.weights
    write_atomically(RESULTS, json.dumps(results, indent=1))
    print(f"{'150 official questions':<40} MAP@3   95 % interval")
    for name, result in results.items():
        if "ci95" in result:
            print(f"{name:<40} {result['map@3']:.3f}   {result['ci95'][0]:.3f} to {result['ci95'][1]:.3f}")
    print(json.dumps({name: results[name] for name in ("oof", "weights")}))


def write_competition(folder: Path) -> tuple[list[Question], np.ndarray]:
    """A competition folder in the exam's layout: train.csv from the public sets, test.csv without answers. Gives the test questions and answers."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["id", "prompt", *"ABCDE", "answer"]
    parts = []
    for name in TRAIN:
        frame = read_table(DATA / "mcq" / f"{name}.csv").frame
        parts.append(frame.assign(id=[f"{name}-{id_}" for id_ in frame["id"]])[columns])
    pd.concat(parts).to_csv(folder / "train.csv", index=False)
    official = read_table(DATA / "mcq" / "official_train_150.csv")
    official.frame[columns[:-1]].to_csv(folder / "test.csv", index=False)
    task = MultipleChoice()
    questions = task.read(official)
    seen = task.read(read_table(folder / "train.csv"))
    leaks = overlaps(task.queries(questions, "prompt_options"), task.queries(seen, "prompt_options"))
    assert not leaks, f"{len(leaks)} official questions are in the training data"
    return questions, task.targets(questions)


def _ranks(submission: Path) -> np.ndarray:
    """The submission's letters as scores (N, 5)."""
    rows = [text.split() for text in read_table(submission).frame["prediction"]]
    return np.array([[1 / (1 + row.index(letter)) if letter in row else 0 for letter in "ABCDE"] for row in rows], np.float32)


def _entry(prediction: np.ndarray, targets: np.ndarray) -> dict[str, object]:
    estimate = bootstrap(map_at_k, prediction, targets, draws=2000)
    return {"map@3": estimate.value, "ci95": [estimate.low, estimate.high]}


def _trainer(recipe: Recipe, questions: list[Question], library: assemble.Library) -> np.ndarray:
    """The peer: AutoModelForMultipleChoice on the same backbone, trained by transformers.Trainer as public notebooks do, on all training rows."""
    import torch
    from transformers import AutoModelForMultipleChoice, AutoTokenizer, Trainer, TrainingArguments
    from transformers.data.data_collator import DataCollatorForMultipleChoice

    task = assemble.make_task(recipe)
    source = assemble.backbone(recipe, Path(), Path(), [])
    tokenizer = AutoTokenizer.from_pretrained(source)
    trained = assemble.cached_contexts(task.read(read_table(ROOT / "train.csv")), task, recipe, ROOT)
    tested = assemble.add_contexts([replace(question, answer=None) for question in questions], task, recipe.retrieve, library)

    def encode(question: Question) -> dict[str, object]:
        pairs = [f"{question.prompt} {option}" for option in question.options]
        limit = recipe.task.options["max_length"]
        encoded = tokenizer([question.context] * len(pairs), pairs, truncation="only_first", max_length=limit)
        return {**encoded, "label": question.answer or 0}

    torch.manual_seed(0)
    settings = recipe.train
    arguments = TrainingArguments(
        output_dir=str(ROOT / "trainer"), learning_rate=settings.lr, num_train_epochs=settings.epochs, seed=0,
        per_device_train_batch_size=settings.batch_size, per_device_eval_batch_size=settings.batch_size,
        warmup_steps=0.1, weight_decay=settings.weight_decay, report_to=[], save_strategy="no", lr_scheduler_type="cosine", use_cpu=runtime.choose().device.type == "cpu",
    )  # fmt: skip
    trainer = Trainer(
        model=AutoModelForMultipleChoice.from_pretrained(source), args=arguments, train_dataset=[encode(q) for q in trained],
        data_collator=DataCollatorForMultipleChoice(tokenizer=tokenizer),
    )  # fmt: skip
    trainer.train()
    return trainer.predict([encode(q) for q in tested]).predictions


if __name__ == "__main__":
    main([argument for argument in sys.argv[1:] if not argument.startswith("-")])
