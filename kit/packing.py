"""The tokens of all rows on end, without padding, through a BERT-like or DeBERTa backbone by its own weights. Knows no task.

What a layer does token by token is done for all rows in one product; attention is done for rows of one length together. DeBERTa's terms of content
and position (He et al. 2021, https://arxiv.org/abs/2006.03654, equation 4) depend on the distance of two tokens alone: they are products with a
table by distance, read along its diagonals, so that nothing is gathered. On a GPU, where many small products cost more than padding, all rows of a
batch stay together with their padding, and only the gathers are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

Batch = dict[str, Tensor]
_BLOCK = 128  # tokens whose terms of position are made together: longer blocks multiply more that is not read
_CACHED = 2**19  # numbers of attention that are made together: they stay in a processor's cache


class Group(NamedTuple):
    """`rows` rows, each of `length` tokens. start: of the first among the tokens. mask: (rows, length) of tokens that are no padding; None: all are."""

    start: int
    rows: int
    length: int
    mask: Tensor | None

    @property
    def stop(self) -> int:
        """Behind the last of the tokens."""
        return self.start + self.rows * self.length


class Rows(NamedTuple):
    """The tokens (N,) that are computed: places of a batch (R, T), row by row, groups on end.

    places: (N,) in the flattened batch. positions: (N,) in their rows. first: (R,) where each row begins, groups on end; order: (R,) these rows' numbers.
    """

    places: Tensor
    positions: Tensor
    groups: list[Group]
    first: Tensor
    order: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(group.length for group in self.groups)


@dataclass(frozen=True)
class Layer:
    """The parts of a layer, whatever its family calls them. own: the module that holds them. attention: of it; its `dropout` is of probabilities."""

    attention: Any
    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    value: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    first_norm: Callable[[Tensor], Tensor]
    wide: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    narrow: Callable[[Tensor], Tensor]
    second_norm: Callable[[Tensor], Tensor]
    attention_dropout: float
    dropout: float


def is_packable(backbone: Any) -> bool:
    """Whether its family has a packed form: BERT, ELECTRA, RoBERTa, DistilBERT, and DeBERTa-v2 and -v3 with positions in buckets and no convolution."""
    config = backbone.config
    if config.model_type != "deberta-v2":
        return config.model_type in _BERTS and getattr(config, "position_embedding_type", "absolute") == "absolute"
    return bool(config.relative_attention) and backbone.encoder.conv is None and config.position_buckets > 0


def hidden_states(backbone: Any, batch: Batch, *, every: bool = False, first: bool = False, together: bool | None = None) -> tuple[Tensor, ...]:
    """What `backbone` says of a batch padded on the right: its last states (R, T, H), 0 where there is padding; `every`: the embeddings' and each layer's.

    first: of each row the first token's last state alone (R, 1, H). together: rows stay padded; default: on any device but a CPU.
    A backbone that is not packable is asked by the library's own code, whose states of padding are not 0.
    """
    if not is_packable(backbone):
        return _stock(backbone, batch, every, first)
    mask = batch["attention_mask"]
    rows = _rows(mask, mask.device.type != "cpu" if together is None else together)
    states = _embedded(backbone, batch, rows)
    forward = (_Deberta if backbone.config.model_type == "deberta-v2" else _Bert)(backbone, rows)
    layers = list(_LAYERS[backbone.config.model_type](backbone))
    found = [states]
    for number, layer in enumerate(layers):
        asked = rows.first if first and number == len(layers) - 1 else None
        states = forward(layer, states, asked)
        found.append(states)
    if first:
        return (torch.empty_like(states).index_copy(0, rows.order, states)[:, None],)
    return tuple(_padded(states, rows, mask) for states in (found if every else found[-1:]))


def _stock(backbone: Any, batch: Batch, every: bool, first: bool) -> tuple[Tensor, ...]:
    types = {"token_type_ids": batch["token_type_ids"]} if _takes_types(backbone) else {}
    asked = {"output_hidden_states": True} if every else {}
    found = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **types, **asked)
    last = found.last_hidden_state[:, :1] if first else found.last_hidden_state
    return (*(found.hidden_states[:-1] if every else ()), last)  # some families normalise the last one only there


def _takes_types(backbone: Any) -> bool:
    return getattr(backbone.config, "type_vocab_size", 0) > 1


def _rows(mask: Tensor, together: bool) -> Rows:
    height, width = mask.shape
    number = torch.arange(height, device=mask.device)
    if together:
        places = torch.arange(mask.numel(), device=mask.device)
        return Rows(places, places % width, [Group(0, height, width, mask.bool())], number * width, number)
    lengths = mask.sum(1)
    lengths, order = lengths.sort(descending=True, stable=True)
    groups: list[Group] = []
    for length, count in zip(*(part.tolist() for part in torch.unique_consecutive(lengths, return_counts=True)), strict=True):
        groups.append(Group(groups[-1].stop if groups else 0, count, length, None))
    first = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum()), device=mask.device) - first.repeat_interleave(lengths)
    return Rows((order * width).repeat_interleave(lengths) + positions, positions, groups, first, order)


def _padded(states: Tensor, rows: Rows, mask: Tensor) -> Tensor:
    """(N, H) → (R, T, H), 0 where there is padding."""
    if rows.groups[0].mask is not None:
        return states.view(*mask.shape, -1) * mask.unsqueeze(-1).to(states.dtype)
    return states.new_zeros(mask.numel(), states.shape[-1]).index_copy(0, rows.places, states).view(*mask.shape, -1)


def _embedded(backbone: Any, batch: Batch, rows: Rows) -> Tensor:
    """(N, H) by the backbone's own embeddings, which take the tokens for one row."""
    config = backbone.config
    positions = rows.positions
    if config.model_type in _AFTER_PADDING:
        positions = positions + config.pad_token_id + 1
    given = {"input_ids": batch["input_ids"].flatten()[rows.places][None], "position_ids": positions[None]}
    if getattr(config, "type_vocab_size", 0):
        given["token_type_ids"] = (batch["token_type_ids"].flatten()[rows.places] if _takes_types(backbone) else torch.zeros_like(rows.places))[None]
    states = backbone.embeddings(**given)
    if hasattr(backbone, "embeddings_project"):  # ELECTRA's embeddings are smaller than its layers
        states = backbone.embeddings_project(states)
    return states[0]


