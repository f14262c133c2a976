"""moma's models in `transformers`: `import moma.hub.auto` registers them with its Auto classes.

    AutoModelForCausalLM.from_pretrained(FOLDER)    → `MomaForCausalLM`
    AutoProcessor.from_pretrained(FOLDER)           → `MomaProcessor`

The folder is one that `moma export` wrote. Shapes: see `model/layers.py`.
"""

import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from moma.errors import UserError, list_names
from moma.generate.grammar import Grammar, Mode
from moma.hub.moma_format import MODEL_TYPE, parse_config
from moma.hub.processor import MomaProcessor
from moma.model.caches import Caches
from moma.model.routing import ROUTINGS, CausalName
from moma.model.transformer import Transformer
from moma.vocabulary import Vocabulary


class MomaConfig(PreTrainedConfig):
    """The content of `config.json`; see `HubConfig`."""

    model_type = MODEL_TYPE
    recipe: dict[str, Any] | None = None
    vocabulary: dict[str, Any] | None = None
    causal_routing: CausalName = "threshold"
    auxiliary_routers: bool = False
    max_position_embeddings: int = 4096
    vocab_size: int = 65_536
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    tie_word_embeddings: bool = False


class MomaForCausalLM(PreTrainedModel, GenerationMixin):
    """A `Transformer` under causal routing.

    Raises:
        UserError: the configuration does not describe a model of moma.
    """

    config: MomaConfig
    base_model_prefix = "model"
    # Rounding would decide close calls of routers.
    _keep_in_fp32_modules_strict = ["router", "auxiliary"]  # noqa: RUF012
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: MomaConfig):
        super().__init__(config)
        hub, vocabulary = parse_config(config.to_dict(), config.name_or_path or "config.json")
        self.model = Transformer(hub.recipe.model, vocabulary, hub.recipe.shares)
        self.model.has_auxiliary = hub.auxiliary_routers
        self.model.causal_routing = ROUTINGS[hub.causal_routing]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Restore the buffer that is not stored, and initialize a model without weights."""
        if not isinstance(module, Transformer):
            return
        module.modality_of_id.copy_(torch.from_numpy(module.vocabulary.modality_of_id))
        named = module.state_dict(keep_vars=True)
        new = [name for name in named if not getattr(named[name], "_is_hf_initialized", False)]
        if len(new) == len(named):
            module.initialize(seed=0)
        elif new:
            raise UserError(
                f"the weights lack {list_names(new, 3)}; get a complete copy, or export the run "
                "again with this version of moma"
            )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the caches are `Caches`

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding."""
        return self.model.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        """The head."""
        return self.model.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Caches | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each position.

        Args:
            input_ids: int64 [B, S]; padding may be on either side.
            attention_mask: 0 for padding, of the new tokens or of all; padding ids are padding
                anyway.
            past_key_values: earlier tokens, from the output of an earlier call.
            labels: ids of which the mean cross-entropy is computed, not shifted, [B, S]; −100 for
                none.
            logits_to_keep: number of last positions whose logits are computed; 0: all.
            kwargs: ignored.
        """
        model, caches = self.model, past_key_values
        if attention_mask is not None:
            attends_BS = attention_mask[:, -input_ids.shape[1] :].bool()
            input_ids = input_ids.where(attends_BS, model.vocabulary.padding)
        if use_cache and caches is None:
            caches = model.new_caches(len(input_ids))
        # Our padding follows all tokens of its sequence.
        order_BS = (input_ids == model.vocabulary.padding).int().argsort(dim=1, stable=True)
        place_BS1 = order_BS.argsort(dim=1)[:, :, None]

        def head(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
            hidden_BSD = hidden_BSD.gather(1, place_BS1.expand_as(hidden_BSD))
            return functional.linear(hidden_BSD[:, -logits_to_keep:], weight_VD)

        routing = model.named_routing("causal", raises=False, checks=False)
        output = model(input_ids.gather(1, order_BS), routing=routing, head=head, caches=caches)
        logits_BSV, loss = output.head, None
        if labels is not None:
            loss = self.loss_function(logits_BSV, labels, vocab_size=logits_BSV.shape[-1])
        kept = cast(Any, caches if use_cache else None)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BSV, past_key_values=kept)

    def _reorder_cache(self, past_key_values: Caches, beam_idx: Tensor) -> Caches:
        past_key_values.select(beam_idx.tolist())
        return past_key_values

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        mode: Mode = "mixed",
        logits_processor: LogitsProcessorList | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `GenerationMixin.generate`, with complete images only.

        Args:
            inputs, generation_config, args, kwargs: of `GenerationMixin.generate`.
            mode: what to generate: `text`, one `image` (several, if `eos_token_id` is another one
                than that of `self.generation_config`), or `mixed`.
        """
        prompt_BS = kwargs["input_ids"] if inputs is None else inputs
        vocabulary, context = self.model.vocabulary, self.config.max_position_embeddings
        configs = [each for each in (generation_config, self.generation_config) if each is not None]

        def option(name: str) -> Any:
            values = (kwargs.get(name), *(getattr(each, name) for each in configs))
            return next((value for value in values if value is not None), None)

        ours: dict[str, Any] = {}
        if (new_tokens := option("max_new_tokens")) is not None:
            length = prompt_BS.shape[1] + new_tokens
        elif (length := option("max_length")) is None:
            length = ours["max_length"] = context
        if mode == "image" and option("eos_token_id") == self.generation_config.eos_token_id:
            ours["eos_token_id"] = vocabulary.end_image
        if generation_config is None:
            kwargs |= ours
        else:  # `transformers` deprecates arguments beside a configuration
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**ours)
        grammar = GrammarProcessor(vocabulary, mode, min(length, context))
        processors = LogitsProcessorList([grammar, *(logits_processor or [])])
        base: Any = super()
        return base.generate(
            inputs, generation_config, *args, logits_processor=processors, **kwargs
        )


class GrammarProcessor(LogitsProcessor):
    """Allows the ids that `Grammar` allows next.

    Args:
        limit: maximum number of tokens of a sequence; an image begins only if it fits.
    """

    def __init__(self, vocabulary: Vocabulary, mode: Mode, limit: int):
        self._vocabulary, self._mode, self._limit = vocabulary, mode, limit
        self._is_code_V = torch.from_numpy(vocabulary.code_of_id >= 0)
        self._is_text_V = ~self._is_code_V
        never = [vocabulary.beginning, vocabulary.padding, vocabulary.end_image]
        self._is_text_V[never] = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Set the logits [B, V] of other ids to −∞."""
        allowed_BV = torch.stack([self._allowed(tokens) for tokens in input_ids.tolist()])
        return scores.masked_fill(~allowed_BV.to(scores.device), -torch.inf)

    def _allowed(self, tokens: list[int]) -> Tensor:
        grammar = Grammar(self._vocabulary, self._mode)
        # All of an unfinished image, if every earlier image of the prompt is complete.
        for token in tokens[-self._vocabulary.image_span :]:
            grammar.advance(token)
        allowed = grammar.allowed(self._limit - len(tokens))
        if allowed.codes:
            return self._is_code_V
        if allowed.forced is not None:
            return torch.arange(len(self._is_code_V)) == allowed.forced
        allowed_V = self._is_text_V.clone()
        allowed_V[self._vocabulary.begin_image] = allowed.begin_image
        return allowed_V


AutoConfig.register(MODEL_TYPE, MomaConfig)
AutoModelForCausalLM.register(MomaConfig, MomaForCausalLM)
AutoProcessor.register(MomaConfig, MomaProcessor)
