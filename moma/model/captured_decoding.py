"""Passes over one new token of each sequence, captured once and then replayed.

On a GPU such a pass consists of many short operations, and launching each of them takes longer than
its computation. A CUDA graph launches all of them at once, without Python.

A graph reads and writes the same memory in every replay, and its shapes are fixed. So lengths, keys
and values are kept in buffers that stay where they are, and a graph attends to a fixed number of
positions, of which a mask hides those that are not filled. It is computed from the lengths on the
device, as the places of new keys and values are. Batches are filled up with padding. The numbers of
sequences and of positions are powers of two, so that few graphs are captured. Buffers have the size
of the current batch; others replace them, and their graphs, when it changes.

Shapes: see `caches.py`.
"""

import logging
from collections.abc import Callable, Sequence
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from moma.model.caches import (
    FIRST_CAPACITY,
    CacheLengths,
    Caches,
    LayerCache,
    NewPositions,
    mask_after,
    positions_after,
)
from moma.model.routing import MAX_UNSYNCHRONIZED_TOKENS, Routing

logger = logging.getLogger(__name__)

# Buffers are kept while they have at most so many times the sequences of a batch, so that one that
# varies by few sequences does not replace them again and again.
_SPARE = 3

# Computes a pass in buffers that were fixed before.
Step = Callable[[], Tensor]
# Returns a step that repeats the operations of the given one, which it may call at most once to
# warm up and once to capture.
Capture = Callable[[Step], Step]
# Appends tokens [B, S] to caches and returns hidden vectors [B, S, D].
Pass = Callable[[Tensor, Caches], Tensor]


