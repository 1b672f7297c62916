"""Every family of encoders: shapes, groups, saving, padding, re-initialisation, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.errors import BundleError, ConfigError
from kit.models.encoder import Encoder, position_limit, read_config
from kit.models.pooling import POOLINGS
from kit.tasks import Batch
from tests import tiny

TEXTS = [("Entropy measures disorder.", "Which words?"), (tiny.TEXTS[0], "light"), ("", "snow"), ("The speed of light", None)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.encoder_folder(tmp_path_factory.mktemp(family), family) for family in tiny.FAMILIES}


@pytest.fixture(params=sorted(tiny.FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(folders: dict[str, Path], family: str) -> Path:
    return folders[family]


def batch_of(folder: Path, texts: list[tuple[str, str | None]] = TEXTS, max_length: int = 60) -> Batch:
    tokens = Encoder.tokens(folder)
    return tokens.pad([tokens.encode(text, pair, max_length=max_length)[0] for text, pair in texts])


def output(model: Encoder, batch: Batch) -> Tensor:
    with torch.inference_mode():
        return model.eval()(batch)


def names_of(model: Encoder, group: int) -> list[str]:
    inside = {id(parameter) for parameter in model.layer_groups()[group]}
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


@pytest.mark.parametrize("pooling", sorted(POOLINGS.keys() - {"last4"}))
def test_with_a_pooling_it_gives_a_row_of_outputs_per_sequence(folder: Path, pooling: str) -> None:
    model = tiny.encoder(folder, outputs=3, pooling=pooling)
    scores = output(model, batch_of(folder))
    assert (model.gives, scores.shape, scores.dtype) == ("row", (4, 3), torch.float32) and torch.isfinite(scores).all()


def test_a_pooling_of_layers_is_given_what_the_backbone_says_of_each(folder: Path, family: str) -> None:
    model = tiny.encoder(folder, pooling="weighted").eval()
    with torch.inference_mode():
        torch.nn.init.normal_(model.pool.score)
        batch = batch_of(folder)
        types = {"token_type_ids": batch["token_type_ids"]} if family in ("bert", "electra", "roberta") else {}
        said = model.backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True, **types)
        assert len(said.hidden_states) == 1 + tiny.LAYERS and torch.equal(said.hidden_states[-1], said.last_hidden_state)
        torch.testing.assert_close(model(batch), model.head(model.pool(said.hidden_states, batch)))


def test_the_last_four_layers_of_a_deeper_model_stand_side_by_side(tmp_path: Path) -> None:
    model = tiny.encoder(tiny.encoder_folder(tmp_path, "bert", num_hidden_layers=5), outputs=2, pooling="last4")
    assert model.head.in_features == 4 * tiny.HIDDEN
    assert output(model, batch_of(tmp_path)).shape == (4, 2)


@pytest.mark.parametrize("pooling", ["gem", "weighted", "lstm"])
def test_a_pooling_with_weights_is_saved_with_them(folders: dict[str, Path], tmp_path: Path, pooling: str) -> None:
    model = tiny.encoder(folders["bert"], pooling=pooling)
    for parameter in model.pool.parameters():
        torch.nn.init.normal_(parameter)
    model.save(tmp_path)
    batch = batch_of(folders["bert"])
    assert torch.equal(output(Encoder.load(tmp_path, outputs=1, pooling=pooling), batch), output(model, batch))


def test_without_pooling_it_gives_outputs_per_token(folder: Path) -> None:
    model = tiny.encoder(folder, outputs=2, pooling="none")
    batch = batch_of(folder)
    assert (model.gives, output(model, batch).shape) == ("token", (*batch["input_ids"].shape, 2))


@pytest.mark.parametrize("pooling", ["mean", "attention", "gem", "weighted", "lstm", "match", "none"])
def test_layer_groups_hold_each_parameter_once(folder: Path, pooling: str) -> None:
    model = tiny.encoder(folder, pooling=pooling)
    groups = model.layer_groups()
    assert len(groups) == tiny.LAYERS + 2
    ids = [id(parameter) for group in groups for parameter in group]
    assert len(ids) == len(set(ids)) and set(ids) == {id(parameter) for parameter in model.parameters()}
    layers = [f"layer.{index}." for index in range(tiny.LAYERS)]
    assert all(layer in name for index, layer in enumerate(layers) for name in names_of(model, index + 1))
    assert not any(layer in name for layer in layers for name in names_of(model, 0))
    assert names_of(model, -1) == [name for name, _ in model.named_parameters() if name.startswith(("pool.", "head."))]
    assert any(parameter is model.input_embeddings for parameter in groups[0])


def test_debertas_shared_parts_are_in_the_bottom_group(folders: dict[str, Path]) -> None:
    bottom = names_of(tiny.encoder(folders["deberta_conv"]), 0)
    for part in ("encoder.rel_embeddings.weight", "encoder.LayerNorm.weight", "encoder.LayerNorm.bias", "encoder.conv.conv.weight"):
        assert f"backbone.{part}" in bottom
    assert "backbone.embeddings_project.weight" in names_of(tiny.encoder(folders["electra"]), 0)


def test_a_saved_model_gives_the_same_outputs_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    model = tiny.encoder(folder, outputs=2, pooling="attention", seed=3)
    model.save(tmp_path)
    Encoder.tokens(folder).save(tmp_path)
    torch.manual_seed(99)
    loaded = Encoder.load(tmp_path, outputs=2, pooling="attention")
    batch, again = batch_of(folder), batch_of(tmp_path)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert torch.equal(output(loaded, again), output(model, batch))
    assert Encoder.tokens(tmp_path).limit == tiny.POSITIONS


def test_padding_and_neighbours_do_not_change_a_row(folder: Path) -> None:
    model = tiny.encoder(folder, pooling="attention")
    together = output(model, batch_of(folder))
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(output(model, batch_of(folder, [text]))[0], together[row], atol=1e-5, rtol=1e-5)


def test_outputs_depend_on_text_and_pair_and_their_order(folder: Path) -> None:
    model = tiny.encoder(folder)
    rows = output(model, batch_of(folder, [("light", "snow"), ("snow", "light"), ("light", "soil"), ("dark", "snow")]))
    assert len({round(float(row), 6) for row in rows}) == 4


def test_token_types_reach_models_that_have_them_and_no_others(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in ("bert", "electra", "distilbert", "deberta"):
        batch = batch_of(folders[family], [("light", "snow")])
        other = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
        model = tiny.encoder(folders[family])
        assert batch["token_type_ids"].any()
        assert torch.equal(output(model, batch), output(model, other)) == (family in ("distilbert", "deberta"))
    one_type = tiny.encoder_folder(tmp_path, "bert", type_vocab_size=1)
    assert torch.isfinite(output(tiny.encoder(one_type), batch_of(one_type))).all()


def test_the_longest_sequence_runs_and_the_limit_counts_robertas_offset(folder: Path, family: str) -> None:
    assert position_limit(read_config(folder)) == Encoder.tokens(folder).limit == tiny.POSITIONS
    batch = batch_of(folder, [(" ".join(tiny.TEXTS), "light")], max_length=100)
    assert batch["input_ids"].shape == (1, 100 if family.startswith("deberta") else tiny.POSITIONS)  # distances have no end
    assert torch.isfinite(output(tiny.encoder(folder), batch)).all()


@pytest.mark.parametrize("count", [0, 1, 2])
def test_reinit_draws_the_top_layers_anew_and_nothing_else(folder: Path, count: int) -> None:
    model = tiny.encoder(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.reinit_layers(count)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    top = [name for index in range(tiny.LAYERS - count, tiny.LAYERS) for name in names_of(model, index + 1)]
    assert changed <= set(top)
    matrices = {name for name in top if before[name].ndim > 1 and "LayerNorm" not in name}
    assert matrices <= changed
    spread = model.backbone.config.initializer_range
    for name in matrices:
        assert model.state_dict()[name].std() == pytest.approx(spread, rel=0.25), name


def test_reinit_of_more_layers_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.reinit_layers = 3: the model has 2 layers"):
        tiny.encoder(folder).reinit_layers(3)


def test_checkpointed_activations_keep_less_and_give_the_same_gradients(folder: Path) -> None:
    gradients, kept = [], []
    for checkpointed in (False, True):
        model = tiny.encoder(folder).train()
        if checkpointed:
            model.checkpoint_activations()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: (saved.append(tensor.numel()), tensor)[1], lambda tensor: tensor):
            loss = model(batch_of(folder)).square().sum()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None})
        kept.append(sum(saved))
    plain, again = gradients
    assert plain.keys() == again.keys() and len(plain) > 10
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-5)
    assert kept[1] < 0.6 * kept[0]


def test_every_parameter_but_a_pooler_gets_a_gradient(folder: Path) -> None:
    model = tiny.encoder(folder).train()
    model(batch_of(folder)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all(".pooler." in name for name in without), without


def test_input_embeddings_are_the_word_table(folder: Path) -> None:
    model = tiny.encoder(folder)
    assert model.input_embeddings is model.backbone.embeddings.word_embeddings.weight
    assert model.input_embeddings.shape[0] == len(Encoder.tokens(folder)) and model.input_embeddings.requires_grad
    batch = batch_of(folder)
    before = output(model, batch)
    with torch.no_grad():
        model.input_embeddings.add_(0.5 * torch.randn(model.input_embeddings.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.allclose(output(model, batch), before)


def test_weights_in_half_precision_are_read_as_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["bert"], tmp_path)
    save_file({name: value.half() for name, value in load_file(folder / "model.safetensors").items()}, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, dtype="float16")
    model = Encoder.create(folder, outputs=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_backbone_made_from_texts_is_the_same_for_a_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(int(tmp_path.stat().st_mtime_ns) % 1000)
        Encoder.invent(tmp_path / name, lambda: tiny.TEXTS, seed=seed, config=tiny.FAMILIES["deberta"], vocab_size=300)
    first, second, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc")
    assert first == second and set(first) == {"config.json", "model.safetensors", "tokenizer.json"}
    assert first["model.safetensors"] != other["model.safetensors"] and first["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize(
    ("config", "message"),
    [({}, "needs model_type"), ({"model_type": "debertta"}, "debertta"), ({"model_type": "bert", "hidden_size": 10}, "hidden")],
    ids=["no type", "unknown type", "heads do not divide"],
)
def test_an_impossible_new_backbone_is_a_config_error(config: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Encoder.invent(tmp_path, lambda: tiny.TEXTS, seed=0, config=config, vocab_size=300)
    assert str(caught.value).startswith("model.config") and "\n" not in str(caught.value)


# what is refused


def copied(folder: Path, place: Path) -> Path:
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def damaged(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the BERT folder, for a test to damage."""
    return copied(folders["bert"], tmp_path)


