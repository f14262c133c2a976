"""Keys and values of earlier tokens, kept for decoding.

A layer keeps those of the tokens that it processed: with mixture-of-depths, a skipped token leaves
nothing. So each layer with mixture-of-depths counts its own positions; all others share one count.

Shapes: see `layers.py`; B sequences, S new tokens of each, T positions, U positions in use, G heads
of keys and values, R = B sequences of K selected tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from moma.model.architecture import ModelConfig

# Positions that a new cache has for each sequence; it grows by doubling.
FIRST_CAPACITY = 64
# Passes after which a GPU is waited for once, so that bounds of lengths stay close to them.
_EXACT_EVERY = 64


class NewPositions(NamedTuple):
    """Positions that new tokens take, and which positions they attend to.

    Attributes:
        position_BS: each token's position in the cache; −1 for padding, which takes none. None:
            there is no padding, and the tokens take the last of the positions in use.
        used: number of positions U that any token attends to.
        mask_B1SU: 0 where a token attends to a position and −∞ elsewhere; None: it attends to all,
            or to those before it if `is_causal`.
        is_causal: see `mask_B1SU`.
    """

    position_BS: Tensor | None
    used: int
    mask_B1SU: Tensor | None
    is_causal: bool


class CacheLengths:
    """Number of positions that each of B sequences has filled.

    Args:
        waits: whether the device may be waited for in every pass.
    """

    def __init__(self, sequences: int, device: torch.device, waits: bool):
        self.length_B = torch.zeros(sequences, dtype=torch.int64, device=device)
        self._waits, self._passes = waits, 0
        # Upper bounds of the lengths, known without waiting for the device.
        self._bounds = [0] * sequences
        self._taken: tuple[Tensor, Tensor, Tensor, list[int]] | None = None

    def take(self, offset_BS: Tensor, filled_BS: Tensor, dtype: torch.dtype) -> NewPositions:
        """Give new tokens the next positions.

        Args:
            offset_BS: index of each token among the sequence's new ones, from 0.
            filled_BS: false for padding, which follows all tokens of its sequence.
        """
        before_B, size, before = self.length_B, filled_BS.shape[1], self._bounds
        self._taken = before_B, offset_BS, filled_BS, before
        if not size:
            return NewPositions(offset_BS, 0, None, False)
        self.length_B = before_B + filled_BS.sum(1)
        self._count(size)
        used = max(self._bounds)
        if self._waits and set(before) == {used - size} and set(self._bounds) == {used}:
            # All sequences are equally long; without earlier tokens, attention is causal.
            mask_B1SU = None
            if size not in (1, used):
                mask_B1SU = mask_after(positions_after(before_B, size), used, dtype)
            return NewPositions(None, used, mask_B1SU, size == used > 1)
        position_BS = positions_after(before_B, size)
        return NewPositions(
            position_BS.where(filled_BS, -1), used, mask_after(position_BS, used, dtype), False
        )

    @property
    def bound(self) -> int:
        """An upper bound of all lengths."""
        return max(self._bounds, default=0)

    def replayed(self, size: int) -> None:
        """Note that a replayed pass took positions for at most `size` tokens of each sequence.

        They cannot be taken back.
        """
        self._taken = None
        self._count(size)

    def _count(self, size: int) -> None:
        self._passes += 1
        if self._waits or self._passes % _EXACT_EVERY == 0:
            self._bounds = self.length_B.tolist()
        else:
            self._bounds = [bound + size for bound in self._bounds]

    def keep(self, tokens: Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence of the last forward pass."""
        assert self._taken is not None
        before_B, offset_BS, filled_BS, bounds = self._taken
        tokens_B1 = torch.tensor(tokens, device=before_B.device)[:, None]
        self.length_B = before_B + (filled_BS & (offset_BS < tokens_B1)).sum(1)
        if self._waits:
            self._bounds = self.length_B.tolist()
            return
        pairs = zip(bounds, tokens, self._bounds, strict=True)
        self._bounds = [min(before + kept, after) for before, kept, after in pairs]

    def select(self, index: Sequence[int], index_B: Tensor) -> None:
        """Keep only the sequences with the given indices, in their order."""
        self.length_B, self._taken = self.length_B[index_B], None
        self._bounds = [self._bounds[number] for number in index]

    def extend(self, other: "CacheLengths") -> None:
        """Append the sequences of another object."""
        self.length_B, self._taken = torch.cat((self.length_B, other.length_B)), None
        self._bounds = self._bounds + other._bounds


