"""A trained model with its tokenizers: text and images in, text and images out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from moma.errors import UserError
from moma.generate.decode import NewTokens, decode, require_space
from moma.generate.grammar import Mode
from moma.generate.guidance import Guidance
from moma.generate.sampling import MAX_SEED, Sampling
from moma.generate.sequence import Branch, Options, Request
from moma.generate.stream import Content, ContentStream, Event, StopStrings, collect
from moma.model.transformer import Transformer
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from moma.tokenizers.text import encode_text, load_text_tokenizer

# Near the fastest number at batch 1 in docs/results/generate.md.
DRAFTS = 8


class GenerateOptions(TypedDict, total=False):
    """Options of `MixedModel.generate` besides its parameters.

    Attributes:
        image_sampling: how image codes are sampled; if omitted, like text.
        images: number of images that the mode `image` generates.
        guidance: guidance of images by the prompt, for the mode `image`; if omitted, none.
        stop: strings that end a text; they are left out.
        drafts: number of image codes that a pass checks besides sampling one; 8 if omitted. The
            result does not depend on it.
    """

    image_sampling: Sampling | None
    images: int
    guidance: Guidance | None
    stop: Sequence[str]
    drafts: int


@dataclass(frozen=True)
class MixedModel:
    """A model ready for causal use.

    Attributes:
        model: the transformer, in evaluation mode.
        tokenizer: its text tokenizer.
        image_codec: its image tokenizer; None if its data has no images.
        context: maximum number of tokens of a sequence, as in training.
    """

    model: Transformer
    tokenizer: Tokenizer
    image_codec: ImageCodec | None
    context: int

    @classmethod
    def assemble(cls, model: Transformer, tokenizers: Tokenizers, context: int) -> "MixedModel":
        """Combine a model with the tokenizers of its run.

        Raises:
            UserError: a tokenizer is missing or broken.
        """
        codec = None
        if tokenizers.codec.is_dir():
            codec = ImageCodec.load(tokenizers.codec).to(model.embedding.weight.device)
        return cls(model, load_text_tokenizer(tokenizers.text), codec, context)

    @property
    def codec(self) -> ImageCodec:
        """The image tokenizer.

        Raises:
            UserError: there is none.
        """
        if self.image_codec is None:
            raise UserError(
                "this model has no image codec (no folder 'codec' next to its tokenizer.json); it "
                "cannot read or generate images; use text only, or prepare data with images"
            )
        return self.image_codec

    def encode(self, content: Sequence[Content]) -> list[int]:
        """Return the token ids of interleaved text and images, as the beginning of a document."""
        ids = [self.model.vocabulary.beginning]
        for part in content:
            if isinstance(part, str):
                ids += encode_text(self.tokenizer, part)
            else:
                ids += self.model.vocabulary.wrap_image(self.codes(part))
        return ids

    def require_space(self, prompt: Sequence[object], mode: Mode, images: int = 1) -> None:
        """Check that a prompt of texts and images leaves space, without encoding its images.

        Raises:
            UserError: it does not, or there is no codec for its images.
        """
        tokens = 1
        for part in prompt:
            if isinstance(part, str):
                tokens += len(encode_text(self.tokenizer, part))
            else:
                _ = self.codec  # raises if there is none
                tokens += self.model.vocabulary.image_span
        require_space(tokens, self.model.vocabulary, mode, self.context, images)

    def decode(self, ids: Sequence[int]) -> list[Content]:
        """Return the text and images of a sequence, without incomplete images."""
        stream = self._content_stream()
        return collect([*stream.add(ids), *stream.finish()])

    def codes(self, image: Image.Image) -> np.ndarray:
        """Return the codes of an image of any size, int64 [codes_per_image]."""
        tensor_3HW = preprocess(image, self.codec.config.image_size)
        return self.codec.encode(tensor_3HW[None].to(self._device))[0].cpu().numpy()

    def image(self, codes: np.ndarray) -> Image.Image:
        """Return the image of [codes_per_image] codes."""
        return to_pil(self.codec.decode(torch.from_numpy(codes)[None].to(self._device))[0])

    def generate(
        self,
        prompts: Sequence[Sequence[Content]],
        mode: Mode = "mixed",
        sampling: Sampling | None = None,
        new_tokens: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> list[list[Content]]:
        """Continue each prompt, and return the text and images that follow it; see `stream`."""
        events: list[list[Event]] = [[] for _ in prompts]
        for number, event in self.stream(prompts, mode, sampling, new_tokens, **options):
            events[number].append(event)
        return [collect(each) for each in events]

    def stream(
        self,
        prompts: Sequence[Sequence[Content]],
        mode: Mode = "mixed",
        sampling: Sampling | None = None,
        new_tokens: int | None = None,
        has_rows: bool = False,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[tuple[int, Event]]:
        """Continue prompts together, and yield text and images as they come.

        Args:
            prompts: text and any number of images, in order.
            mode: `text`, `image` or `mixed`; without a codec, `mixed` means `text`.
            sampling: if omitted, Chameleon's defaults. Prompt number i has the seed + i.
            new_tokens: maximum number of tokens of a continuation; if omitted, what the context
                allows.
            has_rows: whether to yield the upper rows of unfinished images as well.
            options: see `GenerateOptions`.

        Yields:
            The number of a prompt, and what follows it next.

        Raises:
            UserError: there is no prompt, one is longer than the context allows, an option is out
                of range, or images are needed and there is no codec.
        """
        if not prompts:
            raise UserError("no prompt given; pass at least one")
        streams = [self._content_stream(options.get("stop", ()), has_rows) for _ in prompts]
        numbered = enumerate(prompts)
        for number, tokens, is_last in self._decode(numbered, mode, sampling, new_tokens, options):
            yield from ((number, event) for event in streams[number].add(tokens))
            if is_last:
                yield from ((number, event) for event in streams[number].finish())

    def answer(
        self,
        prompts: Iterable[tuple[int, Sequence[Content]]],
        batch: int,
        mode: Mode = "mixed",
        sampling: Sampling | None = None,
        new_tokens: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[tuple[int, list[Content]]]:
        """Continue any number of prompts, `batch` at a time, and yield each complete answer.

        The next prompt is taken when an answer is complete (continuous batching).

        Args:
            prompts: pairs of a number and a prompt. Prompt number i has the seed + i.
            mode, sampling, new_tokens, options: as for `stream`.

        Yields:
            The number of a prompt, and the text and images that follow it.

        Raises:
            UserError: as for `stream`.
        """
        parts: dict[int, list[int]] = defaultdict(list)
        found = self._decode(prompts, mode, sampling, new_tokens, options, batch)
        for number, tokens, is_last in found:
            parts[number] += tokens
            if is_last:
                stream = self._content_stream(options.get("stop", ()))
                yield number, collect([*stream.add(parts.pop(number)), *stream.finish()])

    def _decode(
        self,
        prompts: Iterable[tuple[int, Sequence[Content]]],
        mode: Mode,
        sampling: Sampling | None,
        new_tokens: int | None,
        options: GenerateOptions,
        batch: int | None = None,
    ) -> Iterator[NewTokens]:
        """Continue numbered prompts and yield their tokens by these numbers."""
        if self.image_codec is None and mode == "mixed":
            mode = "text"
        if mode != "text":
            _ = self.codec  # raises if there is none
        sampling = sampling or Sampling()
        stops, numbers = options.get("stop", ()), list[int]()
        settings = Options(
            mode,
            self.context,
            self.context if new_tokens is None else new_tokens,
            sampling,
            image_sampling=options.get("image_sampling"),
            images=options.get("images", 1),
            drafts=options.get("drafts", DRAFTS),
            stop=StopStrings(self.tokenizer, self.model.vocabulary, stops) if stops else None,
        )

        def requests() -> Iterator[Request]:
            for number, prompt in prompts:
                numbers.append(number)
                yield self._request(
                    prompt, mode, (sampling.seed + number) % (MAX_SEED + 1), options
                )

        for index, tokens, is_last in decode(self.model, requests(), settings, batch):
            yield NewTokens(numbers[index], tokens, is_last)

    def _request(
        self, prompt: Sequence[Content], mode: Mode, seed: int, options: GenerateOptions
    ) -> Request:
        guidance = options.get("guidance")
        if guidance is None:
            return Request([Branch(self.encode(prompt))], seed)
        if mode != "image":
            raise UserError(
                f"guidance applies to images only; use it with mode 'image', not '{mode}'"
            )
        branches = guidance.branches(prompt)
        return Request([Branch(self.encode(part), weight) for part, weight in branches], seed)

    def _content_stream(self, stops: Sequence[str] = (), has_rows: bool = False) -> ContentStream:
        return ContentStream(self.tokenizer, self.model.vocabulary, self.image, stops, has_rows)

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device
