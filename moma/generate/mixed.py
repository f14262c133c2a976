"""A trained model with its tokenizers: text and images in, text and images out."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from moma.errors import UserError
from moma.generate.decode import NewTokens, decode, require_space
from moma.generate.grammar import Mode
from moma.generate.sampling import MAX_SEED
from moma.generate.sequence import Branch, Options, Request
from moma.generate.settings import Settings
from moma.generate.stream import Content, ContentStream, Event, StopStrings, collect
from moma.model.transformer import Transformer
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from moma.tokenizers.text import encode_text, load_text_tokenizer


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
        return [self.model.vocabulary.beginning, *chain.from_iterable(map(self._encode, content))]

    def require_space(self, prompt: Sequence[object], mode: Mode, images: int = 1) -> int:
        """Check that a prompt of texts and images leaves space, without encoding its images.

        Returns:
            The number of its tokens.

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
        return tokens

    def decode(self, ids: Sequence[int], stops: Sequence[str] = ()) -> list[Content]:
        """Return the text and images of a sequence, without incomplete images.

        Text ends before the first of the strings `stops`.
        """
        stream = self.content_stream(stops)
        return collect([*stream.add(ids), *stream.finish()])

    def codes(self, image: Image.Image) -> np.ndarray:
        """Return the codes of an image of any size, int64 [codes_per_image]."""
        tensor_3HW = preprocess(image, self.codec.config.image_size)
        return self.codec.encode(tensor_3HW[None].to(self._device))[0].cpu().numpy()

    def image(self, codes: np.ndarray) -> Image.Image:
        """Return the image of [codes_per_image] codes."""
        return to_pil(self.codec.decode(torch.from_numpy(codes)[None].to(self._device))[0])

    def generate(
        self, prompts: Sequence[Sequence[Content]], settings: Settings | None = None
    ) -> list[list[Content]]:
        """Continue each prompt, and return the text and images that follow it; see `stream`."""
        events: list[list[Event]] = [[] for _ in prompts]
        for number, event in self.stream(prompts, settings):
            events[number].append(event)
        return [collect(each) for each in events]

    def stream(
        self,
        prompts: Sequence[Sequence[Content]],
        settings: Settings | None = None,
        has_rows: bool = False,
    ) -> Iterator[tuple[int, Event]]:
        """Continue prompts together, and yield text and images as they come.

        Args:
            prompts: text and any number of images, in order.
            settings: how; None: the defaults.
            has_rows: whether to yield the upper rows of unfinished images as well.

        Yields:
            The number of a prompt, and what follows it next.

        Raises:
            UserError: there is no prompt, one is longer than the context allows, or images are
                needed and there is no codec.
        """
        if not prompts:
            raise UserError("no prompt given; pass at least one")
        settings = settings or Settings()
        streams = [self.content_stream(settings.stop) for _ in prompts]
        for number, tokens, end in self._decode(enumerate(prompts), settings):
            yield from ((number, event) for event in streams[number].add(tokens, has_rows))
            if end:
                yield from ((number, event) for event in streams[number].finish())

    def answer(
        self,
        prompts: Iterable[tuple[int, Sequence[Content]]],
        batch: int,
        settings: Settings | None = None,
    ) -> Iterator[tuple[int, list[Content]]]:
        """Continue any number of prompts, `batch` at a time, and yield each complete answer.

        The next prompt is taken when an answer is complete (continuous batching).

        Args:
            prompts: pairs of a number and a prompt. Prompt number i has the seed + i.
            batch: maximum number of prompts at a time.

        Yields:
            The number of a prompt, and the text and images that follow it.

        Raises:
            UserError: as for `stream`.
        """
        settings, parts = settings or Settings(), defaultdict[int, list[int]](list)
        for number, tokens, end in self._decode(prompts, settings, batch):
            parts[number] += tokens
            if end:
                yield number, self.decode(parts.pop(number), settings.stop)

    def request(self, prompt: Sequence[Content], settings: Settings, number: int = 0) -> Request:
        """Return the request that continues a prompt, whose number is added to the seed.

        Raises:
            UserError: images are needed, and there is no codec.
        """
        vocabulary, mode = self.model.vocabulary, self.mode(settings)
        sampling, stop = settings.sampling, settings.stop
        options = Options(
            mode,
            self.context,
            self.context if settings.new_tokens is None else settings.new_tokens,
            sampling,
            image_sampling=settings.code_sampling,
            images=settings.images,
            drafts=settings.drafts,
            stop=StopStrings(self.tokenizer, vocabulary, stop) if stop else None,
        )
        parts: list[tuple[Sequence[Content], float]] = [(prompt, 1.0)]
        if settings.guidance is not None:
            parts = [*settings.guidance.branches(prompt)]
        # Branches repeat parts of the prompt, and images take long to encode.
        ids_of = {id(part): self._encode(part) for part in prompt}
        branches = [
            Branch([vocabulary.beginning, *chain(*(ids_of[id(each)] for each in part))], weight)
            for part, weight in parts
        ]
        return Request(branches, options, (sampling.seed + number) % (MAX_SEED + 1))

    def mode(self, settings: Settings) -> Mode:
        """What is generated: without a codec, `mixed` means `text`.

        Raises:
            UserError: images are needed, and there is no codec.
        """
        if settings.mode == "image":
            _ = self.codec  # raises if there is none
        is_text = settings.mode == "mixed" and self.image_codec is None
        return "text" if is_text else settings.mode

    def content_stream(self, stops: Sequence[str] = ()) -> ContentStream:
        """Return what turns the tokens of an answer into text and images; see `ContentStream`."""
        return ContentStream(self.tokenizer, self.model.vocabulary, self.image, stops)

    def _encode(self, part: Content) -> list[int]:
        if isinstance(part, str):
            return encode_text(self.tokenizer, part)
        return self.model.vocabulary.wrap_image(self.codes(part))

    def _decode(
        self,
        prompts: Iterable[tuple[int, Sequence[Content]]],
        settings: Settings,
        batch: int | None = None,
    ) -> Iterator[NewTokens]:
        """Continue numbered prompts and yield their tokens by these numbers."""
        requests = ((number, self.request(each, settings, number)) for number, each in prompts)
        return decode(self.model, requests, batch)

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device