def test_an_unknown_pooling_is_named_with_the_nearest(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model\.pooling = 'maen' is unknown \(did you mean 'mean'\?\)"):
        tiny.encoder(folders["bert"], pooling="maen")


def test_remote_code_is_refused_before_it_is_read(damaged: Path) -> None:
    (damaged / "modeling_evil.py").write_text("raise RuntimeError('ran')\n")
    edit_config(damaged, auto_map={"AutoModel": "modeling_evil.Evil"})
    for make in (lambda: Encoder.create(damaged, outputs=1), lambda: Encoder.load(damaged, outputs=1), lambda: Encoder.tokens(damaged)):
        with pytest.raises(BundleError, match=r"config\.json: asks for remote code \(auto_map\)"):
            make()


def test_a_folder_with_pickled_weights_only_is_refused(damaged: Path) -> None:
    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(BundleError, match=r"no \.safetensors weights: convert the checkpoint first"):
        Encoder.create(damaged, outputs=1)
    with pytest.raises(BundleError, match=r"no model\*\.safetensors"):
        Encoder.load(damaged, outputs=1)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_truncated_weights_are_refused(damaged: Path, keep: int) -> None:
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match="weights cannot be loaded") as caught:
        Encoder.create(damaged, outputs=1)
    assert "\n" not in str(caught.value) and str(damaged) in str(caught.value)


