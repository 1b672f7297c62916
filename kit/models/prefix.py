"""Texts that begin alike, scored together: what they share is computed once, in any decoder of transformers. Knows no task and no tokenizer.

A batch of trees: each row holds a trunk (what is shared) and after it its branches, which do not see each other. Three ways to run it, equal to
rounding: "tree", one pass under a mask in which a branch sees itself and the trunk and its positions go on from the trunk's (tree attention as
in SpecInfer, Miao et al. 2024); "cache", the trunk first and its keys and values repeated for each branch; "none", every branch with a trunk of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from kit.errors import ConfigError

ATTENTION = "kit_tree"
"""Name of the attention implementation a model must be loaded with: SDPA, with masks that know trees."""
Sharing = Literal["tree", "cache", "none"]

Batch = dict[str, Tensor]
_SAME = 0.1  # relative difference of states that rounding explains, in half precision too; where masks are wrong it is near 1


class _Places(NamedTuple):
    """Where queries (B, Q) and keys (B, K) stand in their texts, and which keys a query may see at all (B, Q, K).

    parts: of every row the columns of its trunk and branches, for one pass over trees. asked: how many masks were made of this.
    """

    queries: Tensor
    keys: Tensor
    related: Tensor
    parts: list[list[slice]] | None
    asked: list[bool]


class _Made(NamedTuple):
    """What is known of a mask: the parts of its rows, and whether it is plainly causal inside them."""

    parts: list[list[slice]]
    plain: bool


_PLACES: ContextVar[_Places | None] = ContextVar("places", default=None)
_MADE: MutableMapping[Tensor, _Made] = WeakIdKeyDictionary()  # by mask: activations may be computed again long after the forward


def hidden_states(decoder: nn.Module, batch: Batch, sharing: Sharing) -> Tensor:
    """Last hidden states (P, H) at the places batch["at"] (P,) asks for: row * T + column of the batch of trees.

    batch: input_ids, position_ids and branch (B, T): 0 in the trunk, k in branch k, -1 where padded. Raises ConfigError for a decoder whose masks
    are not made by transformers' mask interface.
    """
    if not (batch["branch"] > 0).any():
        sharing = "tree"  # nothing to share
    return {"tree": _in_one_pass, "cache": _after_a_cache, "none": _each_alone}[sharing](decoder, batch)


def _in_one_pass(decoder: nn.Module, batch: Batch) -> Tensor:
    branch, positions = batch["branch"], batch["position_ids"]
    if _is_plain(branch):  # as the library has it: padding on the right is seen by no token of a text
        there = torch.ones_like(branch)  # else transformers looks for padding, and warns of it
        plain: Tensor = decoder(input_ids=batch["input_ids"], attention_mask=there, use_cache=False)[0]
        return plain.flatten(0, 1)[batch["at"]]
    hidden = _run(decoder, batch["input_ids"], positions, branch, positions, branch, parts=_parts(branch))
    return hidden.flatten(0, 1)[batch["at"]]


def _is_plain(branch: Tensor) -> bool:
    """Whether rows are texts without branches, padded on the right."""
    return not bool((branch[:, 0] != 0).any() | (branch[:, 1:] > branch[:, :-1]).any())


def _parts(branch: Tensor) -> list[list[slice]]:
    """The columns of every row's trunk and branches, which follow each other without a gap."""
    parts = []
    for row in branch.cpu().numpy():
        begins = np.flatnonzero(np.diff(row, prepend=-1) * (row >= 0))
        ends = [*begins[1:], int(np.flatnonzero(row >= 0).max(initial=-1)) + 1]
        parts.append([slice(int(begin), int(end)) for begin, end in zip(begins, ends, strict=True)])
    return parts


