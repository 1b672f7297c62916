"""Encoder-decoders as members: every answer as the library's model sees it alone, float16 that holds, folders and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from kit.errors import BundleError, ConfigError, KitError
from kit.models import language
from kit.models.seq2seq import Seq2Seq
from tests import decoders, tiny

END = 1
_T5 = {
    "vocab_size": decoders.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0, "initializer_factor": 1.0,
    "pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "t5": {**_T5, "model_type": "t5", "feed_forward_proj": "relu", "tie_word_embeddings": True},
    "flan": {**_T5, "model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": {**_T5, "model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {
        "model_type": "bart", "vocab_size": decoders.VOCABULARY, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 48, "init_std": 0.3,
        "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": END, "decoder_start_token_id": END,
    },
}  # fmt: skip
"""config.json of families as their authors wrote them; "flan" and "mt5" have a vocabulary head of their own, and do not scale the states."""
T5S = ("flan", "mt5", "t5")


def stock(family: str, seed: int = 0) -> Any:
    """The library's model with its plainest attention."""
    settings = dict(FAMILIES[family])
    torch.manual_seed(seed)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").eval()
    if family in ("flan", "mt5"):
        model.lm_head.weight = nn.Parameter(torch.randn(decoders.VOCABULARY, 16) * 0.3)
        model.config.scale_decoder_outputs = False  # transformers 5.0 scales what T5 1.1 does not
    return model


