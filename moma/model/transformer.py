"""The early-fusion transformer: text and image tokens in one sequence, one decoder.

Shapes: see `layers.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.files import fingerprint
from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import (
    AttentionKernel,
    MaskedAttention,
    Segments,
    number_segments,
)
from moma.model.caches import CachedContext, Caches, LayerCache
from moma.model.captured_decoding import CapturedDecoder
from moma.model.decoder_layer import (
    DecoderLayer,
    DepthLayer,
    LayerContext,
    TokenContext,
    build_layer,
)
from moma.model.dispatch import Dispatch, ScatterSlots
from moma.model.experts import ExpertGroup
from moma.model.initialization import LocalRows, all_rows, draw_normal
from moma.model.layers import product_dtype, rotary_cos_sin
from moma.model.routers import AuxiliaryRouter, Diagnostics, Router, RouterRecord
from moma.model.routing import ROUTINGS, Routing, RoutingName
from moma.model.token_choice import TokenRouter
from moma.vocabulary import Vocabulary

# Maps normalized hidden vectors [B, S, D] and the head's weight [V, D] to a result.
Head = Callable[[Tensor, Tensor], Any]

# Maps embedded tokens [B, S, D], their context, the caches of the layers and the routing to the
# normalized output of the last layer.
CachedDecoder = Callable[[Tensor, CachedContext, Sequence[LayerCache], Routing], Tensor]


def no_head(hidden_BSD: Tensor, weight_VD: Tensor) -> None:
    """A head for passes that need no prediction."""


class ModelOutput(NamedTuple):
    """Result of a forward pass.

    Attributes:
        head: what the head returned; by default the logits of the next token, [B, S, V].
        routers: records of the routers, layer by layer, if `Routing` requests them.
        nonfinite_L: booleans on the device: layers whose output or router logits are NaN or
            infinite. The first one is the cause; later ones follow from it. Empty without
            `Routing.checks`.
        cutoffs: under policies with a capacity, for each router, layer by layer, the cutoffs [E] of
            expert choice.
        loads: for each router under token choice with a capacity, layer by layer, its load [O]; see
            `TokenChoices`.
        router_loss: sum of the routers' own losses, to add to the mean loss of the targets; None
            if they have none.
    """

    head: Any
    routers: list[RouterRecord]
    nonfinite_L: Tensor
    cutoffs: list[Tensor]
    loads: list[Tensor]
    router_loss: Tensor | None


class Transformer(nn.Module):
    """Decoder over mixed text and image tokens.

    Args:
        config: see `ModelConfig`.
        vocabulary: the ids and the modality of each.
        shares: fraction of each modality among the tokens of a micro-batch in training; static
            capacity assumes that every micro-batch has these.
        kernel: computes attention; by default one that runs on any device.
        dispatch: builds the `Slots` that move tokens to experts and back; see `dispatch_for`.
    """

    modality_of_id: Tensor

    def __init__(
        self,
        config: ModelConfig,
        vocabulary: Vocabulary,
        shares: Sequence[float],
        kernel: AttentionKernel | None = None,
        dispatch: Dispatch = ScatterSlots,
    ):
        super().__init__()
        self.kernel = kernel or MaskedAttention()
        names = vocabulary.modalities
        if len(shares) != len(names) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares of {names} must add up to 1, not {tuple(shares)}")
        self.config, self.vocabulary, self.shares = config, vocabulary, tuple(shares)
        self.embedding = nn.Embedding(vocabulary.size, config.dim)
        self.layers = nn.ModuleList(
            build_layer(number, config, vocabulary, shares, dispatch)
            for number in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.head = nn.Linear(config.dim, vocabulary.size, bias=False)
        self._embedding_scale = 1.0
        # How the model is used causally, and whether it could be by auxiliary routers: whether
        # these are trained, or being trained.
        self.causal_routing = ROUTINGS["threshold"]
        self.has_auxiliary = False
        # Compute passes with caches and without checks; see `decoding.py`.
        self.cpu_decoder: CachedDecoder | None = None
        self.captured_decoder: CapturedDecoder | None = None
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
            self._embedding_scale = config.dim**0.5
        self.register_buffer("modality_of_id", self._modality_table(), persistent=False)
        self._padding = vocabulary.padding

    def forward(
        self,
        tokens_BS: Tensor,
        document_ids_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        routing: Routing | None = None,
        head: Head = functional.linear,
        max_documents: int | None = None,
        max_length: int | None = None,
        caches: Caches | None = None,
    ) -> ModelOutput:
        """Predict the token after each position.

        Args:
            tokens_BS: int64 ids.
            document_ids_BS: int64 number of each token's document within its sequence, of which
                the sequence may hold only a piece; if omitted, each sequence is one document.
            positions_BS: int64 positions for the rotary embedding; if omitted, 0 to S − 1.
            routing: if omitted, expert choice with static capacity, as in training.
            max_documents: upper bound of the number of pieces in the micro-batch, padding included;
                if omitted, the number of tokens.
            max_length: upper bound of the length of a piece; if omitted, S.
            head: what to compute from the last layer's normalized output; by default all logits.
            caches: keys and values of earlier tokens, to which these tokens are appended; requires
                causal routing, and neither documents nor positions.

        Raises:
            UserError: a layer's output or a router's logit is NaN or infinite; see
                `Routing.raises`.
        """
        routing = routing or Routing()
        if caches is not None and not routing.checks:
            hidden_BSD = self._decode(tokens_BS, caches, routing)
            none_L = hidden_BSD.new_zeros(0, dtype=torch.bool)
            return ModelOutput(head(hidden_BSD, self.head.weight), [], none_L, [], [], None)
        context = (
            self._context(tokens_BS, document_ids_BS, positions_BS, max_documents, max_length)
            if caches is None
            else self._cached_context(tokens_BS, caches)
        )
        x_BSD = self.embedding(tokens_BS) * self._embedding_scale
        x_BSD, diagnostics = self._run_layers(x_BSD, context, routing, caches)
        flags = [layer[0].nonfinite for layer in diagnostics if layer[0].nonfinite is not None]
        nonfinite_L = torch.stack(flags) if flags else x_BSD.new_zeros(0, dtype=torch.bool)
        if routing.raises and routing.synchronizes:
            require_finite(nonfinite_L)
        found = head(self.norm(x_BSD), self.head.weight)
        return _output(found, nonfinite_L, [each for layer in diagnostics for each in layer])

    def _decode(self, tokens_BS: Tensor, caches: Caches, routing: Routing) -> Tensor:
        """Append tokens to caches and return the normalized output of the last layer, [B, S, D]."""
        compute = partial(self._hidden, routing=routing)
        if self.captured_decoder is not None:
            return self.captured_decoder(tokens_BS, caches, routing, compute)
        return compute(tokens_BS, caches)

    def _hidden(self, tokens_BS: Tensor, caches: Caches, routing: Routing) -> Tensor:
        context = self._cached_context(tokens_BS, caches)
        x_BSD = self.embedding(tokens_BS) * self._embedding_scale
        if self.cpu_decoder is not None:
            return self.cpu_decoder(x_BSD, context, caches.layers, routing)
        x_BSD, _ = self._run_layers(x_BSD, context, routing, caches)
        return self.norm(x_BSD)

    def _run_layers(
        self, x_BSD: Tensor, context: LayerContext, routing: Routing, caches: Caches | None
    ) -> tuple[Tensor, list[list[Diagnostics]]]:
        """Run all layers; also return the diagnostics of each layer's routers."""
        first = next((layer for layer in self.units() if not isinstance(layer, DepthLayer)), None)
        if isinstance(context, TokenContext) and first is not None:
            group_tokens = first.experts.find_tokens(context.modality_BS, routing)
            context = context._replace(group_tokens=group_tokens)
        diagnostics: list[list[Diagnostics]] = []
        for number, layer in enumerate(self.layers):
            if caches is not None:
                assert isinstance(context, CachedContext)
                context = context._replace(cache=caches.layers[number])
            x_BSD, layer_diagnostics = layer(x_BSD, context, routing)
            diagnostics.append(layer_diagnostics)
        return x_BSD, diagnostics

    def _context(
        self,
        tokens_BS: Tensor,
        document_ids_BS: Tensor | None,
        positions_BS: Tensor | None,
        max_documents: int | None,
        max_length: int | None,
    ) -> TokenContext:
        is_padding_BS = tokens_BS == self._padding
        modality_BS = self.modality_of_id[tokens_BS].masked_fill(is_padding_BS, -1)
        length = tokens_BS.shape[1]
        if positions_BS is None:
            positions_BS = torch.arange(length, device=tokens_BS.device)[None]
        rotary = self._rotary(positions_BS)
        if document_ids_BS is None or self.config.attention_mask == "causal":
            # Padding follows all tokens, which cannot attend to it.
            id_BS = torch.arange(len(tokens_BS), device=tokens_BS.device)[:, None]
            segments = Segments(id_BS.expand_as(tokens_BS), len(tokens_BS), length, True)
        else:
            id_BS = number_segments(document_ids_BS, is_padding_BS)
            longest = min(max_length or length, length)
            segments = Segments(id_BS, max_documents or tokens_BS.numel(), longest, False)
        dtype = product_dtype(self.embedding.weight)
        layout = self.kernel.layout(segments, dtype)
        return TokenContext(modality_BS, rotary, segments, layout, dtype, self.kernel)

    def _cached_context(self, tokens_BS: Tensor, caches: Caches) -> CachedContext:
        filled_BS = tokens_BS != self._padding
        position_1S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        rotary = self._rotary(caches.tokens.length_B[:, None] + position_1S)
        dtype = product_dtype(self.embedding.weight)
        positions = caches.tokens.take(position_1S, filled_BS, dtype)
        modality_BS = self.modality_of_id[tokens_BS].where(filled_BS, -1)
        return CachedContext(modality_BS, rotary, dtype, positions, caches.layers[0])

    def new_caches(self, sequences: int) -> Caches:
        """Return empty caches for a number of sequences."""
        return Caches(self.config, sequences, self.embedding.weight.device)

    def _rotary(self, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        return rotary_cos_sin(positions_BS, config.dim // config.heads, config.rope_theta)

    def _modality_table(self) -> Tensor:
        # Unlike `from_numpy`, on the device of a context such as `with torch.device("cuda")`.
        return torch.as_tensor(self.vocabulary.modality_of_id)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """Like `Module.to_empty`, but restores buffers and keeps embeddings tied."""
        super().to_empty(device=device, recurse=recurse)
        self.modality_of_id.copy_(self._modality_table())
        for router in self.routers():
            router.cutoff_means_3E.zero_()
        for token_router in self.token_routers():
            token_router.bias_O.zero_()
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight
        return self

    @torch.no_grad()
    def initialize(self, seed: int, local_rows: LocalRows = all_rows) -> None:
        """Initialize all parameters from normal distributions, deterministically for a seed.

        Matrices have standard deviation 1/√fan-in, which preserves the scale of their input (LeCun
        et al. 1998, "Efficient BackProp" §4.6). Embeddings have 1, PyTorch's default and the scale
        of a Swin-normed layer's updates; tied ones have 1/√D, as the head needs. The weights of a
        router's experts have zero mean over the experts, so that experts prefer different tokens.
        Norms are ones, biases zeros. Neither paper describes its initialization.

        Args:
            seed: seed of the generators, see `draw_normal`.
            local_rows: returns the rows of a parameter that this rank holds, and the number of the
                first one; their values do not depend on the number of ranks.
        """
        stacked = self.stacked_matrices()
        for name, parameter in self.named_parameters():
            (rows, first), shape = local_rows(parameter), parameter.shape
            if parameter.ndim < 2 or "_norm." in name:
                rows.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            # Experts are stored [E·in, out], linear maps [out, in].
            fan_in = shape[0] // stacked[name] if name in stacked else shape[1]
            if name == "embedding.weight" and not self.config.tied_embeddings:
                fan_in = 1
            if not name.endswith("router.weight") or len(parameter) == 1:
                draw_normal(rows, first, shape, fan_in**-0.5, seed, name)
                continue
            values = torch.empty(shape)  # a router is small: each rank draws all of it
            draw_normal(values, 0, shape, fan_in**-0.5, seed, name)
            values -= values.mean(dim=0)
            rows.copy_(values[first : first + len(rows)])

    def stacked_matrices(self) -> dict[str, int]:
        """Names of the parameters that stack one matrix [in, out] per expert, and how many."""
        return {
            f"{path}.{name}": group.num_experts
            for path, group in self.named_modules()
            if isinstance(group, ExpertGroup)
            for name, _ in group.named_parameters(recurse=False)
        }

    def named_routing(self, name: RoutingName, **flags: bool) -> Routing:
        """Routing by its name: expert choice has actual capacity, `causal` is `causal_routing`.

        Args:
            flags: of `Routing`.
        """
        routing = self.causal_routing if name == "causal" else ROUTINGS[name]
        return Routing(routing.experts, routing.depth, **flags)

    def units(self) -> Iterator[DecoderLayer]:
        """Yield the modules to compile and shard one by one: the layers."""
        yield from cast(Iterable[DecoderLayer], self.layers)

    def routers(self) -> Iterator[Router]:
        """Yield the main routers of expert choice, in the order of the records."""
        return (module for module in self.modules() if isinstance(module, Router))

    def update_cutoffs(self, mean_2P: Tensor) -> None:
        """Add a step's cutoffs to the thresholds of all routers; see `Router.update_cutoffs`.

        Args:
            mean_2P: as for a router, for the P cutoffs of all routers in their order.
        """
        routers = list(self.routers())
        sizes = [router.cutoff_means_3E.shape[1] for router in routers]
        for router, mean_2E in zip(routers, mean_2P.split(sizes, 1), strict=True):
            router.update_cutoffs(mean_2E)

    def token_routers(self) -> Iterator[TokenRouter]:
        """Yield the routers of token choice, in the order of `ModelOutput.loads`."""
        return (module for module in self.modules() if isinstance(module, TokenRouter))

    def update_biases(self, load_O: Tensor) -> None:
        """Move the biases of all routers of token choice toward balance.

        Args:
            load_O: the loads of a step, for the outputs of all routers in their order.
        """
        routers = list(self.token_routers())
        sizes = [router.out_features for router in routers]
        for router, own_O in zip(routers, load_O.split(sizes), strict=True):
            router.update_bias(own_O)

    @property
    def has_thresholds(self) -> bool:
        """Whether all routers have thresholds, by which the model can be used causally."""
        return all(bool(router.cutoff_means_3E[2].all()) for router in self.routers())

    def routing_fingerprint(self) -> str:
        """Short hash of how the model routes causally: in which way, and by which thresholds."""
        thresholds = (router.threshold_E.cpu().numpy().tobytes() for router in self.routers())
        return fingerprint(b"".join([repr(self.causal_routing).encode(), *thresholds]))

    def auxiliary_routers(self) -> Iterator[AuxiliaryRouter]:
        """Yield the auxiliary routers, in the order of the records."""
        return (module for module in self.modules() if isinstance(module, AuxiliaryRouter))


def _output(head: Any, nonfinite_L: Tensor, routers: Sequence[Diagnostics]) -> ModelOutput:
    losses = [each.loss for each in routers if each.loss is not None]
    return ModelOutput(
        head,
        [each.record for each in routers if each.record is not None],
        nonfinite_L,
        [each.cutoff_E for each in routers if each.cutoff_E is not None],
        [each.load_O for each in routers if each.load_O is not None],
        torch.stack(losses).sum() if losses else None,
    )


def require_finite(nonfinite_L: Tensor, where: str = "") -> None:
    """Raise if a layer is non-finite; synchronizes with the device.

    Args:
        nonfinite_L: see `ModelOutput`.
        where: prefix of the message.

    Raises:
        UserError: names the first non-finite layer.
    """
    layers = nonfinite_L.nonzero().flatten().tolist()
    if layers:
        raise UserError(
            f"{where}{first_nonfinite(layers)}; lower the learning rate in a new run, or inspect "
            "the data of the last steps"
        )


def first_nonfinite(layers: Sequence[int]) -> str:
    """Describe the first of the non-finite layers, for a message."""
    return f"the output of layer {layers[0]}, or a logit of a router in it, is NaN or infinite"
