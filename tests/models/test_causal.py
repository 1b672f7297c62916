"""Decoders as members: log-probabilities where they are asked for, scalar heads, folders and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import NewGELUActivation

from kit.errors import BundleError, ConfigError
from kit.models import language
from kit.models.causal import Causal
from kit.models.prefix import Sharing
from tests import decoders, tiny


@pytest.fixture(scope="module", params=sorted(decoders.FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of every family as its library saves it."""
    path = tmp_path_factory.mktemp(request.param)
    decoders.stock(request.param).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    decoders.stock("llama").save_pretrained(path)
    return path


@pytest.mark.parametrize("sharing", get_args(Sharing))
@pytest.mark.parametrize(("rows", "left"), [(1, False), (5, False), (3, True)])
def test_log_probabilities_are_those_of_the_librarys_model(folder: Path, sharing: Sharing, rows: int, left: bool) -> None:
    trees = decoders.trees(rows, 5, left=left)
    model = Causal.create(folder, outputs=1, sharing=sharing).eval()
    with torch.no_grad():
        found = model(trees.batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, decoders.one_by_one(decoders.stock(folder.name[:-1]), trees.texts), rtol=0, atol=1e-5)


def test_the_vocabulary_is_looked_at_in_parts(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees, model = decoders.trees(3, 4), Causal.create(llama, outputs=1)
    seen = []
    model.backbone.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    whole = model(trees.batch)
    whole.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(language, "_LOGITS", 7 * decoders.VOCABULARY)
    seen.clear()
    parts = model(trees.batch)
    parts.sum().backward()
    assert max(seen) == 7
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def plain_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    """Texts without branches, padded on the right, every token but the first asked for."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(3, decoders.VOCABULARY, (rows, width), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(width).expand(rows, width)
    branch = torch.where(positions < torch.tensor(lengths)[:, None], 0, -1)
    row, column = (branch[:, 1:] == 0).nonzero(as_tuple=True)
    return {"input_ids": ids, "position_ids": positions, "branch": branch, "at": row * width + column, "token": ids[row, column + 1]}


@pytest.mark.parametrize("at_once", [1, 5 * decoders.VOCABULARY, 1 << 20])
def test_gradients_are_those_of_the_librarys_log_softmax(folder: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """The logits become their gradient in place, so many numbers at a time."""
    monkeypatch.setattr(language, "_AT_ONCE", at_once)
    model, reference, batch = Causal.create(folder, outputs=1), decoders.stock(folder.name[:-1]), plain_batch([12, 7, 9])
    weight = torch.randn(len(batch["at"]), generator=torch.Generator().manual_seed(1))
    (model(batch) * weight).sum().backward()
    logits = reference(input_ids=batch["input_ids"], use_cache=False).logits.flatten(0, 1)[batch["at"]]
    (logits.log_softmax(-1).gather(-1, batch["token"][:, None])[:, 0] * weight).sum().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        largest = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * max(1.0, largest), msg=lambda text, name=name: f"{name}: {text}")


def test_a_second_backward_pass_through_the_same_logits_is_refused(llama: Path) -> None:
    found = Causal.create(llama, outputs=1)(plain_batch([6, 4])).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


def test_the_activation_of_gpt2_is_one_operation_and_the_folder_says_what_it_said(tmp_path: Path) -> None:
    decoders.stock("gpt2").save_pretrained(tmp_path / "stock")
    made = [Causal.create(tmp_path / "stock", outputs=1), Causal.load(tmp_path / "stock", outputs=1)]
    for model in made:
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(torch.nn.GELU) == 3 and NewGELUActivation not in kinds
    made[0].save(tmp_path / "own")
    names = [json.loads((tmp_path / name / "config.json").read_text())["activation_function"] for name in ("stock", "own")]
    assert names == ["gelu_new", "gelu_new"]


def last_places(trees: decoders.Trees) -> torch.Tensor:
    """The last place of every branch, row after row."""
    branch = trees.batch["branch"]
    rows, width = branch.shape
    return torch.tensor([row * width + int((branch[row] == k).nonzero().max()) for row in range(rows) for k in range(1, int(branch[row].max()) + 1)])


@pytest.mark.parametrize("others", [False, True])
def test_a_scalar_head_reads_the_last_token_of_each_branch(llama: Path, others: bool) -> None:
    trees = decoders.trees(2, 3)
    model = Causal.create(llama, outputs=1, head="score", others=others).eval()
    with torch.no_grad():
        scores = model({**trees.batch, "at": last_places(trees)})
        reference = decoders.stock("llama").get_decoder()
        for row, (trunk, branches) in enumerate(trees.texts):
            last = torch.stack([reference(input_ids=torch.cat([trunk, branch])[None], use_cache=False)[0][0, -1] for branch in branches])
            beside = torch.stack([torch.cat([last[:k], last[k + 1 :]]).mean(0) for k in range(3)])
            expected = model.head(torch.cat([last, beside], -1) if others else last)
            torch.testing.assert_close(scores[3 * row : 3 * row + 3], expected, rtol=0, atol=1e-5)
    assert model.gives == "place" and scores.shape == (6, 1)


@pytest.mark.parametrize("head", ["words", "score"])
def test_groups_partition_the_parameters_and_a_saved_model_comes_back(folder: Path, head: str, tmp_path: Path) -> None:
    trees = decoders.trees(2, 2)
    batch = {**trees.batch, **({} if head == "words" else {"at": last_places(trees)})}
    model = Causal.create(folder, outputs=1, head=head).eval()
    groups = model.layer_groups()
    grouped = [id(parameter) for group in groups for parameter in group]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(parameter) for parameter in model.parameters()}
    assert len(groups) == 5 and any(parameter is model.input_embeddings for parameter in groups[0])
    model.save(tmp_path)
    again = Causal.load(tmp_path, outputs=1, head=head).eval()
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


def test_what_was_trained_is_a_folder_for_the_library(llama: Path, tmp_path: Path) -> None:
    Causal.create(llama, outputs=1).save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(tensor, decoders.stock("llama").state_dict()[name]) for name, tensor in again.state_dict().items())


def test_recomputed_activations_give_the_same_gradients(llama: Path) -> None:
    trees = decoders.trees(2, 3)
    gradients = []
    for recompute in (False, True):
        model = Causal.create(llama, outputs=1).train()
        if recompute:
            model.checkpoint_activations()
        model(trees.batch).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_reinitialised_layers_are_new_and_the_others_are_not(llama: Path) -> None:
    model, before = Causal.create(llama, outputs=1), Causal.create(llama, outputs=1)
    model.reinit_layers(1)
    same = [torch.equal(a.self_attn.q_proj.weight, b.self_attn.q_proj.weight) for a, b in zip(model.decoder.layers, before.decoder.layers, strict=True)]
    assert same == [True, True, False]


@pytest.mark.parametrize("quantise", ["none", "nf4"])
@pytest.mark.parametrize("head", ["words", "score"])
def test_an_adapter_is_saved_alone_and_comes_back_on_its_base(llama: Path, tmp_path: Path, head: str, quantise: str) -> None:
    options: dict[str, Any] = {"head": head, "quantise": quantise, "adapter": {"r": 4, "dropout": 0.0}, "precision": "fp32"}
    trees = decoders.trees(2, 3)
    batch = {**trees.batch, **({} if head == "words" else {"at": last_places(trees)})}
    model = Causal.create(llama, outputs=1, **options)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        loss = (model.train()(batch) - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.eval()(batch)  # after which four-bit weights must be as before
    assert losses[-1] < 0.9 * losses[0]
    model.save(tmp_path)
    held = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert held < 0.6 * sum(path.stat().st_size for path in llama.glob("*.safetensors"))
    again = Causal.load(tmp_path, outputs=1, base=llama, **options)
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), model.eval()(batch))


def test_an_adapter_needs_the_base_it_was_trained_on(llama: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"adapter": {"r": 2}, "precision": "fp32"}
    Causal.create(llama, outputs=1, **options).save(tmp_path / "adapter")
    decoders.stock("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BundleError, match="its base is not known: mount the bundle that model.source names"):
        Causal.load(tmp_path / "adapter", outputs=1, **options)
    with pytest.raises(BundleError, match="belongs to the base .*, and this is 'other'"):
        Causal.load(tmp_path / "adapter", outputs=1, base=tmp_path / "other", **options)


def test_a_recipe_with_another_rank_than_the_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    Causal.create(llama, outputs=1, adapter={"r": 2}, precision="fp32").save(tmp_path)
    message = r"adapter_config\.json: r = 2, and model\.adapter\.r = 3: set the latter to the former, or train the adapter again$"
    with pytest.raises(BundleError, match=message) as caught:
        Causal.load(tmp_path, outputs=1, base=llama, adapter={"r": 3}, precision="fp32")
    assert "\n" not in str(caught.value)


def test_tokens_that_the_weights_do_not_know_are_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    tiny.train_byte_level(tmp_path, vocab_size=400)
    with pytest.raises(BundleError, match=rf"^{tmp_path}: the tokenizer has \d+ tokens and the model 120: take both from one checkpoint$"):
        Causal.tokens(tmp_path)


def shard_less(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    decoders.stock("llama").save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def index_broken(folder: Path) -> None:
    shard_less(folder)
    (folder / "model.safetensors.index.json").write_text("[1]")


def break_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def another_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_weights, "weights cannot be loaded"),
        (no_weights, r"no \.safetensors weights: convert"),
        (another_config, r"lack 9 tensors of the model"),
        (shard_less, r"model-00002-of-\d+\.safetensors is missing, which model\.safetensors\.index\.json names: copy all files of the checkpoint"),
        (index_broken, r"index\.json: cannot be read: .*: copy the checkpoint again"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(llama: Path, tmp_path: Path, damage: Any, message: str) -> None:
    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(BundleError, match=message) as caught:
        Causal.create(tmp_path, outputs=1)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "word"}, r"model\.head = 'word' is unknown"),
        ({"others": True}, r"model\.others = true, but model\.head"),
        ({"quantise": "nf4"}, r"four-bit weights cannot be trained: add \[model\.adapter\]"),
        ({"adapter": {}}, r"\[model\.adapter\] is empty: give at least r, or leave it out"),
    ],
)
def test_options_that_cannot_be_are_refused(llama: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Causal.create(llama, outputs=1, **options)
