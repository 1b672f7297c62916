"""Every pooling against a loop over single sequences in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kit.models.pooling import POOLINGS

HIDDEN = 8
SHAPES = [(5, 3), (0, 4), (6, 0), (1, 1), (0, 0), (12, 9)]  # tokens of text and pair in each sequence of a ragged batch


def batch_of(shapes: list[tuple[int, int]], *, padding: int = 0, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states with noise at the padding, and the batch: [special] text [special] pair [special] padding."""
    lengths = [n + m + 3 for n, m in shapes]
    width = max(lengths) + padding
    rng = np.random.default_rng(seed)
    hidden = torch.from_numpy(rng.normal(0, 5, (len(shapes), width, HIDDEN)).astype(np.float32))
    for row, length in enumerate(lengths):
        values = np.random.default_rng([seed, row]).normal(size=(length, HIDDEN))  # the same whatever the padding
        hidden[row, :length] = torch.from_numpy(values.astype(np.float32))
    segment = torch.full((len(shapes), width), -1, dtype=torch.int8)
    for row, (n, m) in enumerate(shapes):
        segment[row, 1 : 1 + n] = 0
        segment[row, 2 + n : 2 + n + m] = 1
    mask = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
    return hidden, {"attention_mask": mask.long(), "segment": segment}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    pool = POOLINGS[name](HIDDEN)
    for parameter in pool.parameters():
        nn.init.normal_(parameter)  # a weighting that begins even would not show which weights are used
    return pool


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def match(states: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    text, pair = states[segment == 0], states[segment == 1]
    if not len(text) or not len(pair):
        return np.zeros(2 * HIDDEN + 1)
    u, v = unit(text.mean(0)), unit(pair.mean(0))
    best = np.array([max(float(unit(word) @ unit(other)) for other in text) for word in pair])
    share = np.exp(pair @ pool.score.weight.detach().double().numpy()[0] + float(pool.score.bias.detach()))
    return np.concatenate([[best @ (share / share.sum())], u * v, abs(u - v)])


def attention(states: np.ndarray, segment: np.ndarray, pool: nn.Module) -> np.ndarray:
    weight, bias = pool.score.weight.detach().double().numpy()[0], float(pool.score.bias.detach())
    share = np.exp(states @ weight + bias)
    return (states * (share / share.sum())[:, None]).sum(0)


LOOPS: dict[str, Callable[[np.ndarray, np.ndarray, nn.Module], np.ndarray]] = {
    "mean": lambda states, segment, pool: states.mean(0),
    "cls": lambda states, segment, pool: states[0],
    "max": lambda states, segment, pool: states.max(0),
    "attention": attention,
    "match": match,
}


def by_loop(name: str, pool: nn.Module, hidden: Tensor, batch: dict[str, Tensor]) -> np.ndarray:
    rows = []
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        rows.append(LOOPS[name](hidden[row, :length].double().numpy(), batch["segment"][row, :length].numpy(), pool))
    return np.stack(rows)


@pytest.fixture(params=sorted(POOLINGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_pooling_has_a_loop_to_compare_with() -> None:
    assert sorted(LOOPS) == sorted(POOLINGS), "add the new pooling's definition as a loop to LOOPS"


@pytest.mark.parametrize("seed", range(3))
def test_pooling_equals_the_loop_on_a_ragged_batch(name: str, seed: int) -> None:
    pool = made(name)
    hidden, batch = batch_of(SHAPES, padding=2, seed=seed)
    pooled = pool(hidden, batch)
    assert pooled.shape == (len(SHAPES), pool.width)
    np.testing.assert_allclose(pooled.detach().double().numpy(), by_loop(name, pool, hidden, batch), atol=1e-6, rtol=1e-5)


def test_padding_and_neighbours_never_change_the_result(name: str) -> None:
    pool = made(name)
    together = pool(*batch_of(SHAPES))
    torch.testing.assert_close(pool(*batch_of(SHAPES, padding=17)), together, atol=1e-6, rtol=1e-5)
    hidden, batch = batch_of(SHAPES)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = pool(hidden[row : row + 1, :length], {key: tensor[row : row + 1, :length] for key, tensor in batch.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_pooled_closely(name: str, dtype: torch.dtype) -> None:
    pool = made(name)
    hidden, batch = batch_of(SHAPES, padding=3)
    expected = by_loop(name, pool, hidden.to(dtype), batch)
    pooled = pool.to(dtype)(hidden.to(dtype), batch)
    assert torch.isfinite(pooled).all()
    np.testing.assert_allclose(pooled.detach().double().numpy(), expected, atol=0.05)


def test_gradients_are_finite_and_none_reaches_the_padding(name: str) -> None:
    pool = made(name)
    hidden, batch = batch_of(SHAPES, padding=2)
    hidden.requires_grad_()
    pool(hidden, batch).square().sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
    assert hidden.grad[batch["attention_mask"] == 0].abs().max() == 0
    assert hidden.grad.abs().sum() > 0


def test_match_gives_zeros_without_text_or_pair() -> None:
    pooled = made("match")(*batch_of([(0, 4), (0, 0), (4, 0), (2, 2)]))
    assert pooled[:3].abs().max() == 0
    assert pooled[3].abs().max() > 0
    assert torch.isfinite(pooled).all()


def test_match_is_one_where_the_pair_repeats_the_text() -> None:
    hidden, batch = batch_of([(3, 3)])
    hidden[0, 5:8] = hidden[0, 1:4]
    pooled = made("match")(hidden, batch)[0]
    torch.testing.assert_close(pooled[0], torch.tensor(1.0))
    torch.testing.assert_close(pooled[1 : HIDDEN + 1].sum(), torch.tensor(1.0))
    torch.testing.assert_close(pooled[HIDDEN + 1 :], torch.zeros(HIDDEN), atol=1e-6, rtol=0)


def test_match_starts_the_head_at_the_coverage() -> None:
    pool = made("match")
    head = nn.Linear(pool.width, 2)
    pool.init_head(head)
    pooled = pool(*batch_of(SHAPES))
    torch.testing.assert_close(head(pooled), 20 * pooled[:, :1].expand(-1, 2))
