"""The early-fusion transformer: text and image tokens in one sequence, one decoder.

Shapes: see `layers.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from moma.errors import UserError
from moma.model.architecture import ModelConfig
from moma.model.attention import AttentionMask, additive_mask, document_mask
from moma.model.auxiliary import AuxiliaryRouter, Diagnostics, RouterOutput
from moma.model.decoder_layer import Context, build_layer
from moma.model.layers import rotary_angles
from moma.model.routing import Routing
from moma.vocabulary import Vocabulary


class ModelOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        logits_BSV: of the next token.
        routers: what each recording router did, layer by layer.
        nonfinite_L: booleans on the device: the layers whose output, or a router's score in them,
        is
            NaN or infinite. The first is at fault; later ones follow from it.
    """

    logits_BSV: Tensor
    routers: list[RouterOutput]
    nonfinite_L: Tensor


class Transformer(nn.Module):
    """Decoder over mixed text and image tokens.

    Args:
        config: see `ModelConfig`.
        vocabulary: gives the number of ids and the modality of each.
        shares: part of each of the vocabulary's modalities among the tokens of a training batch.
    """

    modality_of_id: Tensor

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, shares: Sequence[float]):
        super().__init__()
        names = vocabulary.modalities
        if len(shares) != len(names) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares of {names} must add up to 1, not {tuple(shares)}")
        self.config, self.vocabulary, self.shares = config, vocabulary, tuple(shares)
        self.embedding = nn.Embedding(vocabulary.size, config.dim)
        self.layers = nn.ModuleList(
            build_layer(number, config, vocabulary, shares) for number in range(config.layers)
        )
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.head = nn.Linear(config.dim, vocabulary.size, bias=False)
        self._embedding_scale = 1.0
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
            self._embedding_scale = config.dim**0.5
        self.register_buffer("modality_of_id", self._modality_table(), persistent=False)
        self._padding = vocabulary.padding

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        positions_BS: Tensor | None = None,
        routing: Routing | None = None,
    ) -> ModelOutput:
        """Predict the token after each position.

        Args:
            tokens_BS: int64 ids.
            documents_BS: int64 number of the document within its row; left out, a row is one.
            positions_BS: int64 position for the rotary embedding; left out, counted along the row.
            routing: left out, batch choice with static capacity, as in training.
        """
        routing = routing or Routing()
        context = self._context(tokens_BS, documents_BS, positions_BS)
        x_BSD = self.embedding(tokens_BS) * self._embedding_scale
        reports: list[Diagnostics] = []
        nonfinite: list[Tensor] = []
        for layer in self.layers:
            x_BSD, told = layer(x_BSD, context, routing)
            reports.extend(told)
            nonfinite.append(torch.stack([report.nonfinite for report in told]).any())
        nonfinite_L = torch.stack(nonfinite)
        if routing.mode == "causal" or routing.capacity == "actual":  # these wait for the device
            require_finite(nonfinite_L)
        records = [report.record for report in reports if report.record is not None]
        return ModelOutput(self.head(self.norm(x_BSD)), records, nonfinite_L)

    def _context(
        self, tokens_BS: Tensor, documents_BS: Tensor | None, positions_BS: Tensor | None
    ) -> Context:
        modality_BS = self.modality_of_id[tokens_BS]
        modality_BS = modality_BS.masked_fill(tokens_BS == self._padding, -1)
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        angles = rotary_angles(
            positions_BS, self.config.dim // self.config.heads, self.config.rope_theta
        )
        if self.config.attention_mask == "causal" or documents_BS is None:
            return Context(modality_BS, torch.zeros_like(tokens_BS), angles, AttentionMask())
        mask = additive_mask(document_mask(documents_BS), self._product_dtype(tokens_BS.device))
        return Context(modality_BS, documents_BS, angles, AttentionMask(mask))

    def _product_dtype(self, device: torch.device) -> torch.dtype:
        """What attention computes in, as its mask has to be."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.embedding.weight.dtype

    def _modality_table(self) -> Tensor:
        return torch.from_numpy(self.vocabulary.modality_of_id)

    def to_empty(self, *, device: Any, recurse: bool = True) -> Self:
        """As of any module, but what is no weight is filled, and tied embeddings stay tied."""
        super().to_empty(device=device, recurse=recurse)
        self.modality_of_id.copy_(self._modality_table())
        if self.config.tied_embeddings:
            self.head.weight = self.embedding.weight
        return self

    @torch.no_grad()
    def initialise(
        self, seed: int, fill: Callable[[Tensor, Tensor], object] = Tensor.copy_
    ) -> None:
        """Draw every weight anew from normal distributions, deterministic for a seed.

        Matrices get a standard deviation of 1/√fan-in, so that a layer keeps the scale of what
        it reads (LeCun et al. 1998, "Efficient BackProp" §4.6); embeddings get 1, the scale at
        which a Swin-normed layer adds to them, and PyTorch's own; tied ones get 1/√D, as the head
        needs. The experts of a router start from opposed directions, their mean being zero, so
        that they want different tokens. Norms start as ones, biases as zeros. The paper and
        Chameleon do not tell how they start.

        Args:
            seed: of the draw.
            fill: puts whole values into a parameter, which may be sharded: one is there at a time.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            fill(parameter, self._draw(name, parameter.shape, generator))

    def _draw(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        if len(shape) < 2 or "_norm." in name:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0)
        # Experts are stored [E, in, out], linear maps [out, in].
        looked_up = name == "embedding.weight" and not self.config.tied_embeddings
        fan_in = 1 if looked_up else shape[1]
        values = torch.randn(shape, generator=generator).mul_(fan_in**-0.5)
        if name.endswith("router.weight") and len(values) > 1:
            values -= values.mean(dim=0)
        return values

    def units(self) -> Iterator[nn.Module]:
        """The modules to compile and to shard one by one."""
        yield from self.layers

    def auxiliary_routers(self) -> Iterator[AuxiliaryRouter]:
        """Every auxiliary router, layer by layer, in the order of the records."""
        return (module for module in self.modules() if isinstance(module, AuxiliaryRouter))

    @property
    def is_causal_without_routers(self) -> bool:
        """Whether no layer chooses among tokens, so that batch choice is causal already."""
        return not self.config.has_routers


def require_finite(nonfinite_L: Tensor, where: str = "") -> None:
    """Refuse outputs and scores that are NaN or infinite; reads the device.

    Args:
        nonfinite_L: see `ModelOutput`.
        where: words that open the message.

    Raises:
        UserError: names the layer.
    """
    layers = nonfinite_L.nonzero().flatten().tolist()
    if layers:
        raise UserError(
            f"{where}{first_nonfinite(layers)}; lower the learning rate in a new run, or look at "
            f"the "
            "data of the last steps"
        )


def first_nonfinite(layers: Sequence[int]) -> str:
    """Names the first of the layers that are not sound."""
    return f"the output of layer {layers[0]}, or a score of a router in it, is NaN or infinite"
