"""Text and images as token ids and back, in the shape of a processor of `transformers`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BatchFeature

from moma.errors import UserError
from moma.generate.stream import Content, ContentStream, collect
from moma.hub.folder import CONFIG_FILE, TOKENIZER_FILE
from moma.hub.moma_format import parse_config
from moma.runs import Tokenizers
from moma.runtime.weights import read_json_object
from moma.tokenizers.image.codec import ImageCodec, preprocess, to_pil
from moma.tokenizers.text import encode_text, load_text_tokenizer
from moma.vocabulary import Vocabulary

IMAGE_PLACEHOLDER = "<image>"


class MomaProcessor:
    """The tokenizers of a model.

    Args:
        codec: the image codec; None: text only.
    """

    def __init__(self, tokenizer: Tokenizer, codec: ImageCodec | None, vocabulary: Vocabulary):
        self.tokenizer, self.image_codec, self.vocabulary = tokenizer, codec, vocabulary

    @classmethod
    def from_pretrained(
        cls, name: str | Path, revision: str | None = None, **kwargs: Any
    ) -> "MomaProcessor":
        """Load a folder that `moma export` wrote, or one of this name on the hub.

        Raises:
            UserError: a file is missing or damaged.
        """
        folder = Path(name)
        if not folder.is_dir():
            wanted = [CONFIG_FILE, TOKENIZER_FILE, "codec/*"]
            found = snapshot_download(str(name), revision=revision, allow_patterns=wanted)
            folder = Path(str(found))
        path, files = folder / CONFIG_FILE, Tokenizers(folder)
        _, vocabulary = parse_config(read_json_object(path), str(path))
        codec = ImageCodec.load(files.codec) if files.codec.is_dir() else None
        return cls(load_text_tokenizer(files.text), codec, vocabulary)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write tokenizer and codec beside a model that `save_pretrained` wrote."""
        files = Tokenizers(Path(folder))
        files.path.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(files.text))
        if self.image_codec is not None:
            self.image_codec.save(files.codec)

    def __call__(
        self, text: str | Sequence[str], images: Iterable[Image.Image] = (), **kwargs: Any
    ) -> BatchFeature:
        """Encode one or several documents as `input_ids` and `attention_mask`, padded on the left.

        Args:
            text: each `<image>` in it stands for the next one of the images.
            images: images of any size.
            kwargs: ignored.

        Raises:
            UserError: there are more or fewer images than places, or no codec for them.
        """
        pool = iter(images)
        rows = [self._encode(each, pool) for each in ([text] if isinstance(text, str) else text)]
        if next(pool, None) is not None:
            raise UserError(f"there are more images than places {IMAGE_PLACEHOLDER} in the text")
        size = max(map(len, rows))
        padding = self.vocabulary.padding
        ids_BS = torch.tensor([[padding] * (size - len(row)) + row for row in rows])
        mask_BS = torch.tensor([[0] * (size - len(row)) + [1] * len(row) for row in rows])
        return BatchFeature({"input_ids": ids_BS, "attention_mask": mask_BS})

    def decode(self, ids: Tensor | Sequence[int], **kwargs: Any) -> list[Content]:
        """The text and images of a sequence, in order, without incomplete images."""
        stream = ContentStream(self.tokenizer, self.vocabulary, self._draw)
        tokens = ids.tolist() if isinstance(ids, Tensor) else ids
        return collect([*stream.add(tokens), *stream.finish()])

    def batch_decode(self, ids: Iterable[Tensor | Sequence[int]], **kwargs: Any) -> list[Any]:
        """The text and images of several sequences; see `decode`."""
        return [self.decode(each) for each in ids]

    def _encode(self, text: str, images: Iterator[Image.Image]) -> list[int]:
        first, *others = text.split(IMAGE_PLACEHOLDER)
        ids = [self.vocabulary.beginning, *encode_text(self.tokenizer, first)]
        for part in others:
            image = next(images, None)
            if image is None:
                raise UserError(f"there are fewer images than places {IMAGE_PLACEHOLDER}")
            ids += self.vocabulary.wrap_image(self._codes(image))
            ids += encode_text(self.tokenizer, part)
        return ids

    def _codes(self, image: Image.Image) -> np.ndarray:
        codec = self._require_codec()
        return codec.encode(preprocess(image, codec.config.image_size)[None])[0].numpy()

    def _draw(self, codes: np.ndarray) -> Image.Image:
        return to_pil(self._require_codec().decode(torch.from_numpy(codes)[None])[0])

    def _require_codec(self) -> ImageCodec:
        if self.image_codec is None:
            raise UserError("this model has no image codec; use text only")
        return self.image_codec