def write(folder: Path, family: str, *, twice: bool = False) -> Path:
    """The folder of a checkpoint. twice: with all names of tied tensors, as old files have them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.clone() for name, tensor in stock(family).state_dict().items() if twice or "embed_tokens" not in name}
    if family in ("t5", "bart") and not twice:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(FAMILIES[family]))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def alone(model: Any, trunk: Tensor, branch: Tensor) -> Tensor:
    """Log-probabilities of a branch's tokens: one text through encoder and decoder."""
    config = model.config
    text, answer = torch.cat([trunk, torch.tensor([END])]), torch.cat([torch.tensor([config.decoder_start_token_id]), branch[:-1]])
    logits = model(input_ids=text[None], decoder_input_ids=answer[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1).gather(-1, branch[:, None])[:, 0]


def one_by_one(model: Any, trees: decoders.Trees) -> Tensor:
    return torch.cat([alone(model, trunk, branch) for trunk, branches in trees.texts for branch in branches])


def last_places(trees: decoders.Trees) -> Tensor:
    """The last place of every branch, row after row."""
    branch = trees.batch["branch"]
    places = [(row, int((own == k).nonzero().max())) for row, own in enumerate(branch) for k in range(1, int(own.max()) + 1)]
    return torch.tensor([row * branch.shape[1] + column for row, column in places])


def forward(model: Seq2Seq, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.eval()(batch)


@pytest.mark.parametrize(("rows", "branches", "left"), [(1, 5, False), (1, 1, False), (5, 4, False), (5, 4, True)])
def test_log_probabilities_are_those_of_the_librarys_model(folders: dict[str, Path], family: str, rows: int, branches: int, left: bool) -> None:
    trees = decoders.trees(rows, branches, seed=rows, left=left)
    model = Seq2Seq.create(folders[family], outputs=1)
    found = forward(model, trees.batch)
    with torch.no_grad():
        expected = one_by_one(stock(family), trees)
    assert model.gives == "answer_token" and found.dtype == torch.float32 and expected.std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_trees_have_unequal_branches_and_some_of_one_token() -> None:
    lengths = [[len(branch) for branch in branches] for _, branches in decoders.trees(5, 4, seed=5).texts]
    assert any(1 in row for row in lengths) and all(len(set(row)) > 1 for row in lengths)


def test_the_loss_of_labels_is_ours(folders: dict[str, Path], family: str) -> None:
    trees = decoders.trees(3, 1)
    found = forward(Seq2Seq.create(folders[family], outputs=1), trees.batch).split([len(branches[0]) for _, branches in trees.texts])
    reference = stock(family)
    for own, (trunk, branches) in zip(found, trees.texts, strict=True):
        with torch.no_grad():
            loss = reference(input_ids=torch.cat([trunk, torch.tensor([END])])[None], labels=branches[0][None]).loss
        assert float(-own.mean()) == pytest.approx(float(loss), abs=1e-5)


def test_only_an_untied_head_of_t5_reads_states_that_are_not_scaled(folders: dict[str, Path]) -> None:
    """By hand, for transformers 5.0 is wrong about it."""
    trees = decoders.trees(1, 1)
    trunk, (branch,) = trees.texts[0]
    for family, scale in (("t5", 16**-0.5), ("flan", 1), ("mt5", 1)):
        model = stock(family)
        with torch.no_grad():
            encoded = model.encoder(input_ids=torch.cat([trunk, torch.tensor([END])])[None])[0]
            answer = torch.cat([torch.tensor([0]), branch[:-1]])[None]
            states = model.decoder(input_ids=answer, encoder_hidden_states=encoded, use_cache=False)[0][0]
            expected = (states * scale @ model.lm_head.weight.T).log_softmax(-1).gather(-1, branch[:, None])[:, 0]
        torch.testing.assert_close(forward(Seq2Seq.create(folders[family], outputs=1), trees.batch), expected, rtol=0, atol=1e-5)


def ragged(counts: list[int]) -> decoders.Trees:
    """Trees whose rows have different numbers of branches, every token asked for."""
    trees = decoders.trees(len(counts), max(counts), seed=3)
    width = trees.batch["branch"].shape[1]
    gone = trees.batch["branch"] > torch.tensor(counts)[:, None]
    texts = [(trunk, branches[:count]) for (trunk, branches), count in zip(trees.texts, counts, strict=True)]
    batch = {**trees.batch, "branch": torch.where(gone, -1, trees.batch["branch"])}
    asked = []
    for row, (trunk, branches) in enumerate(texts):
        for number in range(1, len(branches) + 1):
            columns = (batch["branch"][row] == number).nonzero()[:, 0]
            asked += [row * width + len(trunk) - 1, *(row * width + columns[:-1])]
    token = torch.cat([branch for _, branches in texts for branch in branches])
    return decoders.Trees(texts, {**batch, "at": torch.tensor(asked), "token": token})


def test_rows_may_have_different_numbers_of_branches(folders: dict[str, Path], family: str) -> None:
    trees = ragged([2, 4, 1])
    with torch.no_grad():
        expected = one_by_one(stock(family), trees)
    torch.testing.assert_close(forward(Seq2Seq.create(folders[family], outputs=1), trees.batch), expected, rtol=0, atol=1e-5)


def test_trunks_without_branches_are_asked_for_the_first_token(folders: dict[str, Path], family: str) -> None:
    """Letters: several tokens at one place."""
    trees = decoders.trees(3, 1)
    batch = {**trees.batch, "branch": torch.where(trees.batch["branch"] == 1, -1, trees.batch["branch"])}
    width = batch["branch"].shape[1]
    batch["at"] = torch.tensor([row * width + len(trunk) - 1 for row, (trunk, _) in enumerate(trees.texts) for _ in range(4)])
    batch["token"] = torch.tensor([7, 8, 9, 10] * 3)
    found = forward(Seq2Seq.create(folders[family], outputs=1), batch)
    reference = stock(family)
    with torch.no_grad():
        expected = [alone(reference, trunk, torch.tensor([letter])) for trunk, _ in trees.texts for letter in (7, 8, 9, 10)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)


def test_the_place_of_a_branchs_last_token_asks_for_what_follows(folders: dict[str, Path], family: str) -> None:
    trees = decoders.trees(3, 3)
    batch = {**trees.batch, "at": last_places(trees), "token": torch.full((9,), END)}
    reference = stock(family)
    with torch.no_grad():
        whole = [(trunk, torch.cat([branch, torch.tensor([END])])) for trunk, branches in trees.texts for branch in branches]
        expected = torch.stack([alone(reference, trunk, branch)[-1] for trunk, branch in whole])
    torch.testing.assert_close(forward(Seq2Seq.create(folders[family], outputs=1), batch), expected, rtol=0, atol=1e-5)


def test_nothing_asked_gives_nothing_and_a_trunks_inside_is_refused(folders: dict[str, Path]) -> None:
    model, trees = Seq2Seq.create(folders["t5"], outputs=1), decoders.trees(2, 2)
    nothing = {**trees.batch, "at": trees.batch["at"][:0], "token": trees.batch["token"][:0]}
    assert forward(model, nothing).shape == (0,)
    with pytest.raises(ConfigError, match=r'"seq2seq" says what follows a text, not what stands in it'):
        model({**trees.batch, "at": torch.tensor([1]), "token": torch.tensor([5])})


def test_a_trunk_that_ends_already_gets_no_second_end(folders: dict[str, Path]) -> None:
    """As an empty prompt, which HFTokens gives as nothing but an end."""
    model, reference = Seq2Seq.create(folders["flan"], outputs=1), stock("flan")
    branch = torch.tensor([5, 6, 7])
    batch = {
        "input_ids": torch.tensor([[END, 5, 6, 7, 0, 0], [9, END, 5, 6, 7, 0], [9, 9, 9, 5, 6, 7]]),
        "branch": torch.tensor([[0, 1, 1, 1, -1, -1], [0, 0, 1, 1, 1, -1], [0, 0, 0, 1, 1, 1]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5]]),
        "at": torch.tensor([0, 1, 2, 7, 8, 9, 14, 15, 16]),
        "token": branch.repeat(3),
    }
    with torch.no_grad():
        expected = torch.cat([alone(reference, torch.tensor(trunk, dtype=torch.long), branch) for trunk in ([], [9], [9, 9, 9])])
    torch.testing.assert_close(forward(model, batch), expected, rtol=0, atol=1e-5)


class Cost(NamedTuple):
    """Rows that a module saw."""

    encoder: list[int]
    keys: list[tuple[int, ...]]


def test_encoder_and_what_cross_attention_reads_are_computed_once_per_row(folders: dict[str, Path]) -> None:
    for family in T5S:
        trees = decoders.trees(3, 5)
        model = Seq2Seq.create(folders[family], outputs=1)
        cost = Cost([], [])
        model.backbone.get_encoder().block[0].register_forward_hook(lambda _, __, out, cost=cost: cost.encoder.append(len(out[0])))
        for block in model.backbone.get_decoder().block:
            block.layer[1].EncDecAttention.k.register_forward_hook(lambda _, __, out, cost=cost: cost.keys.append(tuple(out.shape[:2])))
        forward(model, trees.batch)
        longest = max(len(trunk) for trunk, _ in trees.texts) + 1
        assert cost == Cost([3], [(3, longest)] * 3)


def test_the_decoder_reads_no_further_than_it_is_asked(folders: dict[str, Path]) -> None:
    model, trees = Seq2Seq.create(folders["t5"], outputs=1), decoders.trees(1, 5)
    seen = []
    model.backbone.get_decoder().embed_tokens.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    forward(model, trees.batch)
    first = {**trees.batch, "at": trees.batch["at"][:1], "token": trees.batch["token"][:1]}
    forward(model, first)
    lengths = [len(branch) for branch in trees.texts[0][1]]
    assert seen == [1 + sum(lengths) - 5, 1]


def test_the_vocabulary_is_looked_at_in_parts(folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trees, model = decoders.trees(3, 4), Seq2Seq.create(folders[family], outputs=1)
    seen: list[int] = []
    model.backbone.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[:-1].numel()))
    whole = model(trees.batch)
    whole.sum().backward()
    assert seen == [len(trees.batch["at"])]  # all at once: nothing is computed anew for the gradients
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    monkeypatch.setattr(language, "_LOGITS", 7 * decoders.VOCABULARY)
    seen.clear()
    parts = model(trees.batch)
    parts.sum().backward()
    assert max(seen) == 7
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_the_naive_loss(folders: dict[str, Path], family: str, recompute: bool) -> None:
    """With recomputed activations too, where the biases of trees are needed once more in the backward pass; two forwards before it."""
    batches = [decoders.trees(3, 4, seed=seed) for seed in (0, 1)]
    model, reference = Seq2Seq.create(folders[family], outputs=1).train(), stock(family).train()
    if recompute:
        model.checkpoint_activations()
    weights = [torch.randn(len(trees.batch["at"]), generator=torch.Generator().manual_seed(1)) for trees in batches]
    sum((model(trees.batch) * own).sum() for trees, own in zip(batches, weights, strict=True)).backward()
    sum((one_by_one(reference, trees) * own).sum() for trees, own in zip(batches, weights, strict=True)).backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    mine = {name.removeprefix("backbone."): parameter.grad for name, parameter in model.named_parameters()}
    assert mine.keys() == theirs.keys() and len(mine) > 50
    assert {name for name, gradient in mine.items() if gradient is None} == {name for name, gradient in theirs.items() if gradient is None}
    for name, gradient in theirs.items():
        if gradient is not None:
            torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-6)


