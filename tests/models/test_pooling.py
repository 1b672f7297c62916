"""Every pooling against a loop over single sequences in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.errors import ConfigError
from kit.models.pooling import POOLINGS

HIDDEN, LAYERS = 8, 5
SHAPES = [(5, 3), (0, 4), (6, 0), (1, 1), (0, 0), (12, 9)]  # tokens of text and pair in each sequence of a ragged batch


def batch_of(shapes: list[tuple[int, int]], *, padding: int = 0, seed: int = 0) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Hidden states of the embeddings and all layers, with noise at the padding, and the batch: [special] text [special] pair [special] padding."""
    states, batches = zip(*(_layer_of(shapes, padding, [seed, layer]) for layer in range(1 + LAYERS)), strict=True)
    return states, batches[0]


def _layer_of(shapes: list[tuple[int, int]], padding: int, seed: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    lengths = [n + m + 3 for n, m in shapes]
    width = max(lengths) + padding
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(0, 5, (len(shapes), width, HIDDEN)).astype(np.float32))
    for row, length in enumerate(lengths):
        values = np.random.default_rng([*seed, row]).normal(size=(length, HIDDEN))  # the same whatever the padding
        hidden[row, :length] = torch.from_numpy(values.astype(np.float32))
    segment = torch.full((len(shapes), width), -1, dtype=torch.int8)
    for row, (n, m) in enumerate(shapes):
        segment[row, 1 : 1 + n] = 0
        segment[row, 2 + n : 2 + n + m] = 1
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    return hidden, {"attention_mask": mask.long(), "segment": segment}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    pool = POOLINGS[name](HIDDEN, LAYERS)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)  # a weighting that begins even would not show which weights are used
    return pool


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def match(layers: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    states = layers[-1]
    text, pair = states[segment == 0], states[segment == 1]
    if not len(text) or not len(pair):
        return np.zeros(2 * HIDDEN + 1)
    u, v = unit(text.mean(0)), unit(pair.mean(0))
    best = np.array([max(float(unit(word) @ unit(other)) for other in text) for word in pair])
    share = np.exp(pair @ pool.score.weight.detach().double().numpy()[0] + float(pool.score.bias.detach()))
    return np.concatenate([[best @ (share / share.sum())], u * v, abs(u - v)])


def attention(layers: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    states = layers[-1]
    weight, bias = pool.score.weight.detach().double().numpy()[0], float(pool.score.bias.detach())
    share = np.exp(states @ weight + bias)
    return (states * (share / share.sum())[:, None]).sum(0)


def gem(layers: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    p = float(pool.log_p.detach().double().exp())
    return np.array([(sum(max(value, 1e-6) ** p for value in column) / len(column)) ** (1 / p) for column in layers[-1].T])


def weighted(layers: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    share = np.exp(pool.score.detach().double().numpy())
    return sum(weight * states.mean(0) for weight, states in zip(share / share.sum(), layers, strict=True))


def lstm(layers: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    """The equations of Hochreiter & Schmidhuber with a forget gate, gates in torch's order: in, forget, new, out."""
    inward, onward, bias, more = (parameter.detach().double().numpy() for parameter in pool.reader.parameters())
    said = cell = np.zeros(HIDDEN)
    for states in layers[1:]:
        gates = inward @ states.mean(0) + onward @ said + bias + more
        i, f, new, out = np.split(gates, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(new)
        said = sigmoid(out) * np.tanh(cell)
    return said


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


LOOPS: dict[str, Callable[[np.ndarray, np.ndarray, nn.Module], np.ndarray]] = {
    "mean": lambda layers, segment, pool: layers[-1].mean(0),
    "cls": lambda layers, segment, pool: layers[-1][0],
    "max": lambda layers, segment, pool: layers[-1].max(0),
    "min": lambda layers, segment, pool: layers[-1].min(0),
    "gem": gem,
    "attention": attention,
    "weighted": weighted,
    "last4": lambda layers, segment, pool: np.concatenate([layers[index].mean(0) for index in (-4, -3, -2, -1)]),
    "lstm": lstm,
    "match": match,
}
"""Each pooling's definition for the states (1 + LAYERS, T, HIDDEN) of one sequence without padding."""


def by_loop(name: str, pool: nn.Module, states: tuple[Tensor, ...], batch: dict[str, Tensor]) -> np.ndarray:
    rows = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        layers = np.stack([hidden[row, :length].double().numpy() for hidden in states])
        rows.append(LOOPS[name](layers, batch["segment"][row, :length].numpy(), pool))
    return np.stack(rows)


@pytest.fixture(params=sorted(POOLINGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_pooling_has_a_loop_to_compare_with() -> None:
    assert sorted(LOOPS) == sorted(POOLINGS), "add the new pooling's definition as a loop to LOOPS"


@pytest.mark.parametrize("seed", range(3))
def test_pooling_equals_the_loop_on_a_ragged_batch(name: str, seed: int) -> None:
    pool = made(name)
    states, batch = batch_of(SHAPES, padding=2, seed=seed)
    pooled = pool(states, batch)
    assert pooled.shape == (len(SHAPES), pool.width)
    np.testing.assert_allclose(pooled.detach().double().numpy(), by_loop(name, pool, states, batch), atol=1e-6, rtol=1e-5)


def test_one_that_does_not_need_the_layers_may_be_given_the_last_state_alone(name: str) -> None:
    pool = made(name)
    states, batch = batch_of(SHAPES)
    if pool.needs_layers:
        others = (*(hidden + 1 for hidden in states[:-1]), states[-1])
        assert not torch.allclose(pool(states, batch), pool(others, batch))
    else:
        assert torch.equal(pool(states, batch), pool(states[-1:], batch))


def test_padding_and_neighbours_never_change_the_result(name: str) -> None:
    pool = made(name)
    together = pool(*batch_of(SHAPES))
    torch.testing.assert_close(pool(*batch_of(SHAPES, padding=17)), together, atol=1e-6, rtol=1e-5)
    states, batch = batch_of(SHAPES)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        own = {key: tensor[row : row + 1, :length] for key, tensor in batch.items()}
        alone = pool(tuple(hidden[row : row + 1, :length] for hidden in states), own)
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_pooled_closely(name: str, dtype: torch.dtype) -> None:
    pool = made(name)
    states, batch = batch_of(SHAPES, padding=3)
    half = tuple(hidden.to(dtype) for hidden in states)
    expected = by_loop(name, pool, half, batch)
    pooled = pool.to(dtype)(half, batch)
    assert torch.isfinite(pooled).all()
    np.testing.assert_allclose(pooled.detach().double().numpy(), expected, atol=0.05)


def test_gradients_are_finite_and_none_reaches_the_padding(name: str) -> None:
    pool = made(name)
    states, batch = batch_of(SHAPES, padding=2)
    read = [hidden.requires_grad_() for hidden in states]
    pool(states, batch).square().sum().backward()
    gradients = [hidden.grad for hidden in read if hidden.grad is not None]
    assert len(gradients) == {"weighted": 1 + LAYERS, "lstm": LAYERS, "last4": 4}.get(name, 1)
    for gradient in gradients:
        assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
        assert gradient[batch["attention_mask"] == 0].abs().max() == 0
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in pool.parameters())


def test_match_gives_zeros_without_text_or_pair() -> None:
    pooled = made("match")(*batch_of([(0, 4), (0, 0), (4, 0), (2, 2)]))
    assert pooled[:3].abs().max() == 0
    assert pooled[3].abs().max() > 0
    assert torch.isfinite(pooled).all()


def test_match_is_one_where_the_pair_repeats_the_text() -> None:
    states, batch = batch_of([(3, 3)])
    states[-1][0, 5:8] = states[-1][0, 1:4]
    pooled = made("match")(states, batch)[0]
    torch.testing.assert_close(pooled[0], torch.tensor(1.0))
    torch.testing.assert_close(pooled[1 : HIDDEN + 1].sum(), torch.tensor(1.0))
    torch.testing.assert_close(pooled[HIDDEN + 1 :], torch.zeros(HIDDEN), atol=1e-6, rtol=0)


def test_match_starts_the_head_at_the_coverage() -> None:
    pool = made("match")
    head = nn.Linear(pool.width, 2)
    pool.init_head(head)
    pooled = pool(*batch_of(SHAPES))
    torch.testing.assert_close(head(pooled), 20 * pooled[:, :1].expand(-1, 2))


def test_a_new_weighting_of_the_layers_is_even_and_a_new_power_is_three() -> None:
    states, batch = batch_of(SHAPES)
    even = torch.stack([POOLINGS["mean"](HIDDEN, LAYERS)([hidden], batch) for hidden in states]).mean(0)
    torch.testing.assert_close(POOLINGS["weighted"](HIDDEN, LAYERS)(states, batch), even)
    cubes = POOLINGS["mean"](HIDDEN, LAYERS)([states[-1].clamp(min=1e-6) ** 3], batch) ** (1 / 3)
    torch.testing.assert_close(POOLINGS["gem"](HIDDEN, LAYERS)(states, batch), cubes)


def test_a_power_so_high_that_it_would_underflow_gives_the_largest_value() -> None:
    pool = POOLINGS["gem"](HIDDEN, LAYERS)
    nn.init.constant_(pool.log_p, 8.0)  # p = 2981
    states, batch = batch_of(SHAPES)
    small = [states[-1].abs() / 1000]
    pooled = pool(small, batch)
    torch.testing.assert_close(pooled, POOLINGS["max"](HIDDEN, LAYERS)(small, batch), rtol=2e-3, atol=0)
    pooled.sum().backward()
    assert torch.isfinite(pool.log_p.grad)


def test_last4_refuses_a_model_of_three_layers() -> None:
    with pytest.raises(ConfigError, match='model.pooling = "last4" needs 4 layers, and the model has 3: choose "weighted"'):
        POOLINGS["last4"](HIDDEN, 3)