class _Bert:
    """Layers with attention by content alone."""

    def __init__(self, backbone: Any, rows: Rows) -> None:
        self.rows = rows
        self.heads = backbone.config.num_attention_heads
        self.training = backbone.training
        self.recomputes = backbone.training and any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())

    def __call__(self, layer: Layer, states: Tensor, asked: Tensor | None) -> Tensor:
        """(N, H) → (N, H), or (R, H) of the tokens `asked` for."""
        if self.recomputes:
            return checkpoint(self._layer, layer, states, asked, use_reentrant=False)
        return self._layer(layer, states, asked)

    def _layer(self, layer: Layer, states: Tensor, asked: Tensor | None) -> Tensor:
        queries = states if asked is None else states[asked]
        attended = layer.out(self._attention(layer, queries, states, asked is not None))
        states = layer.first_norm(self._dropped(attended, layer) + queries)
        wide = layer.narrow(layer.activation(layer.wide(states)))
        return layer.second_norm(self._dropped(wide, layer) + states)

    def _dropped(self, states: Tensor, layer: Layer) -> Tensor:
        return F.dropout(states, layer.dropout, self.training) if self.training else states

    def _attention(self, layer: Layer, asking: Tensor, states: Tensor, only_first: bool) -> Tensor:
        """What the tokens that ask, all or the rows' first, get from their rows: (N, H) or (R, H)."""
        query, key, value = layer.query(asking), layer.key(states), layer.value(states)
        found, rows = [], 0
        for group in self.rows.groups:
            own = slice(group.start, group.stop)
            asked = slice(rows, rows + group.rows) if only_first else own
            q, k, v = (one.view(group.rows, -1, self.heads, one.shape[-1] // self.heads) for one in (query[asked], key[own], value[own]))
            found.append(self._product(layer, group, q, k, v))
            rows += group.rows
        return torch.cat(found)

    def _product(self, layer: Layer, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (n, 1 or L, heads, d), k and v (n, L, heads, d) → (n · 1 or L, H)."""
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        mask = None if group.mask is None else group.mask[:, None, None]
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=layer.attention_dropout if self.training else 0.0)
        return found.transpose(1, 2).flatten(0, 1).flatten(1)


class _Deberta(_Bert):
    """Layers with attention by content and by distance."""

    def __init__(self, backbone: Any, rows: Rows) -> None:
        super().__init__(backbone, rows)
        encoder, kinds = backbone.encoder, set(backbone.config.pos_att_type or ())
        self.c2p, self.p2c = "c2p" in kinds, "p2c" in kinds
        self.scale = 1 / math.sqrt(encoder.layer[0].attention.self.attention_head_size * (1 + self.c2p + self.p2c))
        span = encoder.position_buckets
        self.table = encoder.get_rel_embedding()[: 2 * span]
        distance = torch.arange(1 - rows.longest, rows.longest, device=self.table.device)  # query less key
        self.bucket = (make_log_bucket_position(distance, span, encoder.max_relative_positions).long() + span).clamp(0, 2 * span - 1)
        self.keys = self.queries = self.table  # of the layer under way, by distance: (heads, 2 longest - 1, d)

    def _attention(self, layer: Layer, asking: Tensor, states: Tensor, only_first: bool) -> Tensor:
        own = layer.attention
        table = own.pos_dropout(self.table)
        if self.c2p:  # by key less query, as its rows are queries
            self.keys = self._by_distance((own.key_proj if own.share_att_key else own.pos_key_proj)(table), self.bucket.flip(0))
        if self.p2c:  # by query less key, as its rows are keys
            self.queries = self._by_distance((own.query_proj if own.share_att_key else own.pos_query_proj)(table) * self.scale, self.bucket)
        return super()._attention(layer, asking, states, only_first)

    def _by_distance(self, projected: Tensor, bucket: Tensor) -> Tensor:
        """Rows of a table (2 span, H) by bucket: (heads, 2 longest - 1, d)."""
        return projected.view(len(projected), self.heads, -1).transpose(0, 1)[:, bucket]

    def _product(self, layer: Layer, group: Group, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (one.permute(2, 0, 1, 3) for one in (q * self.scale, k, v))  # (heads, n, …, d)
        at_once = torch.is_grad_enabled() or group.mask is not None
        square = group.length**2
        heads = self.heads if at_once else max(1, min(self.heads, _CACHED // square))
        rows = group.rows if at_once else max(1, _CACHED // (self.heads * square))
        parts = [
            torch.cat([self._part(layer, group, slice(row, row + rows), slice(head, head + heads), q, k, v) for head in range(0, self.heads, heads)])
            for row in range(0, group.rows, rows)
        ]
        return torch.cat(parts, 1).permute(1, 2, 0, 3).flatten(0, 1).flatten(1)

    def _part(self, layer: Layer, group: Group, rows: slice, heads: slice, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Some rows and heads of (heads, n, …, d)."""
        q, k, v = (one[heads, rows] for one in (q, k, v))
        bias = self._bias(q, k, heads)
        if group.mask is not None:
            bias = bias.masked_fill(~group.mask[None, rows, None], torch.finfo(bias.dtype).min)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=layer.attention_dropout if self.training else 0.0, scale=1.0)

    def _bias(self, q: Tensor, k: Tensor, heads: slice) -> Tensor:
        """What distance adds to the products of queries (h, n, 1 or L, d) and keys (h, n, L, d)."""
        length, zero = k.shape[2], self.rows.longest - 1  # place of distance 0
        terms = []
        if q.shape[2] < length:  # of the first tokens alone
            if self.c2p:
                terms.append(q @ self.keys[heads, None, zero : zero + length].transpose(2, 3))
            if self.p2c:
                terms.append((k * self.queries[heads, None, zero - length + 1 : zero + 1].flip(2)).sum(3).unsqueeze(2))
        else:
            if self.c2p:
                terms.append(_ByDistance.apply(q, self.keys[heads]))
            if self.p2c:
                terms.append(_ByDistance.apply(k, self.queries[heads]).transpose(2, 3))
        return sum(terms[1:], terms[0]) if terms else q.new_zeros((1, 1, q.shape[2], length))


class _ByDistance(torch.autograd.Function):
    """(h, n, L, d) and a table (h, D, d) by distance, 0 in its middle → (h, n, L, L): in row i and column j states[i] · table[j - i].

    A block of rows is multiplied with the distances that it meets; the products wanted stand on the diagonals, which a view reads as rows.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor) -> Tensor:
        """Block by block."""
        ctx.save_for_backward(states, table)
        found: Tensor | None = None
        for rows, distances in _blocks(states, table):
            products = states[:, :, rows].flatten(1, 2) @ table[:, distances].transpose(1, 2)  # (h, n · rows, distances)
            found = products.new_empty((*states.shape[:3], states.shape[2])) if found is None else found
            found[:, :, rows] = _diagonals(products, states, rows)
        assert found is not None, "rows have at least one token"
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The same products the other way."""
        states, table = ctx.saved_tensors
        of_states, of_table = torch.empty_like(states), torch.zeros_like(table)
        for rows, distances in _blocks(states, table):
            own = states[:, :, rows].flatten(1, 2)
            products = own.new_zeros((*own.shape[:2], distances.stop - distances.start))
            _diagonals(products, states, rows).copy_(gradient[:, :, rows])
            of_states[:, :, rows] = (products @ table[:, distances]).view_as(states[:, :, rows])
            of_table[:, distances] += products.transpose(1, 2) @ own
        return of_states, of_table


def _blocks(states: Tensor, table: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows, and the distances that they meet: from the first column less the last row to the last column less the first row."""
    length, zero = states.shape[2], table.shape[1] // 2
    for start in range(0, length, _BLOCK):
        stop = min(start + _BLOCK, length)
        yield slice(start, stop), slice(zero - stop + 1, zero + length - start)


def _diagonals(products: Tensor, states: Tensor, rows: slice) -> Tensor:
    """(h, n · rows, distances) → a view (h, n, rows, L) whose rows begin where the distance is that of the first column."""
    (heads, number, length), wide, high = states.shape[:3], products.shape[2], rows.stop - rows.start
    strides = (number * high * wide, high * wide, wide - 1, 1)
    return products.as_strided((heads, number, high, length), strides, high - 1)


def _bert_layers(backbone: Any) -> Iterator[Layer]:
    for layer in backbone.encoder.layer:
        own = layer.attention.self
        yield _layer(layer, own, own.query, own.key, own.value)


def _deberta_layers(backbone: Any) -> Iterator[Layer]:
    for layer in backbone.encoder.layer:
        own = layer.attention.self
        yield _layer(layer, own, own.query_proj, own.key_proj, own.value_proj)


def _layer(layer: Any, own: Any, query: Any, key: Any, value: Any) -> Layer:
    attended, wide, narrow = layer.attention.output, layer.intermediate, layer.output
    return Layer(
        own, query, key, value, attended.dense, attended.LayerNorm, wide.dense, wide.intermediate_act_fn, narrow.dense, narrow.LayerNorm,
        own.dropout.p, narrow.dropout.p,
    )  # fmt: skip


def _distilbert_layers(backbone: Any) -> Iterator[Layer]:
    for layer in backbone.transformer.layer:
        own, wide = layer.attention, layer.ffn
        yield Layer(
            own, own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm, wide.lin1, wide.activation, wide.lin2, layer.output_layer_norm,
            own.dropout.p if isinstance(own.dropout, nn.Dropout) else own.dropout, wide.dropout.p,
        )  # fmt: skip


_AFTER_PADDING = ("roberta", "xlm-roberta", "camembert")  # families whose positions begin behind the padding's id
_BERTS = dict.fromkeys(("bert", "electra", *_AFTER_PADDING), _bert_layers) | {"distilbert": _distilbert_layers}
_LAYERS: dict[str, Callable[[Any], Iterator[Layer]]] = _BERTS | {"deberta-v2": _deberta_layers}