def test_recomputed_activations_keep_less(folders: dict[str, Path], family: str) -> None:
    kept = []
    for recompute in (False, True):
        model = Seq2Seq.create(folders[family], outputs=1).train()
        if recompute:
            model.checkpoint_activations()
        saved: list[int] = []
        keep = lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(decoders.trees(3, 4).batch).sum()
        kept.append(sum(saved))
    assert kept[1] < 0.7 * kept[0]


def test_a_copied_model_reads_its_own_weights(folders: dict[str, Path]) -> None:
    model, trees = Seq2Seq.create(folders["t5"], outputs=1).train(), decoders.trees(2, 3)
    model.checkpoint_activations()
    model(trees.batch).sum().backward()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(forward(other, trees.batch), forward(Seq2Seq.create(folders["t5"], outputs=1), trees.batch), rtol=0, atol=0)
    other.train()(trees.batch).sum().backward()


@pytest.mark.parametrize("others", [False, True])
def test_a_scalar_head_reads_the_last_token_of_each_branch(folders: dict[str, Path], family: str, others: bool) -> None:
    trees = decoders.trees(2, 3)
    model = Seq2Seq.create(folders[family], outputs=2, head="score", others=others)
    scores = forward(model, {**trees.batch, "at": last_places(trees)})
    assert model.gives == "place" and scores.shape == (6, 2) and not hasattr(model.backbone, "lm_head")
    reference = stock(family)
    start = reference.config.decoder_start_token_id
    with torch.no_grad():
        for row, (trunk, branches) in enumerate(trees.texts):
            encoded = reference.get_encoder()(input_ids=torch.cat([trunk, torch.tensor([END])])[None])[0]
            read = {"encoder_hidden_states": encoded, "use_cache": False}
            answers = [torch.cat([torch.tensor([start]), branch])[None] for branch in branches]
            last = torch.stack([reference.get_decoder()(input_ids=answer, **read)[0][0, -1] for answer in answers])
            beside = torch.stack([torch.cat([last[:k], last[k + 1 :]]).mean(0) for k in range(3)])
            expected = model.head(torch.cat([last, beside], -1) if others else last)
            torch.testing.assert_close(scores[3 * row : 3 * row + 3], expected, rtol=0, atol=1e-5)


