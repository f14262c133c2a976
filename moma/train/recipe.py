"""The whole recipe: one file that says what is prepared, trained and measured."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from moma.data.config import PrepareConfig
from moma.model.architecture import ModelConfig
from moma.model.transformer import Transformer
from moma.recipe import Config, RequiredPath
from moma.runtime.optimizer import OptimizerConfig
from moma.runtime.sharding import EngineConfig
from moma.runtime.tracking import TrackingConfig
from moma.vocabulary import IMAGE, MODALITIES, Vocabulary


class StageConfig(Config):
    """How long and how a stage trains.

    Attributes:
        steps: optimizer steps.
        gradient_accumulation_steps: batches whose gradients are added up in one step, on every
        rank.
        log_every: steps between rows of `metrics.jsonl`; a row is the mean over them.
        checkpoint_every: steps between checkpoints, a multiple of `log_every`.
        keep_checkpoints: how many of the newest stay.
        keep_every: checkpoints at multiples of so many steps, itself a multiple of
            `checkpoint_every`, stay as well; 0: none.
        on_fault: what happens when a loss or gradient is not finite or explodes: `stop`, with what
            `moma replay` needs, or `skip` the step and count it.
        explosion: a loss so many times its recent mean has exploded; 0: none has.
        z_loss: weight of (log Z)², which keeps logits from drifting (Chameleon §2.3.2).
        compile: whether layers run as compiled graphs.
    """

    steps: int = Field(160_000, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    keep_every: int = Field(0, ge=0)
    on_fault: Literal["stop", "skip"] = "stop"
    explosion: float = Field(5.0, ge=0)
    z_loss: float = 1e-5
    compile: bool = True
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _whole_rows_at_checkpoints(self) -> "StageConfig":
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every ({self.checkpoint_every}) must be a multiple of "
                f"log_every ({self.log_every}), so that no row of metrics.jsonl is cut in two"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_to_keep(self) -> "StageConfig":
        if self.keep_every % self.checkpoint_every:
            raise ValueError(
                f"keep_every ({self.keep_every}) must be a multiple of checkpoint_every "
                f"({self.checkpoint_every}): only at these steps is there one to keep"
            )
        return self


class RouterOptimizerConfig(OptimizerConfig):
    """AdamW for auxiliary routers (MoMa Table 6)."""

    warmup: int = Field(1000, ge=0)
    weight_decay: float = Field(0.0, ge=0)


class RouterStageConfig(StageConfig):
    """How auxiliary routers are trained (MoMa Table 6)."""

    steps: int = Field(5000, ge=1)
    optimizer: RouterOptimizerConfig = RouterOptimizerConfig()


class Recipe(PrepareConfig):
    """A recipe.

    Attributes:
        run: the folder that `moma train` writes.
        stage: what `moma train` does: `pretrain`; `upcycle`, which grows the seed run `from`; or
            `aux_router` on the finished run `from`.
    """

    run: RequiredPath = Path("runs/run")
    stage: Literal["pretrain", "upcycle", "aux_router"] = "pretrain"
    from_: RequiredPath | None = Field(None, alias="from")
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    tracking: TrackingConfig = TrackingConfig()
    pretrain: StageConfig = StageConfig()
    upcycle: StageConfig = StageConfig()
    aux_router: RouterStageConfig = RouterStageConfig()

    @model_validator(mode="after")
    def _every_modality_has_experts(self) -> "Recipe":
        named = {name for group in self.model.group_list for name in group.modalities}
        if unknown := sorted(named - set(MODALITIES)):
            known = ", ".join(MODALITIES)
            raise ValueError(f"model.groups: there is no modality '{unknown[0]}'; write {known}")
        if missing := [name for name in MODALITIES if name not in named]:
            raise ValueError(f"model.groups: no group takes '{missing[0]}' tokens; give it one")
        return self

    @model_validator(mode="after")
    def _stage_has_a_model(self) -> "Recipe":
        if self.stage == "aux_router" and self.from_ is None:
            raise ValueError("stage 'aux_router' needs from=RUN, the run whose routers it trains")
        if self.stage == "upcycle" and self.from_ is None:
            raise ValueError("stage 'upcycle' needs from=RUN, the seed that it grows")
        return self

    @property
    def stage_config(self) -> StageConfig:
        """The settings of the stage that the recipe names."""
        return {
            "pretrain": self.pretrain,
            "upcycle": self.upcycle,
            "aux_router": self.aux_router,
        }[self.stage]

    @property
    def shares(self) -> tuple[float, ...]:
        """Part of each modality in a batch, in the order of `MODALITIES`."""
        image = self.data.image_share
        return tuple(image if index == IMAGE else 1 - image for index in range(len(MODALITIES)))

    def build_model(self, vocabulary: Vocabulary) -> Transformer:
        """The transformer that the recipe describes, its weights drawn from the seed."""
        model = Transformer(self.model, vocabulary, self.shares)
        model.initialise(self.seed)
        return model
