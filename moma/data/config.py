"""What `moma prepare` reads of a recipe: the sources, and the tokenizers that encode them."""

from pathlib import Path

from pydantic import Field, model_validator

from moma.data.remote.address import Address
from moma.data.sources.registry import AnySource
from moma.recipe import Config, RequiredPath, Seed
from moma.tokenizers.image.codec import CodecConfig
from moma.tokenizers.image.train import CodecTrainingConfig
from moma.tokenizers.text import TextTokenizerConfig

MAX_MICRO_BATCH = 2**24
"""Most tokens of a micro-batch: making one takes up to a minute, in which no signal is heeded."""


class DataConfig(Config):
    """What a model is trained on, and how it is cut into micro-batches.

    Attributes:
        path: folder of the prepared data: tokenizers, and the shards of each source.
        remote: address where tokenizers and shards are kept, such as `s3://bucket/folder`;
            `path` then has copies of what is read.
        cache_bytes: largest size of the shards of `remote` that `path` has copies of.
        tokenizers: a prepared folder or a run whose tokenizer and codec are used; by default they
            are trained on the sources.
        micro_batch_size: sequences of a micro-batch, the share of one rank in one step (B).
        sequence_length: tokens of a sequence (S).
        image_share: share of a micro-batch's tokens that are image codes.
        held_out: share of the documents kept from training, where a source does not decide it.
        max_rejected: share of a source's rows that may be unusable before `prepare` stops.
        shard_tokens: tokens after which `prepare` begins another file of shards.
        part_bytes: approximate size of the parts of a source that are encoded independently.
        max_padding: largest share of positions that may be padding; documents that leave more
            are refused.
        workers: background threads: the first makes micro-batches ahead, further ones read
            documents ahead; with 0, each micro-batch is made when it is needed. The micro-batches
            do not depend on it.
        prefetch: number of micro-batches that are made ahead.
        sources: where documents come from; a source's weight counts documents, among the
            documents with images and among those without.
    """

    path: RequiredPath
    remote: Address | None = None
    cache_bytes: int = Field(default=2**36, ge=1)
    tokenizers: RequiredPath | None = None
    micro_batch_size: int = Field(ge=1, le=MAX_MICRO_BATCH)
    sequence_length: int = Field(ge=2, le=MAX_MICRO_BATCH)
    image_share: float = Field(ge=0, le=1)
    held_out: float = Field(default=0.02, ge=0, lt=1)
    max_rejected: float = Field(default=0.01, ge=0, le=1)
    shard_tokens: int = Field(default=2**25, ge=1)
    part_bytes: int = Field(default=2**28, ge=1)
    max_padding: float = Field(default=0.005, ge=0, le=1)
    workers: int = Field(default=1, ge=0, le=64)
    prefetch: int = Field(default=4, ge=1, le=2**10)
    sources: tuple[AnySource, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several sources are named {', '.join(twice)}; give each a 'name'")
        return self

    @model_validator(mode="after")
    def _check_micro_batch(self) -> "DataConfig":
        if (tokens := self.micro_batch_size * self.sequence_length) > MAX_MICRO_BATCH:
            raise ValueError(
                f"micro_batch_size · sequence_length is {tokens:,}, and a micro-batch has at most "
                f"{MAX_MICRO_BATCH:,} tokens; lower one of them"
            )
        return self

    def folder(self, name: str) -> Path:
        """Folder of a source's shards."""
        return self.path / "shards" / name


class PrepareConfig(Config):
    """Everything that determines the encoded shards; `Recipe` extends it.

    Attributes:
        seed: seed of every random choice: data order, initial weights, codec.
        text_tokenizer: how the text tokenizer is trained.
        codec: the image codec.
        codec_training: how the image codec is trained.
        data: what a model is trained on.
    """

    seed: Seed = 0
    text_tokenizer: TextTokenizerConfig = TextTokenizerConfig()
    codec: CodecConfig = CodecConfig()
    codec_training: CodecTrainingConfig = CodecTrainingConfig()
    data: DataConfig