def test_dropout_is_the_librarys_and_off_when_scoring(tmp_path: Path, folders: dict[str, Path]) -> None:
    edit_config(copied(folders["flan"], tmp_path), dropout_rate=0.3)
    model, trees = Seq2Seq.create(tmp_path, outputs=1), decoders.trees(2, 3)
    assert torch.equal(forward(model, trees.batch), forward(Seq2Seq.create(folders["flan"], outputs=1), trees.batch))
    with torch.no_grad():
        assert not torch.allclose(model.train()(trees.batch), model(trees.batch))


# float16


def swollen(model: nn.Module, where: str) -> None:
    """Weights at which a feed-forward layer leaves float16's range (the output, or already the gate's product), as in trained T5s."""
    factors = {"output": {"wo": 3e2, "wi": 1e3, "wi_0": 3e1, "wi_1": 1e2}, "product": {"wi": 1e3, "wi_0": 3e2, "wi_1": 1e3}}[where]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(factors.get(name.split(".")[-2], 1.0))


@pytest.mark.parametrize("where", ["output", "product"])
@pytest.mark.parametrize("family", T5S)
def test_float16_holds_where_the_librarys_model_overflows(folders: dict[str, Path], family: str, where: str) -> None:
    trees = decoders.trees(3, 4)
    model, naive = Seq2Seq.create(folders[family], outputs=1), stock(family)
    swollen(model, where)
    swollen(naive, where)
    exact = forward(model, trees.batch)
    with torch.inference_mode():
        torch.testing.assert_close(exact, one_by_one(naive, trees), rtol=0, atol=1e-4)
    with torch.autocast("cpu", torch.float16):
        found = forward(model, trees.batch)
        with torch.inference_mode():
            lost = one_by_one(naive, trees)
    assert torch.isfinite(found).all() and float((found - exact).abs().max()) < 0.1
    if (family, where) != ("t5", "product"):  # without a gate nothing is multiplied
        assert not float((lost - exact).abs().max()) < 1


