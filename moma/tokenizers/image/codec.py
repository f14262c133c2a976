"""The image codec: images to codes of a learned codebook, and back.

    image → `preprocess` → [3, H, W] in [−1, 1] → `encode` → codes, row by row
    codes → `decode` → [3, H, W] → `to_pil` → image

The default configuration has the shape of Chameleon's VQGAN: 512 × 512 pixels become 32 × 32 codes
of 8,192 vectors. Encoder and decoder are those of `diffusers`, the codebook and its learning are
those of `vector_quantize_pytorch`.

Shape suffixes: B images, H × W pixels, h × w codes, L = h·w, N = B·L, C vectors of the codebook,
D width of one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, Self, cast

import torch
from PIL import Image
from pydantic import Field, PositiveInt, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.images import square_pixels
from moma.recipe import Config, check
from moma.tokenizers.image.state import write_tensors

_CHANNELS = 3
_CONFIG_FILE = "config.json"
_REPAIRS = 20
# Bounds of what is held at once: pixels in the encoder, distances to codebook vectors.
_PIXELS_AT_ONCE = 2**22
_DISTANCES_AT_ONCE = 2**29
# On a CPU: 8 and 16 MiB, which the allocator keeps without being told, too (docs/results/data.md);
# a single image may be larger.
_NUMBERS_AT_ONCE_ON_CPU = 2**21
_DISTANCES_AT_ONCE_ON_CPU = 2**22
_WEIGHTS_FILE = "model.safetensors"
# The files that make up a codec; others in its folder are not read.
CODEC_FILES = (_CONFIG_FILE, _WEIGHTS_FILE)


class CodecConfig(Config):
    """Shape of an image codec.

    Attributes:
        image_size: side of an image in pixels.
        patch: side of the pixel blocks that are folded into channels before the first layer;
            1 for Chameleon's shape, more for speed.
        block_channels: width of each block; every block but the last halves the sides.
        layers_per_block: residual layers of each block of the encoder; the decoder has one more.
        latent_channels: width of the encoder's output.
        code_channels: width of a codebook vector (D).
        codebook_size: number of codebook vectors.
        encoder_middle: whether the encoder has its innermost layers; without them it is faster,
            and a code depends less on the image around it.
        encoder_context: whether a code may depend on the image around its square at all.
            Without, an object has the same codes wherever it stands and whatever stands beside
            it; needs a single block, `patch` doing all the folding.
        middle_attention: whether the innermost block attends over the whole image.
        norm_groups: groups of each group normalization; divides every width.
        codebook_decay: share that a codebook vector keeps of its running mean at each step.
        dead_code_threshold: a vector chosen less often per step is replaced; 0 never replaces.
        commitment_weight: weight of the loss that keeps the encoder near the codebook.
        decoder: whether there is a decoder; without one images become codes but not the reverse
            (the `transformers` port of Chameleon comes without).
    """

    image_size: int = Field(default=512, ge=1)
    patch: int = Field(default=1, ge=1)
    block_channels: tuple[PositiveInt, ...] = Field(default=(128, 128, 256, 256, 512), min_length=1)
    layers_per_block: int = Field(default=2, ge=1)
    latent_channels: int = Field(default=256, ge=1)
    code_channels: int = Field(default=256, ge=1)
    codebook_size: int = Field(default=8192, ge=2)
    encoder_middle: bool = True
    encoder_context: bool = True
    middle_attention: bool = True
    norm_groups: int = Field(default=32, ge=1)
    codebook_decay: float = Field(default=0.99, gt=0, lt=1)
    dead_code_threshold: float = Field(default=0.05, ge=0)
    commitment_weight: float = Field(default=0.25, ge=0)
    decoder: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.reduction:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of {self.reduction}, "
                "the pixels that patch and blocks fold into one code"
            )
        if not self.encoder_context and len(self.block_channels) > 1:
            raise ValueError("encoder_context = false needs a single width in block_channels")
        for width in self.block_channels:
            if width % self.norm_groups:
                raise ValueError(f"block width {width} is no multiple of norm_groups")
        return self

    @property
    def reduction(self) -> int:
        """Side in pixels of the square that one code stands for."""
        return self.patch * 2 ** (len(self.block_channels) - 1)

    @property
    def codes_per_side(self) -> int:
        """Rows, and columns, of codes (h = w)."""
        return self.image_size // self.reduction

    @property
    def codes_per_image(self) -> int:
        """How many codes one image takes (L)."""
        return self.codes_per_side**2


class ImageCodec(nn.Module):
    """Encoder, codebook and decoder; deterministic outside of training."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        # Both take seconds to import, which commands that touch no codec should not pay.
        from diffusers.models.autoencoders.vae import Decoder
        from vector_quantize_pytorch import VectorQuantize

        self.config = config
        blocks = len(config.block_channels)
        pixels = _CHANNELS * config.patch**2
        shared: dict[str, Any] = {
            "block_out_channels": config.block_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_groups,
            "mid_block_add_attention": config.middle_attention,
        }
        self.encoder = _encoder(pixels, config, shared)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_channels, 1)
        self.quantizer = VectorQuantize(
            dim=config.code_channels,
            codebook_size=config.codebook_size,
            decay=config.codebook_decay,
            threshold_ema_dead_code=config.dead_code_threshold,
            commitment_weight=config.commitment_weight,
            kmeans_init=True,
            rotation_trick=False,
            accept_image_fmap=True,
        )
        # k-means replaces these at the first training step; until then they only differ.
        self.quantizer.codebook = torch.randn(config.codebook_size, config.code_channels)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = (
            Decoder(
                in_channels=config.latent_channels,
                out_channels=pixels,
                up_block_types=("UpDecoderBlock2D",) * blocks,
                **shared,
            )
            if config.decoder
            else None
        )

    @property
    def codes_per_image(self) -> int:
        """How many codes one image takes (L)."""
        return self.config.codes_per_image

    @property
    def images_at_once(self) -> int:
        """How many images fit a bounded memory when no gradients are kept."""
        return max(1, _PIXELS_AT_ONCE // self.config.image_size**2)

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors, [codebook_size, D]."""
        return cast(Tensor, self.quantizer.codebook)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer."""
        return cast(Any, self.decoder).conv_out.weight

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """The nearest codebook vector of each square of an image, row by row.

        Args:
            images_B3HW: float in [−1, 1].

        Returns:
            codes_BL, int64.

        Raises:
            UserError: the images do not have the codec's size.
        """
        side = self.config.image_size
        if tuple(images_B3HW.shape[1:]) != (_CHANNELS, side, side):
            raise UserError(
                f"images of shape {tuple(images_B3HW.shape[1:])}: this codec takes "
                f"{(_CHANNELS, side, side)}"
            )
        most_images, most_vectors = _at_once(self.config, images_B3HW)
        parts = images_B3HW.split(most_images)
        latents_BDhw = torch.cat([self.latents(part_B3HW) for part_B3HW in parts])
        vectors_ND = latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        # |v − c|² is smallest where v · c − |c|² / 2 is largest.
        half_norms_C = self.codebook.square().sum(1) / 2
        codes = [
            torch.addmm(half_norms_C, part_ND, self.codebook.T, beta=-1).argmax(1)
            for part_ND in vectors_ND.split(most_vectors)
        ]
        return torch.cat(codes).unflatten(0, (-1, self.codes_per_image))

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """The images that codes stand for, images_B3HW in [−1, 1].

        Args:
            codes_BL: int64, `codes_per_image` codes for each image, row by row.

        Raises:
            UserError: there are more or fewer codes, one is outside the codebook, or the codec has
                no decoder.
        """
        if codes_BL.shape[1:] != (self.codes_per_image,):
            raise UserError(f"{tuple(codes_BL.shape[1:])} codes: {self.codes_per_image} needed")
        if codes_BL.numel() and not 0 <= codes_BL.min() <= codes_BL.max() < len(self.codebook):
            raise UserError(f"codes outside of 0 … {len(self.codebook) - 1}")
        side = self.config.codes_per_side
        vectors_BhwD = self.codebook[codes_BL].unflatten(1, (side, side))
        return self.images(vectors_BhwD.permute(0, 3, 1, 2)).clamp(-1, 1)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images through the codebook, for training.

        In training mode the codebook follows the encoder, and random numbers are drawn when it
        starts and when unused vectors are replaced.

        Returns:
            reconstructions_B3HW (not clamped) and the weighted commitment loss, a scalar.
        """
        vectors_BDhw, commitment = self._quantize(self.latents(images_B3HW))
        return self.images(vectors_BDhw), commitment

    @torch.no_grad()
    def start_codebook(self, images_B3HW: Tensor) -> None:
        """Lay the codebook over what the encoder sees in these images: k-means, then repairs.

        An image is mostly background, so k-means alone leaves many vectors on the same spot;
        each repair moves those that nothing chooses. Draws random numbers; ends in training mode.
        Takes no more of the images than fit a bounded memory.
        """
        self.train()
        most = _DISTANCES_AT_ONCE // (self.config.codebook_size * self.codes_per_image)
        parts = images_B3HW[: max(1, most)].split(self.images_at_once)
        latents_BDhw = torch.cat([self.latents(part_B3HW) for part_B3HW in parts])
        for _ in range(_REPAIRS):
            self._quantize(latents_BDhw)

    def autoencode(self, images_B3HW: Tensor) -> Tensor:
        """Reconstruct images without the codebook, for the first steps of training."""
        return self.images(self.latents(images_B3HW))

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """What the encoder sees in images, before the codebook: latents_BDhw."""
        folded = functional.pixel_unshuffle(images_B3HW, self.config.patch)
        return cast(Tensor, self.quant_conv(self.encoder(folded)))

    def images(self, vectors_BDhw: Tensor) -> Tensor:
        """What the decoder draws for codebook vectors: images_B3HW, not clamped.

        Raises:
            UserError: the codec has no decoder.
        """
        if self.decoder is None:
            raise UserError(
                "this image codec has no decoder: it turns images into codes only; load weights "
                "with a decoder, such as those of Chameleon's original release"
            )
        drawn = self.decoder(self.post_quant_conv(vectors_BDhw))
        return functional.pixel_shuffle(drawn, self.config.patch)

    def _quantize(self, latents_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codebook vectors and the commitment loss; distances are never rounded."""
        with torch.autocast(latents_BDhw.device.type, enabled=False):
            vectors_BDhw, _, commitment = self.quantizer(latents_BDhw.float())
        return vectors_BDhw, commitment

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is made if needed.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        write_tensors(weights, folder / _WEIGHTS_FILE)
        (folder / _CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ImageCodec":
        """Read a codec written by `save`, on the CPU and in evaluation mode.

        Raises:
            UserError: a file is missing or damaged, or the weights do not fit the configuration.
        """
        config = read_codec_config(folder)
        try:
            weights = load_file(folder / _WEIGHTS_FILE)
        # safetensors reports damage with an exception of its own, derived from Exception alone.
        except Exception as error:
            raise UserError(f"{folder}: not an image codec ({error})") from error
        codec = cls(config)
        try:
            codec.load_state_dict(weights)
        except RuntimeError as error:
            # Behind a heading, a line or a name for each tensor: the first ones tell enough.
            told = shorten(str(error).partition("\n")[2] or str(error), 160, placeholder=" …")
            raise UserError(f"{folder}: weights and config.json differ ({told})") from error
        return codec.eval()


def read_codec_config(folder: Path) -> CodecConfig:
    """The configuration of a codec written by `save`, without its weights.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / _CONFIG_FILE
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: not an image codec ({error})") from error
    return check(CodecConfig, values, str(file))


def _at_once(config: CodecConfig, images_B3HW: Tensor) -> tuple[int, int]:
    """How many images go through the encoder's blocks at once, and vectors to the codebook."""
    if images_B3HW.device.type != "cpu":
        return len(images_B3HW), max(1, _DISTANCES_AT_ONCE // config.codebook_size)
    side = config.image_size // config.patch
    numbers = max(
        width * (side // 2**block) ** 2 for block, width in enumerate(config.block_channels)
    )
    return (
        max(1, _NUMBERS_AT_ONCE_ON_CPU // numbers),
        max(1, _DISTANCES_AT_ONCE_ON_CPU // config.codebook_size),
    )


def _encoder(pixels: int, config: CodecConfig, shared: dict[str, Any]) -> nn.Module:
    """The encoder, `pixels` being the channels of a folded image."""
    from diffusers.models.autoencoders.vae import Encoder

    if not config.encoder_context:
        return _square_encoder(pixels, config)
    encoder = Encoder(
        in_channels=pixels,
        out_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.block_channels),
        double_z=False,
        **shared,
    )
    if not config.encoder_middle:
        encoder.mid_block = cast(Any, nn.Identity())
    return cast(nn.Module, encoder)


def _square_encoder(pixels: int, config: CodecConfig) -> nn.Module:
    """An encoder of 1 × 1 convolutions: it sees a square's own pixels and no others."""
    width = config.block_channels[0]
    return nn.Sequential(
        nn.Conv2d(pixels, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, width, 1),
        nn.SiLU(),
        nn.Conv2d(width, config.latent_channels, 1),
    )


def preprocess(image: Image.Image, size: int) -> Tensor:
    """An image as the codec takes it: float [3, size, size] in [−1, 1].

    Transparency becomes white, the short side is resized to `size` (LANCZOS), and the centre is
    cropped.
    """
    return to_float(torch.from_numpy(square_pixels(image, size)))


def to_float(pixels_BHW3: Tensor) -> Tensor:
    """Pixels of one or several images, uint8 [..., H, W, 3], as the codec takes them.

    Returns:
        float [..., 3, H, W] in [−1, 1].
    """
    return pixels_BHW3.movedim(-1, -3).float() / 255 * 2 - 1


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An image in [−1, 1] as an RGB image; values outside are clipped."""
    levels = ((image_3HW.float().clamp(-1, 1) + 1) / 2 * 255).round()
    return Image.fromarray(levels.to(torch.uint8).permute(1, 2, 0).cpu().numpy(), "RGB")


def in_batches(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover `count` items."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