def test_weights_of_another_shape_are_refused(damaged: Path) -> None:
    edit_config(damaged, intermediate_size=48)
    with pytest.raises(BundleError, match="weights cannot be loaded") as caught:
        Encoder.create(damaged, outputs=1)
    assert "\n" not in str(caught.value)


def test_weights_that_lack_a_layer_are_refused_and_not_filled_with_random_numbers(damaged: Path) -> None:
    edit_config(damaged, num_hidden_layers=3)
    with pytest.raises(BundleError, match=r"the weights lack 16 tensors of the model, such as encoder\.layer\.2\."):
        Encoder.create(damaged, outputs=1)


def test_a_shard_less_is_named(damaged: Path) -> None:
    tensors = load_file(damaged / "model.safetensors")
    (damaged / "model.safetensors").rename(damaged / "model-00001-of-00002.safetensors")
    names = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    (damaged / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    message = rf"^{damaged}: model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names: copy all files of the checkpoint$"
    with pytest.raises(BundleError, match=message):
        Encoder.create(damaged, outputs=1)


def test_a_tokenizer_that_knows_more_than_the_weights_is_refused(damaged: Path) -> None:
    edit_config(damaged, vocab_size=50)
    with pytest.raises(BundleError, match=rf"^{damaged}: the tokenizer has \d+ tokens and the model 50: take both from one checkpoint$"):
        Encoder.tokens(damaged)


def test_a_missing_pooler_is_no_fault(damaged: Path) -> None:
    kept = {name: value for name, value in load_file(damaged / "model.safetensors").items() if not name.startswith("pooler.")}
    save_file(kept, damaged / "model.safetensors", {"format": "pt"})
    assert torch.isfinite(output(Encoder.create(damaged, outputs=1), batch_of(damaged))).all()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"model_type": "unheard_of"}', '{"model_type": 3}', '"bert"', '{"model_type": "bert", "hidden_size": "wide"}']
)
def test_a_damaged_configuration_is_refused_in_one_line(damaged: Path, text: str) -> None:
    (damaged / "config.json").write_text(text)
    with pytest.raises(BundleError, match=r"config\.json") as caught:
        Encoder.create(damaged, outputs=1)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_tokenizer_is_named(damaged: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere/config\.json: cannot be read"):
        Encoder.create(damaged / "nowhere", outputs=1)
    (damaged / "tokenizer.json").unlink()
    with pytest.raises(BundleError, match=r"no tokenizer\.json"):
        Encoder.tokens(damaged)


def test_a_saved_head_of_another_width_is_refused(damaged: Path, tmp_path: Path) -> None:
    tiny.encoder(damaged, outputs=2).save(tmp_path / "saved")
    with pytest.raises(BundleError, match="do not fit the model"):
        Encoder.load(tmp_path / "saved", outputs=1)
    with pytest.raises(BundleError, match="do not fit the model"):
        Encoder.load(tmp_path / "saved", outputs=2, pooling="attention")