@pytest.mark.parametrize("family", T5S)
def test_weights_in_float16_hold_too(folders: dict[str, Path], family: str) -> None:
    trees, model = decoders.trees(2, 3), Seq2Seq.create(folders[family], outputs=1)
    swollen(model, "output")
    exact = forward(model, trees.batch)
    found = forward(model.half(), trees.batch)
    assert found.dtype == torch.float32 and float((found - exact).abs().max()) < 0.1
    naive = stock(family)
    swollen(naive, "output")
    with torch.inference_mode():
        assert not float((one_by_one(naive.half(), trees) - exact).abs().max()) < 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_training_under_autocast_gives_gradients(folders: dict[str, Path], family: str, kind: torch.dtype) -> None:
    model, trees = Seq2Seq.create(folders[family], outputs=1).train(), decoders.trees(2, 3)
    model(trees.batch).mean().backward()
    exact = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with torch.autocast("cpu", kind):
        loss = model(trees.batch).mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    mine, its = (torch.cat([gradients[name].flatten() for name in exact]) for gradients in (found, exact))
    assert float(torch.cosine_similarity(mine, its, dim=0)) > 0.99


# folders


@pytest.mark.parametrize("head", ["words", "score"])
@pytest.mark.parametrize("twice", [False, True])
def test_a_saved_model_comes_back_with_its_groups(family: str, head: str, twice: bool, tmp_path: Path) -> None:
    trees = decoders.trees(2, 2)
    batch = {**trees.batch, **({} if head == "words" else {"at": last_places(trees)})}
    model = Seq2Seq.create(write(tmp_path / "source", family, twice=twice), outputs=1, head=head)
    own_head = head == "words" and family in ("flan", "mt5")
    model.save(tmp_path / "saved")
    torch.manual_seed(99)
    again = Seq2Seq.load(tmp_path / "saved", outputs=1, head=head)
    assert torch.equal(forward(again, batch), forward(model, batch))
    for one in (model, again):
        groups = one.layer_groups()
        grouped = [id(parameter) for group in groups for parameter in group]
        assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in one.parameters()}
        assert len(groups) == 1 + 2 + 3 + 1 and any(parameter is one.input_embeddings for parameter in groups[0])
        names = {id(parameter): name for name, parameter in one.named_parameters()}
        stacks = [{names[id(parameter)].split(".layers.")[0].split(".block.")[0] for parameter in group} for group in groups[1:-1]]
        prefix = "backbone.model." if family == "bart" and head == "words" else "backbone."
        assert stacks == [{f"{prefix}encoder"}] * 2 + [{f"{prefix}decoder"}] * 3
        top = [names[id(parameter)] for parameter in groups[-1]]
        assert top == (["backbone.lm_head.weight"] if own_head else [] if head == "words" else ["head.weight", "head.bias"])
    again.save(tmp_path / "third")
    assert load_file(tmp_path / "third" / "model.safetensors").keys() == load_file(tmp_path / "saved" / "model.safetensors").keys()
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) | {"_name_or_path": ""} for name in ("saved", "third"))
    assert first == second


