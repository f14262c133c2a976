"""The recipe: one file that configures data preparation, model, training and evaluation."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from moma.data.config import PrepareConfig
from moma.model.architecture import ModelConfig
from moma.model.attention_kernels import AttentionKernel, attention_kernel
from moma.model.transformer import Transformer
from moma.recipe import Config, RequiredPath
from moma.runtime.optimizer import OptimizerConfig
from moma.runtime.sharding import EngineConfig
from moma.runtime.tracking import TrackingConfig
from moma.vocabulary import IMAGE, MODALITIES, Vocabulary


class StageConfig(Config):
    """How a stage trains.

    Attributes:
        steps: number of optimizer steps.
        gradient_accumulation_steps: micro-batches per rank whose gradients are accumulated in one
            optimizer step.
        log_every: steps between records of `metrics.jsonl`; losses in a record are means over
            them.
        checkpoint_every: steps between checkpoints, a multiple of `log_every`.
        keep_checkpoints: number of newest checkpoints to keep.
        keep_every: checkpoints at multiples of this number of steps are kept too; a multiple of
            `checkpoint_every`; 0: none.
        on_fault: what to do if a loss or gradient is not finite or the loss explodes: `stop`, and
            save what `moma replay` needs, or `skip` the step and count it.
        explosion: a loss above this multiple of its recent mean counts as exploded; 0: never.
        z_loss: weight of (log Z)², which keeps logits from drifting (Chameleon §2.3).
        finish: share of the steps, the last ones, that route by thresholds, as generation does, but
            with the slots of training: where these do not suffice, the tokens with the lowest
            scores are dropped.
        auxiliary_routers: whether to train the auxiliary routers at the same time. Their gradients
            do not reach the model, but count in the norm that `optimizer.clip` limits.
        compile: whether to compile the layers.
        optimizer: the optimizer and its schedule.
    """

    steps: int = Field(160_000, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    on_fault: Literal["stop", "skip"] = "stop"
    explosion: float = Field(5.0, ge=0)
    z_loss: float = Field(1e-5, ge=0)
    finish: float = Field(0.0, ge=0, lt=1)
    auxiliary_routers: bool = False
    compile: bool = True
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _check_intervals(self) -> "StageConfig":
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of "
                f"log_every ({self.log_every}), so that a checkpoint follows a complete record"
            )
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}), since there are checkpoints at these steps only"
            )
        return self

    def routes_by_threshold(self, step: int) -> bool:
        """Whether a step, from 1, routes by thresholds, as the last ones do; see `finish`."""
        return step > self.steps - round(self.finish * self.steps)


class RouterOptimizerConfig(OptimizerConfig):
    """AdamW for auxiliary routers (MoMa Table 6)."""

    algorithm: Literal["adamw"] = "adamw"
    warmup: int = Field(1000, ge=0)
    weight_decay: float = Field(0.0, ge=0)


class RouterStageConfig(StageConfig):
    """How the stage `aux_router` trains (MoMa Table 6)."""

    steps: int = Field(5000, ge=1)
    optimizer: RouterOptimizerConfig = RouterOptimizerConfig()

    @model_validator(mode="after")
    def _check_finish(self) -> "RouterStageConfig":
        if self.finish:
            raise ValueError("auxiliary routers learn expert choice to the end; leave finish out")
        if self.auxiliary_routers:
            raise ValueError("auxiliary_routers: this stage trains nothing else; leave it out")
        return self


class ValidationConfig(Config):
    """Measurements on held-out documents while a run trains.

    Attributes:
        every: steps between measurements, a multiple of the stage's `log_every`; 0: none.
        batches: number of held-out micro-batches; fewer if there are not as many.
        keep_best: held-out loss, under causal routing, whose best checkpoint is kept, and named in
            `checkpoints/best`.
        prompts: texts; an image is generated for each.
    """

    every: int = Field(0, ge=0)
    batches: int = Field(16, ge=1)
    keep_best: Literal["loss", "loss_text", "loss_image"] | None = None
    prompts: tuple[str, ...] = ()


class Recipe(PrepareConfig):
    """A recipe.

    Attributes:
        run: the folder that `moma train` writes; new, or that of the same run to resume.
        stage: what `moma train` trains: `pretrain`: a model, from the weights of the run `from` if
            given; `upcycle`: a model upcycled from the seed run `from`; `aux_router`: the auxiliary
            routers of the finished run `from`.
        from_: an existing run folder; see `stage`.
        model: the model.
        engine: use of the machines.
        tracking: where metrics are shown.
        pretrain: training in the stage `pretrain`.
        validation: measurements on held-out documents during training.
        upcycle: training in the stage `upcycle`.
        aux_router: training in the stage `aux_router`.
    """

    run: RequiredPath = Path("runs/run")
    stage: Literal["pretrain", "upcycle", "aux_router"] = "pretrain"
    from_: RequiredPath | None = Field(None, alias="from")
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()
    validation: ValidationConfig = ValidationConfig()
    pretrain: StageConfig = StageConfig()
    upcycle: StageConfig = StageConfig()
    aux_router: RouterStageConfig = RouterStageConfig()

    @model_validator(mode="after")
    def _check_modalities(self) -> "Recipe":
        named = {name for group in self.model.group_list for name in group.modalities}
        if unknown := sorted(named - set(MODALITIES)):
            known = ", ".join(MODALITIES)
            raise ValueError(f"model.groups: unknown modality '{unknown[0]}'; use {known}")
        if missing := [name for name in MODALITIES if name not in named]:
            raise ValueError(f"model.groups: no group takes '{missing[0]}' tokens; add one")
        depth = self.model.depth_config
        factors = depth.modality_factors if depth is not None else None
        if factors is not None and factors.keys() != set(MODALITIES):
            raise ValueError(
                f"model.depth.modality_factors: give one factor for each of {', '.join(MODALITIES)}"
            )
        return self

    @model_validator(mode="after")
    def _check_float8(self) -> "Recipe":
        has_kernels = not all(group.is_dense() for group in self.model.group_list)
        uses_triton = has_kernels and self.model.implementation == "triton"
        if self.engine.float8 != "off" and uses_triton:
            raise ValueError(
                f"engine.float8 ('{self.engine.float8}'): model.experts_implementation = 'triton' "
                "has no products in float8; use another implementation, or engine.float8 = 'off'"
            )
        return self

    @model_validator(mode="after")
    def _check_from(self) -> "Recipe":
        meaning = {"aux_router": "the run whose routers it trains", "upcycle": "the seed run"}
        if self.stage in meaning and self.from_ is None:
            raise ValueError(f"stage '{self.stage}' needs from=RUN, {meaning[self.stage]}")
        return self

    @model_validator(mode="after")
    def _check_auxiliary_routers(self) -> "Recipe":
        if self.stage_config.auxiliary_routers and not self.model.has_expert_choice:
            raise ValueError(
                f"{self.stage}.auxiliary_routers: '{self.model.groups}' has none; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_validation(self) -> "Recipe":
        every, stage = self.validation.every, self.stage_config
        if every % stage.log_every:
            raise ValueError(
                f"validation.every ({every}) must be a multiple of {self.stage}.log_every "
                f"({stage.log_every}), since held-out losses are part of a log record"
            )
        if self.validation.prompts and not every:
            raise ValueError("validation.prompts need validation.every, the steps between images")
        if self.validation.keep_best and (every == 0 or stage.checkpoint_every % every):
            raise ValueError(
                f"validation.keep_best: {self.stage}.checkpoint_every ({stage.checkpoint_every}) "
                f"must be a multiple of validation.every ({every}), so that every checkpoint has "
                "a held-out loss"
            )
        return self

    @property
    def stage_config(self) -> StageConfig:
        """The configuration of the recipe's stage."""
        stages = {"pretrain": self.pretrain, "upcycle": self.upcycle, "aux_router": self.aux_router}
        return stages[self.stage]

    @property
    def trains_auxiliary_routers(self) -> bool:
        """Whether the stage trains auxiliary routers."""
        return self.stage == "aux_router" or self.stage_config.auxiliary_routers

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of each modality in a micro-batch, in the order of `MODALITIES`."""
        image = self.data.image_share
        return tuple(image if index == IMAGE else 1 - image for index in range(len(MODALITIES)))

    @property
    def training_model(self) -> ModelConfig:
        """The model's configuration, with the stage's default of `router_noise`."""
        if self.model.router_noise is not None:
            return self.model
        return self.model.model_copy(update={"router_noise": self.stage == "upcycle"})

    def without_compilation(self) -> "Recipe":
        """The recipe of the same stage with uncompiled layers."""
        stage = self.stage_config.model_copy(update={"compile": False})
        return self.model_copy(update={self.stage: stage})

    def build_model(self, vocabulary: Vocabulary) -> Transformer:
        """Build the model, with weights initialized from the seed."""
        model = Transformer(self.model, vocabulary, self.shares)
        model.initialize(self.seed)
        return model

    def attention_kernel(self, device: torch.device, trains: bool = False) -> AttentionKernel:
        """The attention kernel for a device and the recipe's dtype of matrix products.

        `engine.deterministic` only matters if the model trains.
        """
        head_width = self.model.dim // self.model.heads
        deterministic = trains and self.engine.deterministic
        dtype = self.engine.compute_dtype(device)
        return attention_kernel(device, dtype, head_width, deterministic)