def positions_after(before_B: Tensor, size: int) -> Tensor:
    """The positions of `size` tokens after those before, [B, S]."""
    return before_B[:, None] + torch.arange(size, device=before_B.device)


def mask_after(position_BS: Tensor, used: int, dtype: torch.dtype) -> Tensor:
    """0 for positions up to a token's own and −∞ for later ones, [B, 1, S, U]."""
    attends_BSU = torch.arange(used, device=position_BS.device) <= position_BS[..., None]
    zeros_BSU = torch.zeros_like(attends_BSU, dtype=dtype)
    return zeros_BSU.masked_fill_(~attends_BSU, -torch.inf)[:, None]


class LayerCache:
    """Keys and values of one layer, [B, T, G, C] each, with T growing as needed."""

    def __init__(self, lengths: CacheLengths):
        self.lengths = lengths
        self.key_BTGC = self.value_BTGC = lengths.length_B.new_empty(len(lengths.length_B), 0, 0, 0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: NewPositions) -> Tensor:
        """Store new keys and values and attend to all positions that `positions` allows.

        Args:
            query: [B, S, H, C].
            key, value: [B, S, G, C].
            positions: from `CacheLengths.take`.
        """
        self._store(key, value, positions)
        keys, values = (
            cache[:, : positions.used].transpose(1, 2) for cache in (self.key_BTGC, self.value_BTGC)
        )
        sequences, size, heads, width = query.shape
        kv_heads = key.shape[2]
        if size == 1:
            # The queries that share a key head are like several tokens.
            query_BGRC = query.view(sequences, kv_heads, heads // kv_heads, width)
            y_BGRC = functional.scaled_dot_product_attention(
                query_BGRC, keys, values, positions.mask_B1SU
            )
            return y_BGRC.reshape(query.shape)
        if kv_heads < heads:
            # With a mask, enable_gqa would fall back to a slower kernel.
            keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
        return functional.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, positions.mask_B1SU, is_causal=positions.is_causal
        ).transpose(1, 2)

    def _store(self, key: Tensor, value: Tensor, positions: NewPositions) -> None:
        # The last position takes what padding leaves.
        if positions.used >= self.key_BTGC.shape[1]:
            self._grow(max(FIRST_CAPACITY, 2 * positions.used), key)
        position_BS = positions.position_BS
        if position_BS is None:
            first, size = positions.used - key.shape[1], key.shape[1]
            self.key_BTGC.narrow(1, first, size).copy_(key)
            self.value_BTGC.narrow(1, first, size).copy_(value)
            return
        position_BS = position_BS.where(position_BS >= 0, self.key_BTGC.shape[1] - 1)
        sequence_B1 = torch.arange(len(position_BS), device=position_BS.device)[:, None]
        for cache, new in ((self.key_BTGC, key), (self.value_BTGC, value)):
            cache.index_put_((sequence_B1, position_BS), new)

    def _grow(self, capacity: int, like: Tensor) -> None:
        """Grow to T = `capacity`; a cache without positions becomes like [·, ·, G, C]."""
        old = self.key_BTGC, self.value_BTGC
        # Zeros, since masked positions still take part in products.
        self.key_BTGC, self.value_BTGC = (
            like.new_zeros(len(each), capacity, *like.shape[2:]) for each in old
        )
        if filled := old[0].shape[1]:
            self.key_BTGC[:, :filled], self.value_BTGC[:, :filled] = old

    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences with the given indices, in their order."""
        self.key_BTGC, self.value_BTGC = self.key_BTGC[index_B], self.value_BTGC[index_B]

    def extend(self, other: "LayerCache") -> None:
        """Append the sequences of another cache of the same layer."""
        capacity = max(self.key_BTGC.shape[1], other.key_BTGC.shape[1])
        for cache in (self, other):
            if cache.key_BTGC.shape[1] < capacity:
                cache._grow(capacity, max(self.key_BTGC, other.key_BTGC, key=Tensor.numel))
        self.key_BTGC = torch.cat((self.key_BTGC, other.key_BTGC))
        self.value_BTGC = torch.cat((self.value_BTGC, other.value_BTGC))


class Caches:
    """The caches of all layers for B sequences.

    Args:
        waits: whether the device may be waited for in every pass; by default only a CPU.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequences: int,
        device: torch.device,
        waits: bool | None = None,
    ):
        waits = device.type != "cuda" if waits is None else waits
        self.tokens = CacheLengths(sequences, device, waits)
        with_depth = config.depth_layers
        self.layers = [
            LayerCache(
                CacheLengths(sequences, device, waits) if number in with_depth else self.tokens
            )
            for number in range(config.layers)
        ]

    def keep(self, tokens: Sequence[int]) -> None:
        """Forget all but the first tokens of each sequence of the last forward pass."""
        for lengths in self.lengths():
            lengths.keep(tokens)

    def select(self, index: Sequence[int]) -> None:
        """Keep only the sequences with the given indices, in their order."""
        index_B = torch.tensor(index, dtype=torch.int64, device=self.tokens.length_B.device)
        for lengths in self.lengths():
            lengths.select(index, index_B)
        for layer in self.layers:
            layer.select(index_B)

    def extend(self, other: "Caches") -> None:
        """Append the sequences of other caches of the same model."""
        for own, others in zip(self.lengths(), other.lengths(), strict=True):
            own.extend(others)
        for layer, other_layer in zip(self.layers, other.layers, strict=True):
            layer.extend(other_layer)

    def state(self) -> list[Tensor]:
        """The tensors of `lengths`, then keys and values of each layer."""
        lengths = [lengths.length_B for lengths in self.lengths()]
        return lengths + [
            each for layer in self.layers for each in (layer.key_BTGC, layer.value_BTGC)
        ]

    def replace_state(self, state: Sequence[Tensor]) -> None:
        """Replace the tensors of `state` by others that hold the same."""
        tensors = iter(state)
        for lengths in self.lengths():
            lengths.length_B = next(tensors)
        for layer in self.layers:
            layer.key_BTGC, layer.value_BTGC = next(tensors), next(tensors)

    def lengths(self) -> list[CacheLengths]:
        """The lengths that layers share, and those of each layer with mixture-of-depths."""
        own = [layer.lengths for layer in self.layers if layer.lengths is not self.tokens]
        return [self.tokens, *own]


