"""A trained model with its tokenizers: text and images in, text and images out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from moma.errors import UserError
from moma.generate.decode import generate
from moma.generate.grammar import Mode
from moma.generate.sampling import Sampling
from moma.model.transformer import Transformer
from moma.runs import Tokenizers
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from moma.tokenizers.text import encode_texts, load_text_tokenizer

Content = str | Image.Image


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
                ids += next(encode_texts(self.tokenizer, [part]))
            else:
                ids += self.model.vocabulary.wrap_image(self.codes(part))
        return ids

    def decode(self, ids: Sequence[int]) -> list[Content]:
        """Return the text and images of a sequence, without incomplete images."""
        content: list[Content] = []
        vocabulary = self.model.vocabulary
        text: list[int] = []
        codes: list[int] = []
        for token in [*ids, vocabulary.end]:
            code = vocabulary.code_of_id[token]
            if code >= 0:
                codes.append(code)
                continue
            if token in (vocabulary.begin_image, vocabulary.end) and text:
                content.append(self.tokenizer.decode(text))
                text = []
            if token == vocabulary.end_image and len(codes) == vocabulary.codes_per_image:
                content.append(self.image(np.array(codes)))
            if token in (vocabulary.begin_image, vocabulary.end_image):
                codes = []
            elif token not in (vocabulary.beginning, vocabulary.end, vocabulary.padding):
                text.append(token)
        return content

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
    ) -> list[list[Content]]:
        """Continue each prompt.

        Args:
            prompts: text and any number of images, in order.
            mode: `text`, `image` or `mixed`; without a codec, `mixed` means `text`.
            sampling: if omitted, Chameleon's defaults.
            new_tokens: maximum number of tokens of a continuation; if omitted, what the context
                allows.

        Returns:
            The text and images that follow each prompt.

        Raises:
            UserError: there is no prompt, one is longer than the context allows, `new_tokens` is
                below 1, or images are needed and there is no codec.
        """
        if not prompts:
            raise UserError("no prompt given; pass at least one")
        if self.image_codec is None and mode == "mixed":
            mode = "text"
        if mode != "text":
            _ = self.codec  # raises if there is none
        ids = [self.encode(prompt) for prompt in prompts]
        limit = self.context if new_tokens is None else new_tokens
        sampling = sampling or Sampling()
        continuations = generate(self.model, ids, mode, self.context, limit, sampling)
        return [self.decode(tokens) for tokens in continuations]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding.weight.device
