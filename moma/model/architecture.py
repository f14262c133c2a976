"""The configuration of a model: everything that determines its parameters and operations."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moma.errors import UserError
from moma.model.depth import DepthConfig
from moma.model.groups import (
    GroupConfig,
    TokenChoiceConfig,
    named_groups,
    named_token_choice,
)
from moma.model.implementations import ImplementationName
from moma.recipe import Config


class ModelConfig(Config):
    """Configuration of the transformer.

    Attributes:
        groups: expert groups of the feed-forward: an architecture's name (`dense`, `moe_8x`,
            `moe_4t4i`, …; `token_4t4i` and `null_4t4i` route by token choice; `mod` and
            `mod_moe_4t4i` add mixture-of-depths) or a list of `{modalities, experts}`.
        depth: mixture-of-depths; if omitted, used only when `groups` begins with `mod`.
        token_choice: token choice instead of expert choice, in all groups of several experts; if
            omitted, used only when `groups` names `token` or `null`.
        dim: width D, a multiple of 2 · `heads`.
        layers: number of layers.
        heads: number of attention heads H.
        kv_heads: number of key and value heads, a divisor of `heads`; if omitted, `heads`.
        hidden: hidden width F of an expert; if omitted, 8 · `dim` / 3 rounded up to a multiple of
            `hidden_multiple`.
        hidden_multiple: see `hidden`.
        norm: `swin` normalizes the output of attention and experts (MoMa §2.2), `pre` their input.
        norm_epsilon: epsilon of the RMSNorms.
        query_key_norm: whether each head's queries and keys are normalized by LayerNorm.
        rope_theta: base of the rotary embedding.
        attention_mask: `document` limits attention to the token's own document; `causal` allows
            all earlier tokens of the sequence.
        dropout: dropout probability of the output of attention and experts (Chameleon §2.3: 0.1
            in the 7B model, which has `norm = "pre"`).
        tied_embeddings: whether the head uses the embedding table; embeddings are then multiplied
            by √D, so that one scale suits both uses (arXiv 1706.03762 §3.4).
        router_noise: whether the experts' router logits get Gumbel-Sigmoid noise in training; if
            omitted, only in the stage `upcycle` (MoMa §2.5).
        experts_implementation: `sequential`, `batched`, `grouped` or `triton`, with equal results;
            if omitted, the one of the first three that measured fastest (`implementations.py`).
    """

    groups: str | tuple[GroupConfig, ...] = "moe_4t4i"
    depth: DepthConfig | None = None
    token_choice: TokenChoiceConfig | None = None
    dim: int = Field(512, ge=2, le=2**20)
    layers: int = Field(8, ge=1, le=2**12)
    heads: int = Field(8, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1, le=2**20)
    hidden_multiple: int = Field(32, ge=1, le=2**20)
    norm: Literal["swin", "pre"] = "swin"
    norm_epsilon: float = Field(1e-5, gt=0)
    query_key_norm: bool = True
    rope_theta: float = Field(10_000.0, gt=0)
    attention_mask: Literal["document", "causal"] = "document"
    dropout: float = Field(0.0, ge=0, lt=1)
    tied_embeddings: bool = False
    router_noise: bool | None = None
    experts_implementation: ImplementationName | None = None

    @field_validator("groups")
    @classmethod
    def _check_name(cls, groups: str | tuple[GroupConfig, ...]) -> str | tuple[GroupConfig, ...]:
        try:
            if isinstance(groups, str):
                named_groups(groups)
        except UserError as error:  # as a `ValueError`, to which file and key are added
            raise ValueError(str(error)) from error
        return groups

    @model_validator(mode="after")
    def _check_sizes(self) -> "ModelConfig":
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be a multiple of 2 × heads ({2 * self.heads})")
        if not self.group_list:
            raise ValueError("groups is empty; name an architecture or list at least one group")
        if self.heads % self.key_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        wrong = [number for number in self.depth_layers if not 0 <= number < self.layers]
        if wrong:
            raise ValueError(f"depth.layers: there is no layer {wrong[0]} among {self.layers}")
        return self

    @model_validator(mode="after")
    def _check_token_choice(self) -> "ModelConfig":
        choice = self.token_choice_config
        if choice is None:
            return self
        experts = [group.experts for group in self.group_list if group.experts > 1]
        if not experts:
            raise ValueError("token choice needs a group of several experts; raise groups.experts")
        if choice.top_k > min(experts):
            raise ValueError(
                f"token_choice.top_k {choice.top_k} exceeds the {min(experts)} experts of a group"
            )
        named = named_token_choice(self.groups) if isinstance(self.groups, str) else None
        if named and (named.data_sparsity < 1) != (choice.data_sparsity < 1):
            raise ValueError(
                f"groups = '{self.groups}' contradicts token_choice.data_sparsity = "
                f"{choice.data_sparsity}: below 1 there are null experts"
            )
        return self

    @property
    def hidden_width(self) -> int:
        """Hidden width F of one expert."""
        if self.hidden is not None:
            return self.hidden
        return -(-(8 * self.dim // 3) // self.hidden_multiple) * self.hidden_multiple

    @property
    def key_heads(self) -> int:
        """Number of key and value heads, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def group_list(self) -> tuple[GroupConfig, ...]:
        """The groups as a list, also if `groups` is a name."""
        return named_groups(self.groups) if isinstance(self.groups, str) else self.groups

    @property
    def depth_config(self) -> DepthConfig | None:
        """Mixture-of-depths, from `depth` or by the name in `groups`; None if not used."""
        named = isinstance(self.groups, str) and self.groups.split("_")[0] == "mod"
        return DepthConfig() if named and self.depth is None else self.depth

    @property
    def token_choice_config(self) -> TokenChoiceConfig | None:
        """Token choice, from `token_choice` or by the name in `groups`; None if not used."""
        if self.token_choice is None and isinstance(self.groups, str):
            return named_token_choice(self.groups)
        return self.token_choice

    @property
    def depth_layers(self) -> frozenset[int]:
        """Numbers of the layers with mixture-of-depths."""
        depth = self.depth_config
        if depth is None:
            return frozenset()
        return frozenset(range(0, self.layers, 2) if depth.layers is None else depth.layers)

    @property
    def implementation(self) -> ImplementationName:
        """The experts' implementation: as configured, or the fastest (docs/results/layer.md)."""
        if self.experts_implementation is not None:
            return self.experts_implementation
        # With mixture-of-depths, single-expert groups have empty slots, which `grouped` skips.
        single = sum(group.experts == 1 for group in self.group_list)
        return "grouped" if self.depth_layers and single > 1 else "sequential"

    @property
    def has_expert_choice(self) -> bool:
        """Whether any layer selects over the micro-batch, so that causal routing differs."""
        return bool(self.depth_layers) or (self.is_routed and self.token_choice_config is None)

    @property
    def is_routed(self) -> bool:
        """Whether scores decide which experts or layers a token uses."""
        return bool(self.depth_layers) or any(group.experts > 1 for group in self.group_list)