def _after_a_cache(decoder: nn.Module, batch: Batch) -> Tensor:
    """The trunks, then all branches as a batch on copies of their keys and values."""
    trunk, branches = _trunks(batch), _branches(batch)
    cache = DynamicCache()
    places = _Rows.take(batch, trunk)
    first = _run(decoder, places.ids, places.positions, places.branch, places.positions, places.branch, cache)
    owner = branches.rows[:, 0]
    cache.batch_select_indices(owner)
    own = _Rows.take(batch, branches)
    keys = [torch.cat([before[owner], after], 1) for before, after in ((places.positions, own.positions), (places.branch, own.branch))]
    second = _run(decoder, own.ids, own.positions, own.branch, keys[0], keys[1], cache)
    hidden = torch.empty((*batch["branch"].shape, first.shape[-1]), dtype=first.dtype, device=first.device)
    for rows, states in ((trunk, first), (branches, second)):
        hidden[rows.rows[rows.real], rows.columns[rows.real]] = states[rows.real]
    return hidden.flatten(0, 1)[batch["at"]]


def _each_alone(decoder: nn.Module, batch: Batch) -> Tensor:
    """Every branch with its trunk as a row of its own."""
    whole = _branches(batch, with_trunk=True)
    own = _Rows.take(batch, whole)
    states = _run(decoder, own.ids, own.positions, own.branch, own.positions, own.branch)
    hidden = torch.empty((*batch["branch"].shape, states.shape[-1]), dtype=states.dtype, device=states.device)
    hidden[whole.rows[whole.real], whole.columns[whole.real]] = states[whole.real]
    return hidden.flatten(0, 1)[batch["at"]]


def check_sharing(decoder: nn.Module, batch: Batch) -> None:
    """Raise ConfigError where a text's states in a tree are not those it has alone, as in a family that adds to its scores by column (ALiBi).

    Tried on the first text that ends in the batch's first row with branches, in one pass of each kind, without gradients and dropout.
    """
    branched = (batch["branch"] > 0).any(1)
    if not branched.any():
        return
    row = int(branched.int().argmax())
    one = {name: batch[name][row : row + 1] for name in ("input_ids", "position_ids", "branch")}
    last = one["branch"].amax()
    mine = (one["branch"] == 0) | (one["branch"] == last)
    training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad():
            tree = hidden_states(decoder, {**one, "at": mine[0].nonzero()[:, 0]}, "tree").float()
            alone = decoder(input_ids=one["input_ids"][mine][None], use_cache=False)[0][0].float()
    finally:
        decoder.train(training)
    if not torch.linalg.norm(tree - alone) <= _SAME * torch.linalg.norm(alone):
        kind = type(decoder).__name__
        raise ConfigError(f"{kind} does not give texts the same states when they share a prefix: choose a model of another family")


class _Choice(NamedTuple):
    """Places of a batch of trees as new rows (R, L): their row and column there, and which are real."""

    rows: Tensor
    columns: Tensor
    real: Tensor


class _Rows(NamedTuple):
    """New rows (R, L), padded on the right."""

    ids: Tensor
    positions: Tensor
    branch: Tensor

    @classmethod
    def take(cls, batch: Batch, chosen: _Choice) -> _Rows:
        ids, positions, branch = (batch[name][chosen.rows, chosen.columns] for name in ("input_ids", "position_ids", "branch"))
        return cls(ids, positions * chosen.real, torch.where(chosen.real, branch, -1))


def _trunks(batch: Batch) -> _Choice:
    return _gather(batch["branch"] == 0, torch.arange(len(batch["branch"]), device=batch["branch"].device))


def _branches(batch: Batch, with_trunk: bool = False) -> _Choice:
    branch = batch["branch"]
    count = branch.amax(1)
    owner = torch.repeat_interleave(torch.arange(len(branch), device=branch.device), count)
    number = torch.cat([torch.arange(1, int(of_row) + 1, device=branch.device) for of_row in count])
    mine = branch[owner] == number[:, None]
    return _gather(mine | (branch[owner] == 0) if with_trunk else mine, owner)


def _gather(mine: Tensor, owner: Tensor) -> _Choice:
    """The places marked in mine (R, T), in their order, as rows (R, L) of what belongs to row `owner` (R,)."""
    counts = mine.sum(1)
    length = int(counts.max())
    columns = mine.int().argsort(dim=1, descending=True, stable=True)[:, :length]
    real = torch.arange(length, device=mine.device)[None, :] < counts[:, None]
    return _Choice(owner[:, None].expand_as(columns), columns, real)