def test_a_trained_model_comes_back_trained(folders: dict[str, Path], family: str, tmp_path: Path) -> None:
    trees, model = decoders.trees(2, 2), Seq2Seq.create(folders[family], outputs=1).train()
    optimizer = torch.optim.SGD([{"params": group} for group in model.layer_groups() if group], lr=1e-2)
    before = forward(model, trees.batch)
    for _ in range(3):
        optimizer.zero_grad()
        (-model.train()(trees.batch)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    after = forward(model, trees.batch)
    assert after.mean() > before.mean() + 1e-3
    model.save(tmp_path)
    assert torch.equal(forward(Seq2Seq.load(tmp_path, outputs=1), trees.batch), after)


def test_an_invented_model_is_the_same_for_a_seed_and_answers(tmp_path: Path, family: str) -> None:
    own = {name: value for name, value in FAMILIES[family].items() if name != "vocab_size" and not name.endswith("_token_id")}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(int(tmp_path.stat().st_mtime_ns) % 1000)
        Seq2Seq.invent(tmp_path / name, lambda: tiny.TEXTS, seed=seed, config=own, vocab_size=400)
    first, second, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc")
    assert first == second and {"config.json", "model.safetensors", "tokenizer.json"} <= set(first)
    assert first["model.safetensors"] != other["model.safetensors"] and first["tokenizer.json"] == other["tokenizer.json"]
    tokens, model = Seq2Seq.tokens(tmp_path / "a"), Seq2Seq.create(tmp_path / "a", outputs=1)
    assert tokens.limit == (47 if own["model_type"] == "bart" else 1 << 20)
    batch = tokens.join([[tokens.prompt("What is light?", (0, 0), max_length=20), tokens.branch(" light"), tokens.branch(" a wave of it")]])
    answers = batch["branch"] > 0
    scores = forward(model, {**batch, "at": answers.flatten().nonzero()[:, 0], "token": batch["input_ids"][answers]})
    assert torch.isfinite(scores).all() and len(scores) > 3
    if own["model_type"] == "t5":
        assert model.backbone.config.scale_decoder_outputs == own["tie_word_embeddings"]


def test_the_library_reads_what_it_calls_a_text_as_we_do(tmp_path: Path) -> None:
    """AutoTokenizer and AutoModelForSeq2SeqLM on the same folder: the encoder's text ends with </s>, answers do not begin with anything."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=110, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(tiny.TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)])
    write(tmp_path, "flan")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    theirs, reference = AutoTokenizer.from_pretrained(tmp_path), AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    reference.config.scale_decoder_outputs = False
    ours, model = Seq2Seq.tokens(tmp_path), Seq2Seq.create(tmp_path, outputs=1)
    prompt, options = "Albedo is the share of light. The answer:", ["snow", "dark soil of the moon", "light"]
    batch = ours.join([[ours.prompt(prompt, (0, 0), max_length=200), *(ours.branch(f" {option}", end=True) for option in options)]])
    branch, width = batch["branch"][0], batch["branch"].shape[1]
    at = [place - 1 if branch[place] == branch[place - 1] else int((branch == 0).sum()) - 1 for place in range(width) if branch[place] > 0]
    found = forward(model, {**batch, "at": torch.tensor(at), "token": batch["input_ids"][0][branch > 0]})
    losses = []
    for option in options:
        with torch.no_grad():
            losses.append(reference(**theirs(prompt, return_tensors="pt"), labels=theirs(option, return_tensors="pt").input_ids).loss)
    expected = torch.stack(losses)
    mine = torch.stack([-part.mean() for part in found.split([int((branch == k).sum()) for k in (1, 2, 3)])])
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_reinit_draws_the_top_layers_anew_the_decoders_first(folders: dict[str, Path], family: str, count: int) -> None:
    model, other = (Seq2Seq.create(folders[family], outputs=1) for _ in range(2))
    torch.manual_seed(7)
    model.reinit_layers(count)
    settings = stock(family, seed=8).state_dict()
    for number, (mine, its) in enumerate(zip(model.layer_groups()[1:-1], other.layer_groups()[1:-1], strict=True)):
        changed = [not torch.equal(one, two) for one, two in zip(mine, its, strict=True) if one.ndim > 1]
        assert all(changed) if number >= 5 - count else not any(changed)
    top = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in model.layer_groups()[-2]:
        if parameter.ndim > 1:
            expected = settings[top[id(parameter)].removeprefix("backbone.")]
            assert float(parameter.detach().std()) == pytest.approx(float(expected.std()), rel=0.35), top[id(parameter)]
    assert torch.isfinite(forward(model, decoders.trees(1, 2).batch)).all()
    with pytest.raises(ConfigError, match=r"train\.reinit_layers = 6: the model has 5 layers"):
        model.reinit_layers(6)


# what is refused


def copied(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def edit_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def drop_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["decoder.block.1.layer.2.layer_norm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def shard_less(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(state))}
    save_file({name: state[name] for name in names if "00001" in names[name]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shard_less, r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names: copy all files"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "the weights cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), r"no \.safetensors weights: convert"),
        (drop_tensor, r"lack 1 tensors of the model, such as decoder\.block\.1\.layer\.2\.layer_norm\.weight"),
        (lambda folder: edit_config(folder, num_layers=3), r"the weights lack 9 tensors"),
        (lambda folder: edit_config(folder, d_ff=33), "the weights cannot be loaded"),
        (lambda folder: edit_config(folder, decoder_start_token_id=None), r"config\.json: names no decoder_start_token_id: take it"),
        (lambda folder: edit_config(folder, model_type="bert"), r"model type 'bert' has no encoder and decoder: use model\.kind"),
        (lambda folder: edit_config(folder, auto_map={"AutoModel": "x.Y"}), "remote code"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(folders: dict[str, Path], tmp_path: Path, damage: Any, message: str) -> None:
    damage(copied(folders["flan"], tmp_path))
    with pytest.raises(BundleError, match=message) as caught:
        Seq2Seq.create(tmp_path, outputs=1)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_saved_weights_that_do_not_fit_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    Seq2Seq.create(folders["flan"], outputs=1).save(tmp_path)
    with pytest.raises(BundleError, match="the weights do not fit the model or are damaged"):
        Seq2Seq.load(tmp_path, outputs=1, head="score")
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(BundleError, match="the weights do not fit the model or are damaged"):
        Seq2Seq.load(tmp_path, outputs=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"no model\*\.safetensors"):
        Seq2Seq.load(tmp_path, outputs=1)


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copied(folders["t5"], tmp_path)
    tiny.train_byte_level(tmp_path, vocab_size=400)
    with pytest.raises(BundleError, match=r"the tokenizer has \d+ tokens and the model 120: take both from one checkpoint"):
        Seq2Seq.tokens(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"head": "word"}, r"model\.head = 'word' is unknown"), ({"others": True}, r"model\.others = true, but model\.head")],
)
def test_options_that_cannot_be_are_refused(folders: dict[str, Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Seq2Seq.create(folders["t5"], outputs=1, **options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"d_model": 16}, r"model\.config needs model_type"),
        ({"model_type": "t6"}, r"model\.config: "),
        ({"model_type": "bert"}, "model type 'bert' does not make a model of this kind"),
        ({**_T5, "model_type": "t5", "feed_forward_proj": "gated-x-y"}, r"feed_forward_proj"),
    ],
)
def test_settings_that_make_no_encoder_decoder_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in config.items() if name != "vocab_size" and not name.endswith("_token_id")}
    with pytest.raises(KitError, match=message):
        Seq2Seq.invent(tmp_path, lambda: tiny.TEXTS, seed=0, config=config, vocab_size=300)