class CudaGraphs:
    """Captures steps on a GPU as CUDA graphs, which share memory for intermediate results."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)
        # Its pool of memory is shared, which is not possible once all graphs of a pool are gone.
        self._latest: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step) -> Step:
        """See `Capture`."""
        stream, current = self._stream, torch.cuda.current_stream(self._stream.device)
        pool = None if self._latest is None else self._latest.pool()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                # What an operation does on its first call, such as loading a kernel, cannot be
                # captured.
                step()
                graph = torch.cuda.CUDAGraph()
                # Other threads may use the GPU meanwhile.
                with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                    output = step()
        finally:
            current.wait_stream(stream)
        self._latest = graph

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class CapturedDecoder:
    """Computes passes over one new token of each sequence by replaying captured ones.

    The parameters of the model must stay where they are; their values may change. The buffers hold
    the caches of one batch at a time; those of another are copied out before. They have at most
    six times the memory that these caches would have otherwise, and are dropped with them.

    If capturing fails, all later passes are computed without.

    Args:
        capture: captures a pass.
        padding: id of a token that leaves nothing in the caches.
    """

    def __init__(self, capture: Capture, padding: int):
        self._capture, self._padding = capture, padding
        self._buffers: _Buffers | None = None
        self._has_failed = False

    def __call__(
        self, tokens_BS: Tensor, caches: Caches, routing: Routing, compute: Pass
    ) -> Tensor:
        """Append tokens to the caches and return their hidden vectors, [B, S, D].

        Args:
            compute: computes a pass with this routing; for few tokens, without waiting for the
                device.
        """
        if not self._serves(tokens_BS, caches):
            if self._buffers is not None and self._buffers.owner() is caches:
                self._drop()
            return compute(tokens_BS, caches)
        try:
            step = self._prepare(tokens_BS, caches, routing, compute)
        except Exception as error:  # whatever a driver or a kernel raises
            logger.warning(
                "capturing a CUDA graph failed; decoding goes on without (%s: %s)",
                type(error).__name__,
                error,
            )
            self._has_failed = True
            self._drop()
            return compute(tokens_BS, caches)
        hidden_B1D = step()[: len(tokens_BS)].clone()  # the next replay overwrites it
        for lengths in caches.lengths():
            lengths.replayed(1)
        return hidden_B1D

    def _serves(self, tokens_BS: Tensor, caches: Caches) -> bool:
        """Whether the pass over these tokens can be captured; prompts and drafts are not."""
        is_small = tokens_BS.shape[1] == 1 and len(tokens_BS) <= MAX_UNSYNCHRONIZED_TOKENS
        if self._has_failed or not is_small or torch.is_grad_enabled():
            return False
        is_cast = torch.is_autocast_enabled(tokens_BS.device.type)
        return not is_cast and any(layer.key_BTGC.numel() for layer in caches.layers)

    def _prepare(self, tokens_B1: Tensor, caches: Caches, routing: Routing, compute: Pass) -> Step:
        """Return the step that computes a pass, with its input in the buffers."""
        buffers = self._reserve(caches, len(tokens_B1))
        buffers.hold(caches, self._forget)
        buffers.tokens_B1[: len(tokens_B1)].copy_(tokens_B1)
        buffers.tokens_B1[len(tokens_B1) :].fill_(self._padding)
        if routing not in buffers.steps:
            buffers.steps[routing] = self._captured(buffers.tokens_B1, buffers.caches, compute)
        return buffers.steps[routing]

    def _reserve(self, caches: Caches, count: int) -> "_Buffers":
        """Return buffers of the size of a batch; others are dropped before."""
        sequences, old = 1 << (count - 1).bit_length(), self._buffers
        positions = _positions(caches.lengths()[:1]), _positions(caches.lengths()[1:])
        if old is not None and sequences < old.sequences <= _SPARE * count:
            sequences = old.sequences
        if old is not None and old.owner() is caches:
            # Outside of buffers, the positions of caches do not become fewer, either.
            before = old.positions
            positions = max(positions[0], before[0]), max(positions[1], before[1])
        if old is not None and (old.sequences, old.positions) == (sequences, positions):
            return old
        del old  # so that its memory is free
        self._drop()
        self._buffers = _Buffers(caches, sequences, positions)
        return self._buffers

    def _drop(self) -> None:
        """Give the caches that are held memory of their own, and free the buffers."""
        if self._buffers is not None:
            self._buffers.release()
            self._buffers = None

    def _forget(self, owner: ReferenceType[Caches]) -> None:
        """Free the buffers of caches that are gone."""
        if self._buffers is not None and self._buffers.owner is owner:
            self._buffers = None

    def _captured(self, tokens_B1: Tensor, caches: Caches, compute: Pass) -> Step:
        before = [each.length_B.clone() for each in caches.lengths()]
        try:
            return self._capture(lambda: compute(tokens_B1, caches))
        finally:
            # The pass may have been computed. What it stored is overwritten by the next one.
            for lengths, before_B in zip(caches.lengths(), before, strict=True):
                lengths.length_B.copy_(before_B)


def _positions(lengths: Sequence[CacheLengths]) -> int:
    """A number of positions that suffices for one more token."""
    longest = max((each.bound for each in lengths), default=0)
    return max(FIRST_CAPACITY, 1 << longest.bit_length())


class _StaticLengths(CacheLengths):
    """Lengths that change in place, of sequences that attend to a fixed number of positions."""

    def __init__(self, length_B: Tensor, used: int):
        super().__init__(len(length_B), length_B.device, waits=False)
        self.length_B, self._used = length_B, used

    def take(self, offset_BS: Tensor, filled_BS: Tensor, dtype: torch.dtype) -> NewPositions:
        """See `CacheLengths.take`."""
        position_BS = positions_after(self.length_B, filled_BS.shape[1])
        self.length_B.add_(filled_BS.sum(1))
        mask_B1SU = mask_after(position_BS, self._used, dtype)
        return NewPositions(position_BS.where(filled_BS, -1), self._used, mask_B1SU, False)


class _StaticCaches(Caches):
    """Caches in the memory of given tensors.

    Args:
        like: caches of the same model.
        state: see `Caches.state`.
        positions: numbers of positions that tokens attend to, where layers share their lengths and
            with mixture-of-depths.
    """

    def __init__(self, like: Caches, state: Sequence[Tensor], positions: tuple[int, int]):
        others, tensors = like.lengths(), iter(state)
        lengths = [
            _StaticLengths(next(tensors), positions[number > 0]) for number in range(len(others))
        ]
        self.tokens = lengths[0]
        self.layers = [LayerCache(lengths[others.index(layer.lengths)]) for layer in like.layers]
        self.replace_state(state)


class _Buffers:
    """Tokens and caches whose memory stays in its place, and what was captured in it.

    Attributes:
        sequences: number of sequences.
        positions: numbers of positions that tokens attend to; see `_StaticCaches`.
        tokens_B1: a token of each sequence.
        caches: those that captured passes use.
        steps: captured passes.
        owner: refers to the caches whose tensors are held.
    """

    def __init__(self, like: Caches, sequences: int, positions: tuple[int, int]):
        self.sequences, self.positions = sequences, positions
        lengths = like.lengths()
        # A layer that no token has reached does not have its dtype and widths yet.
        key_BTGC = max((layer.key_BTGC for layer in like.layers), key=Tensor.numel)
        shape = key_BTGC.shape[2:]
        with torch.inference_mode(False):  # so that they can be changed in any mode
            self.tokens_B1 = lengths[0].length_B.new_zeros(sequences, 1)
            self._state = [each.length_B.new_zeros(sequences) for each in lengths]
            for layer in like.layers:
                # One more position takes what padding leaves.
                size = positions[layer.lengths is not like.tokens] + 1
                self._state += [key_BTGC.new_zeros(sequences, size, *shape) for _ in range(2)]
        self.caches = _StaticCaches(like, self._state, positions)
        self.steps: dict[Routing, Step] = {}
        self.owner: Callable[[], Caches | None] = _nothing
        self._held: list[Tensor] = []

    def hold(self, caches: Caches, forget: Callable[[ReferenceType[Caches]], None]) -> None:
        """Move the tensors of caches into the buffers, unless they are there already.

        Args:
            forget: called when the caches are gone.
        """
        if self.owner() is not caches:
            self.release()
            self.owner, self._held = ref(caches, forget), self._state
        self._held = [
            tensor if tensor is held else _move(tensor, buffer)
            for tensor, held, buffer in zip(caches.state(), self._held, self._state, strict=True)
        ]
        caches.replace_state(self._held)

    def release(self) -> None:
        """Give the caches that are held memory of their own."""
        caches = self.owner()
        if caches is not None:
            pairs = zip(caches.state(), self._held, strict=True)
            caches.replace_state(
                [tensor.clone() if tensor is held else tensor for tensor, held in pairs]
            )
        self.owner, self._held = _nothing, []


def _nothing() -> None:
    """What a reference to caches that are gone returns."""


def _move(tensor: Tensor, buffer: Tensor) -> Tensor:
    """Copy a tensor to the first rows of a buffer, and return these."""
    rows = buffer[: len(tensor)]
    if tensor.ndim == 1:
        return rows.copy_(tensor)
    # Masked positions take part in products, so they must be finite.
    rows.zero_()
    count = min(tensor.shape[1], rows.shape[1])
    if count:
        rows[:, :count].copy_(tensor[:, :count])
    return rows