def _run(decoder: nn.Module, ids: Tensor, positions: Tensor, branch: Tensor, key_positions: Tensor, key_branch: Tensor, cache: Any = None, parts: Any = None) -> Tensor:
    """Last hidden states (R, L, H)."""
    related = (key_branch[:, None, :] == 0) & (branch[:, :, None] >= 0) | (key_branch[:, None, :] == branch[:, :, None])
    with _places(_Places(positions, key_positions, related, parts, [])) as places:
        there = torch.ones_like(key_branch)  # else transformers reads positions that go back as packed sequences
        hidden: Tensor = decoder(input_ids=ids, attention_mask=there, position_ids=positions, past_key_values=cache, use_cache=cache is not None)[0]
    if not places.asked:
        kind = type(decoder).__name__
        raise ConfigError(f"{kind} makes its attention masks itself, so texts cannot share a prefix in it: choose a model of another family")
    return hidden


@contextmanager
def _places(places: _Places) -> Iterator[_Places]:
    token = _PLACES.set(places)
    try:
        yield places
    finally:
        _PLACES.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask (B, 1, Q, K), True where a query sees a key: its rule (causal, sliding window, chunks) asked about positions in the text.

    The rule is a function of indices, which elsewhere are columns.
    """
    places = _PLACES.get()
    if places is None:
        return sdpa_mask(*args, **kwargs)
    of_row = torch.arange(len(places.queries), device=places.queries.device)[:, None, None]
    seen = kwargs["mask_function"](of_row, 0, places.queries[:, :, None], places.keys[:, None, :])
    mask = (seen & places.related)[:, None]
    places.asked.append(True)
    if places.parts is not None:
        _MADE[mask] = _Made(places.parts, kwargs["mask_function"] is causal_mask_function)
    return mask


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """SDPA, in one pass over trees part by part. (B, heads, T, D) → (B, T, heads, D)."""
    if attention_mask is not None and (made := _MADE.get(attention_mask)):
        return _by_parts(made, module, query, key, value, attention_mask, **kwargs), None
    return _product(module, query, key, value, attention_mask, **kwargs), None


def _product(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """SDPA; by hand what it does not have: soft-capped scores (Gemma 2), and a score of each head for seeing nothing (gpt-oss). No mask: a plain text."""
    cap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if cap is None and sinks is None:
        attended: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return attended
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (kwargs.get("scaling") or query.shape[-1] ** -0.5)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if mask is None:
        mask = torch.ones_like(scores[0, 0], dtype=torch.bool).tril(scores.shape[3] - scores.shape[2])  # a single query sees all keys
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1).to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    weights = nn.functional.dropout(weights, kwargs.get("dropout", 0.0), module.training)
    return (weights @ value).transpose(1, 2).contiguous()


def _by_parts(made: _Made, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
    """Each trunk sees itself, each branch the trunk and itself: no products of branches with other branches, which the mask would only throw away."""
    outputs = []
    for row, parts in enumerate(made.parts):
        q, k, v, of_row = (tensor[row : row + 1] for tensor in (query, key, value, mask))
        trunk, states = parts[0], [q.new_zeros(1, parts[0].start, q.shape[1], v.shape[-1])]
        for part in parts:
            columns = [part] if part is trunk else [trunk, part]
            keys, values = (torch.cat([tensor[:, :, place] for place in columns], 2) for tensor in (k, v))
            seen = None if made.plain and part is trunk else torch.cat([of_row[:, :, part, place] for place in columns], 3)
            states.append(_product(module, q[:, :, part], keys, values, seen, **kwargs))
        states.append(q.new_zeros(1, q.shape[2] - parts[-1].stop, q.shape[1], v.shape[-1]))
        outputs.append(torch.cat(states, 1))
    return torch.cat(outputs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