class CachedContext(NamedTuple):
    """Properties of new tokens that attend to cached ones as well; see `TokenContext`.

    Attributes:
        modality_BS, rotary, dtype: as in `TokenContext`.
        positions: positions of the new tokens in the layer's cache.
        cache: keys and values of the layer's earlier tokens.
        group_tokens: not known.
    """

    modality_BS: Tensor
    rotary: tuple[Tensor, Tensor]
    dtype: torch.dtype
    positions: NewPositions
    cache: LayerCache
    group_tokens: None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `LayerCache.attend`."""
        return self.cache.attend(query, key, value, self.positions)

    def select(self, index_RK: Tensor, filled_RK: Tensor) -> "CachedContext":
        """Return the context of tokens that mixture-of-depths selected, sequence by sequence."""
        sequences, size = self.modality_BS.shape
        assert len(index_RK) == sequences, "cached tokens are selected by sequence"
        if index_RK.shape[1] in (0, size) and size == 1:  # all selected tokens stay in their places
            positions = self.cache.lengths.take(torch.zeros_like(index_RK), filled_RK, self.dtype)
            modality_RK = self.modality_BS[:, : index_RK.shape[1]].where(filled_RK, -1)
            return self._replace(modality_BS=modality_RK, positions=positions)
        cosine, sine = (
            angle.expand(sequences, size, -1, -1).flatten(0, 1)[index_RK] for angle in self.rotary
        )
        offset_RK = index_RK % size
        return self._replace(
            modality_BS=self.modality_BS.flatten()[index_RK].where(filled_RK, -1),
            rotary=(cosine, sine),
            positions=self.cache.lengths.take(offset_RK, filled_RK, self.dtype),
        )
