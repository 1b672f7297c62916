"""Recurrent readers: layers against slow sums in float64, padding, folders, what training asks for, and that they learn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.errors import BundleError, ConfigError, DataError
from kit.models import recurrent
from kit.models.adapters import make_optimizer
from kit.models.recurrent import LSTM, Attention, AttentionFlow, BiDAF, Embed, Highway, Reader, Sizes, States, parts
from kit.models.words import WordTokens, make_vectors
from kit.tasks import Batch
from kit.tasks.extractive_qa import Answer, ExtractiveQA, Reading
from tests import tiny

KINDS: dict[str, type[Reader]] = {"lstm": LSTM, "bidaf": BiDAF}
LAYERS = {"lstm": 2, "bidaf": 3}
PAIRS = [("Entropy measures disorder.", "Which words?"), (tiny.TEXTS[0], "light"), ("", ""), ("The speed of light", None), (tiny.TEXTS[9], "café snow")]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    LSTM.invent(folder, lambda: tiny.TEXTS, seed=0, config={"dimension": 8}, vocab_size=100)
    return folder


def made(kind: str, folder: Path, *, seed: int = 0, hidden_size: int = 6, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return KINDS[kind].create(folder, outputs=2, hidden_size=hidden_size, **options)


def batch_of(folder: Path, pairs: list[tuple[str, str | None]] = PAIRS) -> Batch:
    tokens = WordTokens(folder)
    return tokens.pad([tokens.encode(text, pair, max_length=60)[0] for text, pair in pairs])


def output(model: Any, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return model.eval()(batch)


# --- layers, written out ---------------------------------------------------------------------------------------------------------


def ragged(width: int) -> tuple[list[np.ndarray], list[np.ndarray], list[Tensor]]:
    """Contexts and questions of different lengths, and (h, u, their masks) with rubbish where they are padded."""
    rng = np.random.default_rng(0)
    lengths = [(7, 3), (1, 1), (4, 5), (2, 1)]
    rows = [[rng.normal(size=(length, width)) for length in pair] for pair in lengths]
    padded = []
    for side in (0, 1):
        longest = max(pair[side] for pair in lengths)
        array, mask = np.full((len(rows), longest, width), 1e3), np.zeros((len(rows), longest), bool)
        for number, row in enumerate(rows):
            array[number, : len(row[side])], mask[number, : len(row[side])] = row[side], True
        padded.append((torch.from_numpy(array), torch.from_numpy(mask)))
    (h, told), (u, asked) = padded
    return [row[0] for row in rows], [row[1] for row in rows], [h, u, told, asked]


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    odds = [math.exp(value - largest) for value in values]
    return [odd / sum(odds) for odd in odds]


def test_the_attention_flow_is_that_of_the_paper_written_out() -> None:
    width = 4
    torch.manual_seed(0)
    flow = AttentionFlow(width).double()
    contexts, questions, given = ragged(width)
    found = flow(*given).detach().numpy()
    w = flow.likeness.weight[0].tolist()
    for row, (h, u) in enumerate(zip(contexts, questions, strict=True)):
        likeness = [[sum(a * b for a, b in zip(w, [*h_t, *u_j, *(h_t * u_j)], strict=True)) for u_j in u] for h_t in h]
        importance = softmax([max(line) for line in likeness])
        central = [sum(importance[t] * h[t][d] for t in range(len(h))) for d in range(width)]
        for t, h_t in enumerate(h):
            weights = softmax(likeness[t])
            seen = [sum(weights[j] * u[j][d] for j in range(len(u))) for d in range(width)]
            expected = [*h_t, *seen, *(h_t[d] * seen[d] for d in range(width)), *(h_t[d] * central[d] for d in range(width))]
            np.testing.assert_allclose(found[row, t], expected, rtol=1e-10, atol=1e-12)


def test_the_attention_to_the_question_written_out() -> None:
    width = 3
    torch.manual_seed(0)
    attention = Attention(width).double()
    contexts, questions, (h, u, _, asked) = ragged(width)
    found = attention(h, u, asked).detach().numpy()
    matrix = attention.look.weight.detach().numpy()
    for row, (context, question) in enumerate(zip(contexts, questions, strict=True)):
        for t, h_t in enumerate(context):
            weights = softmax([float((matrix @ h_t) @ u_j) for u_j in question])
            np.testing.assert_allclose(found[row, t], sum(weight * u_j for weight, u_j in zip(weights, question, strict=True)), rtol=1e-10)


def test_a_highway_written_out_lets_most_pass_at_first() -> None:
    torch.manual_seed(0)
    highway = Highway(5).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    found = highway(x).detach().numpy()
    (w, b), (v, c) = (
        (layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in (highway.change, highway.gate)
    )
    for row in range(2):
        for t in range(3):
            values = x[row, t].numpy()
            for d in range(5):
                gate = 1 / (1 + math.exp(-(sum(v[d, e] * values[e] for e in range(5)) + c[d])))
                change = max(0.0, sum(w[d, e] * values[e] for e in range(5)) + b[d])
                assert found[row, t, d] == pytest.approx(gate * change + (1 - gate) * values[d], abs=1e-12)
    assert (highway.gate.bias == -1).all()


def test_filters_over_characters_written_out() -> None:
    torch.manual_seed(0)
    embed = Embed(Sizes(words=5, dimension=3, characters=9), dropout=0.5).double().eval()
    embed.highway = nn.Sequential()  # has its own test
    characters = torch.randint(1, 9, (2, 3, 16))
    characters[0, 1, 4:] = 0
    words = torch.randn(2, 3, 3, dtype=torch.float64)
    found = embed(words, characters).detach().numpy()
    letters, filters, bias = (tensor.detach().numpy() for tensor in (embed.letters.weight, embed.filters.weight, embed.filters.bias))
    assert not letters[0].any() and found.shape == (2, 3, embed.width) == (2, 3, 103)
    for row in range(2):
        for t in range(3):
            spelled = letters[characters[row, t].numpy()]  # (16, 8)
            windows = [[bias[f] + sum(filters[f, :, k] @ spelled[at + k] for k in range(5)) for at in range(12)] for f in range(100)]
            np.testing.assert_allclose(found[row, t], [*words[row, t].tolist(), *(max(0.0, *values) for values in windows)], atol=1e-10)


def test_states_of_a_row_are_those_of_the_librarys_lstm_on_it_alone() -> None:
    torch.manual_seed(0)
    states = States(3, 4, dropout=0.5, layers=2).double().eval()
    peer = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True).double()
    for layer in range(2):
        for one, suffix in ((states.ahead[layer], ""), (states.back[layer], "_reverse")):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(peer, f"{name}_l{layer}{suffix}").data = getattr(one, f"{name}_l0").data
    x, length = torch.randn(3, 6, 3, dtype=torch.float64), torch.tensor([2, 6, 1])
    found = states(x, length)
    assert found.shape == (3, 6, 8)
    for row, count in enumerate(length.tolist()):
        torch.testing.assert_close(found[row, :count], peer(x[row : row + 1, :count])[0][0], atol=1e-12, rtol=0)
        assert not found[row, count:].any()


# --- a batch ---------------------------------------------------------------------------------------------------------------------


def test_context_and_question_are_cut_apart(folder: Path) -> None:
    tokens = WordTokens(folder)
    batch = batch_of(folder)
    context, question = parts(batch)
    for row, (text, pair) in enumerate(PAIRS):
        told, asked = ([tokens.encode(part or "", max_length=60)[0][name] for name in ("input_ids", "characters")] for part in (text, pair))
        expected = [(told[0][:-1], told[1][:-1]), (asked[0][1:], asked[1][1:])]  # "[CLS]" and the text, the pair and "[SEP]"
        for part, (ids, characters) in zip((context, question), expected, strict=True):
            count = int(part.length[row])
            assert count == len(ids) == int(part.mask[row].sum()) >= 1 and part.mask[row, :count].all()
            assert part.ids[row, :count].tolist() == ids.tolist() and part.characters[row, :count].tolist() == characters.tolist()
            assert not part.ids[row, count:].any() and not part.characters[row, count:].any()


def test_scores_are_of_the_context_and_low_elsewhere(kind: str, folder: Path) -> None:
    batch = batch_of(folder)
    scores = output(made(kind, folder), batch)
    assert scores.shape == (*batch["input_ids"].shape, 2) and scores.dtype == torch.float32 and torch.isfinite(scores).all()
    inside = batch["segment"] == 0
    inside[:, 0] = True
    assert (scores[~inside] == -1e4).all() and (scores[inside].abs() < 100).all()
    assert KINDS[kind].gives == ExtractiveQA.needs and ExtractiveQA.outputs == 2


def test_padding_and_neighbours_change_nothing(kind: str, folder: Path) -> None:
    model, together = made(kind, folder).double(), batch_of(folder)
    everything = output(model, together)
    for row, pair in enumerate(PAIRS):
        batch = batch_of(folder, [pair])
        count = batch["input_ids"].shape[1]
        torch.testing.assert_close(output(model, batch)[0], everything[row, :count], atol=1e-6, rtol=0)
        assert (everything[row, count:] == -1e4).all()
    wider = {name: torch.nn.functional.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, 9), value=-1 if name == "segment" else 0) for name, tensor in together.items()}
    torch.testing.assert_close(output(model, wider)[:, :-9], everything, atol=1e-6, rtol=0)


def test_scores_depend_on_every_word_of_both_texts(kind: str, folder: Path) -> None:
    model = made(kind, folder)
    text, question = "the speed of light in vacuum", "which speed is this"
    usual = output(model, batch_of(folder, [(text, question)]))
    for place in range(6):
        changed = " ".join("entropy" if index == place else word for index, word in enumerate(text.split()))
        assert not torch.allclose(output(model, batch_of(folder, [(changed, question)])), usual, atol=1e-6)
    for place in range(4):
        changed = " ".join("of" if index == place else word for index, word in enumerate(question.split()))
        assert not torch.allclose(output(model, batch_of(folder, [(text, changed)])), usual, atol=1e-6)


def test_only_bidaf_tells_unknown_words_apart(folder: Path) -> None:
    one, other = (batch_of(folder, [(f"the {word} light", "light")]) for word in ("surface", "observer"))
    assert (one["input_ids"] == other["input_ids"]).all() and one["input_ids"][0, 2] == 1
    for kind in KINDS:
        model = made(kind, folder)
        assert torch.equal(output(model, one), output(model, other)) == (kind == "lstm")


def test_a_gradient_reaches_every_parameter(kind: str, folder: Path) -> None:
    model, batch = made(kind, folder, dropout=0.0).train(), batch_of(folder)
    batch["target"] = torch.tensor([[1, 2], [3, 5], [0, 0], [2, 2], [0, 0]])
    task = ExtractiveQA()
    task.loss(task.scores(model(batch), batch), batch).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_cuda_scores_are_those_of_the_cpu_and_gradients_are_finite(kind: str, folder: Path, dtype: torch.dtype) -> None:
    model, batch = made(kind, folder, dropout=0.0), batch_of(folder)
    expected = output(model, batch)
    model.cuda().train()
    on_cuda = {name: tensor.cuda() for name, tensor in batch.items()}
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        found = model(on_cuda)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, atol=2e-5 if dtype == torch.float32 else 0.02, rtol=0)
    found.masked_fill(found < -1e3, 0).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --- folders ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_model_gives_the_same_scores_bit_for_bit(kind: str, folder: Path, tmp_path: Path) -> None:
    model, batch = made(kind, folder, seed=3), batch_of(folder)
    model.save(tmp_path)
    KINDS[kind].tokens(folder).save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = KINDS[kind].load(tmp_path, outputs=2, hidden_size=6)
    again = batch_of(tmp_path)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(output(loaded, again), output(model, batch))
    with pytest.raises(BundleError, match="do not fit the model"):
        KINDS[kind].load(tmp_path, outputs=2, hidden_size=7)


def test_a_backbone_holds_the_vectors_and_both_kinds_start_from_it(folder: Path, tmp_path: Path) -> None:
    vectors = make_vectors(tiny.TEXTS, dimension=8, limit=100)
    assert sorted(path.name for path in folder.iterdir()) == ["characters.json", "config.json", "model.safetensors", "tokenizer.json"]
    for kind in KINDS:
        table = made(kind, folder).input_embeddings.detach().numpy()
        assert table.shape == (4 + len(vectors.words), 8) and not table[0].any()
        np.testing.assert_array_equal(table[4:], vectors.table)
        np.testing.assert_array_equal(table[1], vectors.mean)
        again = tmp_path / kind
        KINDS[kind].invent(again, lambda: tiny.TEXTS, seed=0, config={"dimension": 8}, vocab_size=100)
        assert {path.name: path.read_bytes() for path in again.iterdir()} == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_backbone_takes_its_vectors_from_a_file(kind: str, tmp_path: Path) -> None:
    lines = ["the 1 0 0", "zzyzx 0 1 0", "Light 0 0 1", "rain 5 5 5"]
    (tmp_path / "v.txt").write_text("\n".join(lines))
    config = {"vectors": str(tmp_path / "v.txt")}
    KINDS[kind].invent(tmp_path / "made", lambda: tiny.TEXTS, seed=0, config=config, vocab_size=3)
    table = made(kind, tmp_path / "made").input_embeddings
    tokens = KINDS[kind].tokens(tmp_path / "made")
    assert table.shape == (7, 3) and table[tokens.id("light")].tolist() == [0, 0, 1] and table[tokens.id("zzyzx")].tolist() == [0, 1, 0]
    assert tokens.id("rain") == 1 and table[1].tolist() == [1.5, 1.5, 1.5]
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dimension"] == 3
    KINDS[kind].invent(tmp_path / "other", lambda: tiny.TEXTS, seed=0, config={**config, "dimension": 3})
    for wrong, why in (
        ({"dimension": 4}, r"model\.config\.dimension = 4, but the vectors in .*v\.txt have 3: leave it out"),
        ({"vektors": "v.txt"}, r"unknown key 'model\.config\.vektors' \(did you mean 'vectors'\?\)"),
        ({"vectors": 3}, r"model\.config\.vectors = 3: give a file"),
        ({"dimension": "3"}, r"model\.config\.dimension = '3': give a whole number"),
        ({"dimension": True}, r"model\.config\.dimension = True: give a whole number"),
        ({"vectors": str(tmp_path / "nowhere.txt")}, r"model\.config\.vectors = .*nowhere\.txt': no such file"),
    ):
        with pytest.raises(ConfigError, match=why) as error:
            KINDS[kind].invent(tmp_path / "wrong", lambda: tiny.TEXTS, seed=0, config=config | wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model\.config\.dimension = 0: must be at least 1"):
        KINDS[kind].invent(tmp_path / "wrong", lambda: tiny.TEXTS, seed=0, config={"dimension": 0})
    (tmp_path / "v.txt").write_text("the 1 0 0\nlight 1 0\n")
    with pytest.raises(DataError, match=r"v\.txt: line 2"):
        KINDS[kind].invent(tmp_path / "wrong", lambda: tiny.TEXTS, seed=0, config=config)


def test_a_broken_folder_is_a_bundle_error_in_one_line(kind: str, folder: Path, tmp_path: Path) -> None:
    cases = {
        "config.json": (b"", b"{}", b"[]", b'{"words": 0, "dimension": 8, "characters": 9}', b'{"words": 9, "dimension": 8, "characters": 9}'),
        "model.safetensors": (b"", b"rubbish", (folder / "model.safetensors").read_bytes()[:-40]),
    }
    for name, contents in cases.items():
        for content in contents:
            for path in folder.iterdir():
                (tmp_path / path.name).write_bytes(content if path.name == name else path.read_bytes())
            with pytest.raises(BundleError, match=rf"{tmp_path}/{name}|{tmp_path}/model\.safetensors") as error:
                made(kind, tmp_path)
            assert "\n" not in str(error.value)
    with pytest.raises(BundleError, match=r"no folder of a recurrent reader.*model\.source"):
        made(kind, tiny.encoder_folder(tmp_path / "bert"))


# --- what training asks for ------------------------------------------------------------------------------------------------------


def test_layer_groups_hold_each_parameter_once_and_the_vectors_lie_at_the_bottom(kind: str, folder: Path) -> None:
    model = made(kind, folder)
    groups = model.layer_groups()
    ids = [id(parameter) for group in groups for parameter in group]
    assert len(groups) == LAYERS[kind] + 2 and len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in model.parameters()}
    assert [id(parameter) for parameter in groups[0]] == [id(model.input_embeddings)]
    names = [{name.split(".")[0] for name, parameter in model.named_parameters() if any(parameter is one for one in group)} for group in groups]
    assert names == {
        "lstm": [{"words"}, {"context"}, {"attention", "match"}, {"head"}],
        "bidaf": [{"words"}, {"embed"}, {"context"}, {"flow", "model"}, {"end", "heads"}],
    }[kind]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_reinit_draws_the_top_layers_anew_and_nothing_else(kind: str, folder: Path, count: int) -> None:
    model = made(kind, folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reinit_layers(count)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    top = [parameter for group in model.layer_groups()[1:-1][LAYERS[kind] - count :] for parameter in group]
    assert changed == {name for name, parameter in model.named_parameters() if any(parameter is one for one in top)}
    with pytest.raises(ConfigError, match=rf"train\.reinit_layers = 9: model\.kind = \"{kind}\" has {LAYERS[kind]} layers"):
        model.reinit_layers(9)


def test_reinit_of_all_layers_keeps_padding_at_zero_and_gates_closed(folder: Path) -> None:
    model = made("bidaf", folder)
    model.reinit_layers(3)
    assert not model.embed.letters.weight[0].any() and model.embed.letters.weight[1].any()
    assert all((highway.gate.bias == -1).all() for highway in model.embed.highway)


def test_checkpointed_activations_keep_less_and_give_the_same_gradients(kind: str, folder: Path) -> None:
    gradients, kept = [], []
    for asked in (False, True):
        model, batch = made(kind, folder, dropout=0.3).train(), batch_of(folder)
        if asked:
            model.checkpoint_activations()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scores = model(batch)
        scores.masked_fill(scores < -1e3, 0).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_other_outputs_and_sizes_are_refused(kind: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf'model\.kind = "{kind}" says where an answer begins and ends, 2 numbers a token, not 3'):
        KINDS[kind].create(folder, outputs=3)
    with pytest.raises(ConfigError, match=r"model\.hidden_size = 0: must be at least 1"):
        KINDS[kind].create(folder, outputs=2, hidden_size=0)


# --- learning --------------------------------------------------------------------------------------------------------------------

TOWNS = ("Arlen", "Bruma", "Corvo", "Dresk", "Elmet", "Fossa", "Gwent", "Harad", "Ilion", "Jarow")
FOODS = ("red apples", "goat cheese", "black rye bread", "salted fish", "sweet plums", "oat cakes", "cold tea", "dry beans", "brown honey", "fresh figs")


def readings() -> list[Reading]:
    """20 questions about 10 texts: who eats it, and what."""
    made = []
    for row, town in enumerate(TOWNS):
        person, food = f"Mr. {TOWNS[-1 - row]}son", FOODS[row]
        context = f"In {town}, as old books say, {person} eats {food} in {row + 3} of 12 months."
        for side, (question, text) in enumerate(((f"Who eats {food}?", person), (f"What is eaten in {town}?", food))):
            made.append(Reading(f"{row}-{side}", question, context, (Answer(text, context.index(text)),)))
    return made


@pytest.fixture(scope="module")
def of_readings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readings")
    LSTM.invent(folder, lambda: [f"{one.context} {one.question}" for one in readings()], seed=0, config={"dimension": 24})
    return folder


def test_20_questions_are_learned_by_heart(kind: str, of_readings: Path) -> None:
    examples, task = readings(), ExtractiveQA(max_length=128, stride=16, max_question=16, max_answer=5)
    tokens, model = WordTokens(of_readings), made(kind, of_readings, hidden_size=24, dropout=0.0)
    features = task.encode(examples, tokens)
    assert task.metrics["em"](predicted(task, model, features, tokens, examples), task.targets(examples)) < 0.3
    losses = descend(task, model, task.collate(features, tokens), "adam", lr=0.01, steps=45)
    assert task.metrics["em"](predicted(task, model, features, tokens, examples), task.targets(examples)) >= 0.9
    assert losses[-1] < 0.1 * losses[0]


def test_adadelta_learns_with_a_rate_near_1(kind: str, of_readings: Path) -> None:
    task, tokens = ExtractiveQA(max_length=128, stride=16, max_question=16, max_answer=5), WordTokens(of_readings)
    batch = task.collate(task.encode(readings()[:4], tokens), tokens)
    losses = descend(task, made(kind, of_readings, dropout=0.0), batch, "adadelta", lr=2.0, steps=30)
    assert losses[-1] < 0.9 * losses[0]


def descend(task: ExtractiveQA, model: Any, batch: Batch, optimizer: str, *, lr: float, steps: int) -> list[float]:
    stepper = make_optimizer([{"params": model.parameters(), "lr": lr, "weight_decay": 0.0}], optimizer)
    losses = []
    for _ in range(steps):
        stepper.zero_grad()
        loss = task.loss(task.scores(model.train()(batch), batch), batch)
        loss.backward()
        stepper.step()
        losses.append(float(loss.detach()))
    return losses


def predicted(task: ExtractiveQA, model: Any, features: list[Any], tokens: WordTokens, examples: list[Reading]) -> np.ndarray:
    batch = task.collate(features, tokens)
    with torch.inference_mode():
        return task.decode([*task.scores(model.eval()(batch), batch).numpy()], features, examples)


def test_windows_of_a_long_text_are_read_one_by_one(kind: str, folder: Path) -> None:
    """A window's scores are those of its words, wherever in the text they stand."""
    text = " ".join([*tiny.TEXTS, "The answer is entropy."])
    task = ExtractiveQA(max_length=64, stride=16, max_question=16)
    tokens, model = WordTokens(folder), made(kind, folder)
    reading = Reading("1", "What is the answer?", text, (Answer("entropy", text.rindex("entropy")),))
    features = task.encode([reading], tokens)
    assert len(features) > 3 and features[-1].target != (0, 0) and features[1].target == (0, 0)
    prediction = predicted(task, model, features, tokens, [reading])
    assert np.isfinite(prediction).all() and len(task.rows(prediction, [reading])["answer"][0]) > 0


def test_vectors_written_for_a_recipe_are_found_by_it(tmp_path: Path) -> None:
    tiny.write_vectors(make_vectors(tiny.TEXTS, dimension=6, limit=30), tmp_path / "v.txt.gz")
    BiDAF.invent(tmp_path / "made", lambda: tiny.TEXTS[:2], seed=0, config={"vectors": str(tmp_path / "v.txt.gz")}, vocab_size=20)
    assert recurrent.read_sizes(tmp_path / "made").words == 4 + 20
