"""The shape of a model: everything that decides its parameters and operations."""

from typing import Literal

from pydantic import Field, model_validator

from moma.model.depth import DepthConfig
from moma.model.experts import GroupConfig, named_groups
from moma.model.implementations import ImplementationName
from moma.recipe import Config


class ModelConfig(Config):
    """Shape of the transformer.

    Attributes:
        groups: the feed-forward's groups of experts: a name of the paper's (`dense`, `moe_8x`,
            `moe_4t4i`, …) or a list of `{modalities, experts}`. `mod` and `mod_moe_4t4i` add
            mixture-of-depths.
        depth: mixture-of-depths; left out, there is none unless `groups` names it.
        dim: width D, a multiple of 2 · `heads`.
        layers: number of layers L.
        heads: number of attention heads H.
        kv_heads: heads of keys and values, a divisor of `heads`; left out, as many.
        hidden: hidden width F of an expert; left out, 8 · dim / 3 rounded up to `hidden_multiple`.
        hidden_multiple: what the default of `hidden` is rounded up to a multiple of.
        norm: `swin` normalises what a layer adds (MoMa §2.2), `pre` what it reads.
        norm_epsilon: added to the mean square in RMSNorm.
        query_key_norm: whether each head's queries and keys are normalised (LayerNorm).
        rope_theta: base of the rotary embedding's wavelengths.
        attention_mask: `document` limits attention to the token's own document, `causal` lets it
            reach everything before it in its sequence.
        dropout: part of what attention and experts add that is dropped while training
            (Chameleon §2.3.1: 0.1 in the 7B model, which has `norm = "pre"`).
        tied_embeddings: whether the head is the embedding table; then what is looked up is
            multiplied by √D, so that one scale suits both (arXiv 1706.03762 §3.4).
        router_noise: whether logits of the experts' routers get Gumbel-Sigmoid noise while
            training, for upcycling (MoMa §2.5).
        experts_implementation: `sequential`, `batched` or `grouped` (`implementations.py`), with
            equal results; if omitted, the one that measured fastest.
    """

    groups: str | tuple[GroupConfig, ...] = "moe_4t4i"
    depth: DepthConfig | None = None
    dim: int = Field(512, ge=2)
    layers: int = Field(8, ge=1)
    heads: int = Field(8, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    hidden: int | None = Field(None, ge=1)
    hidden_multiple: int = Field(32, ge=1)
    norm: Literal["swin", "pre"] = "swin"
    norm_epsilon: float = 1e-5
    query_key_norm: bool = True
    rope_theta: float = 10_000.0
    attention_mask: Literal["document", "causal"] = "document"
    dropout: float = Field(0.0, ge=0, lt=1)
    tied_embeddings: bool = False
    router_noise: bool = False
    experts_implementation: ImplementationName | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> "ModelConfig":
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

    @property
    def hidden_width(self) -> int:
        """Hidden width F of one expert."""
        if self.hidden is not None:
            return self.hidden
        return -(-(8 * self.dim // 3) // self.hidden_multiple) * self.hidden_multiple

    @property
    def key_heads(self) -> int:
        """Heads of keys and values, G."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def group_list(self) -> tuple[GroupConfig, ...]:
        """The groups, spelled out."""
        return named_groups(self.groups) if isinstance(self.groups, str) else self.groups

    @property
    def depth_config(self) -> DepthConfig | None:
        """Mixture-of-depths, by its own section or by the name in `groups`; None: there is none."""
        named = isinstance(self.groups, str) and self.groups.split("_")[0] == "mod"
        return DepthConfig() if named and self.depth is None else self.depth

    @property
    def depth_layers(self) -> frozenset[int]:
        """Numbers of the layers that choose their tokens."""
        depth = self.depth_config
        if depth is None:
            return frozenset()
        return frozenset(range(0, self.layers, 2) if depth.layers is None else depth.layers)

    @property
    def implementation(self) -> ImplementationName:
        """How the groups' products are run (docs/results/layer.md)."""
        if self.experts_implementation is not None:
            return self.experts_implementation
        # Lone experts behind a gate have room for more tokens than come; `grouped` skips it.
        lone = sum(group.experts == 1 for group in self.group_list)
        return "grouped" if self.depth_layers and lone > 1 else "sequential"

    @property
    def has_routers(self) -> bool:
        """Whether something is chosen among tokens, so that auxiliary routers are needed."""
        return bool(self.depth_layers) or any(group.experts > 1 for group in self.group_list)
