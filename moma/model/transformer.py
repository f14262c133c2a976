"""The early-fusion transformer: text and image tokens in one sequence, one decoder.

Shapes: see `layers.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moma.model.attention import Attention, document_mask
from moma.model.auxiliary import AuxiliaryRouter, RouterRecord
from moma.model.experts import Experts, GroupConfig, make_group, named_groups
from moma.model.layers import rotary_angles
from moma.model.routing import Routing
from moma.recipe import Config
from moma.vocabulary import MODALITIES, Vocabulary


class ModelConfig(Config):
    """Shape of the transformer.

    Attributes:
        groups: the feed-forward's groups of experts: a name of the paper's (`dense`, `moe_8x`,
            `moe_4t4i`, …) or a list of `{modalities, experts}`.
        dim, layers, heads: width D, number of layers, attention heads H.
        hidden: hidden width F of an expert; left out, 8 · dim / 3 rounded up to `hidden_multiple`.
        norm: `swin` normalises what a layer adds (MoMa §2.2), `pre` what it reads.
        attend: what a token sees of its row: its own `document`, or the whole `row` before it.
    """

    groups: str | tuple[GroupConfig, ...] = "moe_4t4i"
    dim: int = Field(512, ge=2)
    layers: int = Field(8, ge=1)
    heads: int = Field(8, ge=1)
    hidden: int | None = Field(None, ge=1)
    hidden_multiple: int = Field(32, ge=1)
    norm: Literal["swin", "pre"] = "swin"
    norm_epsilon: float = 1e-5
    query_key_norm: bool = True
    rope_theta: float = 10_000.0
    attend: Literal["document", "row"] = "document"

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be a multiple of 2 × heads ({2 * self.heads})")
        if not self.group_list:
            raise ValueError("groups is empty; name an architecture or list at least one group")
        return self

    @property
    def hidden_width(self) -> int:
        """Hidden width F of one expert."""
        if self.hidden is not None:
            return self.hidden
        return -(-(8 * self.dim // 3) // self.hidden_multiple) * self.hidden_multiple

    @property
    def group_list(self) -> tuple[GroupConfig, ...]:
        """The groups, spelled out."""
        return named_groups(self.groups) if isinstance(self.groups, str) else self.groups


class ModelOutput(NamedTuple):
    """Logits [B, S, V] of the next token, and what each recording router did, layer by layer."""

    logits_BSV: Tensor
    routers: list[RouterRecord]


class Layer(nn.Module):
    """Attention and experts, each with its residual.

    Swin: h = x + norm(attention(x)), out = h + norm(experts(h)), so that what nobody took stays as
    it is (Swin v2, arXiv 2111.09883). Pre: the norms stand before attention and experts.
    """

    def __init__(self, config: ModelConfig, shares: Sequence[float]):
        super().__init__()
        self.swin = config.norm == "swin"
        self.attention = Attention(config.dim, config.heads, config.query_key_norm)
        self.experts = Experts(
            [
                make_group(config.dim, config.hidden_width, group, shares)
                for group in config.group_list
            ]
        )
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.experts_norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)

    def forward(
        self,
        x_BSD: Tensor,
        angles: tuple[Tensor, Tensor],
        mask_BSS: Tensor | None,
        modality_BS: Tensor,
        routing: Routing,
    ) -> tuple[Tensor, list[RouterRecord]]:
        """Map [B, S, D] to [B, S, D] and return what the layer's routers did."""
        if self.swin:
            x_BSD = x_BSD + self.attention_norm(self.attention(x_BSD, angles, mask_BSS))
            y_BSD, routers = self.experts(x_BSD, modality_BS, routing)
            return x_BSD + self.experts_norm(y_BSD), routers
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), angles, mask_BSS)
        y_BSD, routers = self.experts(self.experts_norm(x_BSD), modality_BS, routing)
        return x_BSD + y_BSD, routers


class Transformer(nn.Module):
    """Decoder over mixed text and image tokens.

    Args:
        config: see `ModelConfig`.
        vocabulary: gives the number of ids and the modality of each.
        shares: part of each modality in `MODALITIES` among the tokens of a training batch.
    """

    modality_of_id: Tensor

    def __init__(self, config: ModelConfig, vocabulary: Vocabulary, shares: Sequence[float]):
        super().__init__()
        if len(shares) != len(MODALITIES) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares of {MODALITIES} must add up to 1, not {tuple(shares)}")
        self.config, self.vocabulary, self.shares = config, vocabulary, tuple(shares)
        self.embedding = nn.Embedding(vocabulary.size, config.dim)
        self.layers = nn.ModuleList(Layer(config, shares) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_epsilon)
        self.head = nn.Linear(config.dim, vocabulary.size, bias=False)
        table = torch.from_numpy(vocabulary.modality_of_id)
        self.register_buffer("modality_of_id", table, persistent=False)
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
        modality_BS = self.modality_of_id[tokens_BS]
        modality_BS = modality_BS.masked_fill(tokens_BS == self._padding, -1)
        if positions_BS is None:
            positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None]
        angles = rotary_angles(
            positions_BS, self.config.dim // self.config.heads, self.config.rope_theta
        )
        mask_BSS = None
        if self.config.attend == "document" and documents_BS is not None:
            mask_BSS = document_mask(documents_BS)
        x_BSD = self.embedding(tokens_BS)
        records: list[RouterRecord] = []
        for layer in self.layers:
            x_BSD, routers = layer(x_BSD, angles, mask_BSS, modality_BS, routing)
            records.extend(routers)
        return ModelOutput(self.head(self.norm(x_BSD)), records)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw every weight anew from normal distributions, deterministic for a seed.

        Matrices get a standard deviation of 1/√fan-in, so that a layer keeps the scale of what
        it reads; embeddings get 1, the scale at which a Swin-normed layer adds to them. The
        experts of a router start from opposed directions, their mean being zero, so that they
        want different tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or "_norm." in name:
                continue
            # Experts are stored [E, in, out], linear maps [out, in].
            fan_in = 1 if name == "embedding.weight" else parameter.shape[1]
            values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            if name.endswith("router.weight"):
                values -= values.mean(dim=0)
            parameter.copy_(values)

    def units(self) -> Iterator[nn.Module]:
        """The modules to compile and to shard one by one."""
        yield from self.layers

    def auxiliary_routers(self) -> Iterator[AuxiliaryRouter]:
        """Every auxiliary router, layer by layer, in the order of the records."""
        return (module for module in self.modules() if isinstance(module, AuxiliaryRouter))

    @property
    def is_causal_without_routers(self) -> bool:
        """Whether no layer chooses among tokens, so that batch choice is causal already."""
        return not any(isinstance(module, AuxiliaryRouter) for module in self.modules())
