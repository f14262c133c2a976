"""The image codec: images to codes of a learned codebook, and back.

    image → `preprocess` → [3, H, W] in [−1, 1] → `encode` → codes in row-major order
    codes → `decode` → [3, H, W] → `to_pil` → image

Shape suffixes: B images, H × W pixels, h × w codes, L = h·w, N = B·L, C codebook vectors, D their
width.
"""

from pathlib import Path
from typing import Annotated, Any, Self, cast

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.images import square_pixels
from moma.recipe import Config, check
from moma.runtime.weights import open_file, read_json_object, require_match, save_tensors
from moma.tokenizers.image.networks import CHANNELS, build_decoder, build_encoder
from moma.vocabulary import MAX_SIZE

# Limits for what is in memory at once: pixels in the encoder, distances to codebook vectors.
MAX_PIXELS = 2**22
MAX_DISTANCES = 2**29
# On a CPU: 8 and 16 MiB, which the allocator keeps by default (docs/results/data.md); a single
# image may need more.
MAX_CPU_ACTIVATIONS = 2**21
MAX_CPU_DISTANCES = 2**22
_CODEBOOK_UPDATES_AT_START = 20
_CONFIG_FILE, _WEIGHTS_FILE = "config.json", "model.safetensors"
# The files that make up a codec; others in its folder are not read.
CODEC_FILES = (_CONFIG_FILE, _WEIGHTS_FILE)
_Width = Annotated[int, Field(ge=1, le=2**14)]


class CodecConfig(Config):
    """Shape of an image codec, by default Chameleon's: 512 × 512 pixels become 32 × 32 codes.

    Attributes:
        image_size: height and width of an image in pixels.
        patch: side of the pixel blocks that are folded into channels before the first layer;
            1 for Chameleon's shape, more for speed.
        block_channels: channels of each block; every block but the last halves height and width.
        layers_per_block: residual layers of each block of the encoder; the decoder has one more.
        latent_channels: channels of the encoder's output.
        code_channels: width of a codebook vector (D).
        codebook_size: number of codebook vectors.
        encoder_middle: whether the encoder has its innermost layers; without them it is faster,
            and a code depends less on the image around it.
        encoder_context: whether a code may depend on the image around its square. Without, an
            object has the same codes wherever it is and whatever is next to it; this needs a
            single block, so that `patch` does all the folding.
        middle_attention: whether the innermost block attends over the whole image.
        norm_groups: groups of each group normalization; divides all channels.
        codebook_decay: decay of the moving averages that codebook vectors are.
        dead_code_threshold: a vector chosen less often per step is replaced; 0 never replaces.
        commitment_weight: weight of the loss that keeps the encoder near the codebook.
        decoder: whether there is a decoder; without one images become codes but not the reverse
            (as in the `transformers` port of Chameleon).
    """

    image_size: int = Field(default=512, ge=1, le=2**13)
    patch: int = Field(default=1, ge=1)
    block_channels: tuple[_Width, ...] = Field((128, 128, 256, 256, 512), min_length=1)
    layers_per_block: int = Field(default=2, ge=1, le=64)
    latent_channels: _Width = 256
    code_channels: _Width = 256
    codebook_size: int = Field(default=8192, ge=2, le=2**20)
    encoder_middle: bool = True
    encoder_context: bool = True
    middle_attention: bool = True
    norm_groups: int = Field(default=32, ge=1)
    codebook_decay: float = Field(default=0.99, gt=0, lt=1)
    dead_code_threshold: float = Field(default=0.05, ge=0, le=10**9)
    commitment_weight: float = Field(default=0.25, ge=0)
    decoder: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % self.reduction:
            raise ValueError(
                f"image_size {self.image_size} is no multiple of {self.reduction}, "
                "the pixels that patch and blocks fold into one code"
            )
        if self.codes_per_image > MAX_SIZE:
            raise ValueError(
                f"an image has {self.codes_per_image:,} codes, and at most {MAX_SIZE:,} are "
                "possible; lower image_size or raise patch"
            )
        if not self.encoder_context and len(self.block_channels) > 1:
            raise ValueError("encoder_context = false needs a single block in block_channels")
        for channels in self.block_channels:
            if channels % self.norm_groups:
                raise ValueError(f"block_channels: {channels} is no multiple of norm_groups")
        return self

    @property
    def reduction(self) -> int:
        """Height and width in pixels of the square that one code represents."""
        return self.patch * 2 ** (len(self.block_channels) - 1)

    @property
    def codes_per_side(self) -> int:
        """Codes in a row, and in a column, of an image (h = w)."""
        return self.image_size // self.reduction

    @property
    def codes_per_image(self) -> int:
        """Codes of an image (L)."""
        return self.codes_per_side**2


class ImageCodec(nn.Module):
    """Encoder and decoder of `diffusers`, and the codebook of `vector_quantize_pytorch`.

    Deterministic outside of training.
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        # Takes seconds to import, and most commands use no codec.
        from vector_quantize_pytorch import VectorQuantize

        self.config = config
        self.encoder = build_encoder(config)
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
            sync_codebook=False,  # training gathers the latents of all ranks
        )
        # Replaced by k-means at the first training step; until then they only have to differ.
        self.quantizer.codebook = torch.randn(config.codebook_size, config.code_channels)
        self.post_quant_conv = nn.Conv2d(config.code_channels, config.latent_channels, 1)
        self.decoder = build_decoder(config) if config.decoder else None

    @property
    def codes_per_image(self) -> int:
        """Codes of an image (L)."""
        return self.config.codes_per_image

    @property
    def images_at_once(self) -> int:
        """Batch size that fits into a bounded amount of memory without gradients."""
        return max(1, MAX_PIXELS // self.config.image_size**2)

    @property
    def codebook(self) -> Tensor:
        """The codebook vectors, [codebook_size, D]."""
        return cast(Tensor, self.quantizer.codebook)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer [3·patch², C, 3, 3]."""
        return cast(Any, self.decoder).conv_out.weight

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """The index of the nearest codebook vector for each square of an image, row-major.

        Args:
            images_B3HW: float in [−1, 1].

        Returns:
            codes_BL, int64.

        Raises:
            UserError: the images do not have the codec's size.
        """
        side = self.config.image_size
        if tuple(images_B3HW.shape[1:]) != (CHANNELS, side, side):
            raise UserError(
                f"images of shape {tuple(images_B3HW.shape[1:])}: this codec takes "
                f"{(CHANNELS, side, side)}"
            )
        max_images, max_vectors = _chunk_sizes(self.config, images_B3HW)
        parts = images_B3HW.split(max_images)
        latents_BDhw = torch.cat([self.latents(part_B3HW) for part_B3HW in parts])
        vectors_ND = latents_BDhw.permute(0, 2, 3, 1).flatten(0, 2)
        # |v − c|² is smallest where v · c − |c|² / 2 is largest.
        half_norms_C = self.codebook.square().sum(1) / 2
        codes = [
            torch.addmm(half_norms_C, part_ND, self.codebook.T, beta=-1).argmax(1)
            for part_ND in vectors_ND.split(max_vectors)
        ]
        return torch.cat(codes).unflatten(0, (-1, self.codes_per_image))

    @torch.no_grad()
    def decode(self, codes_BL: Tensor) -> Tensor:
        """Reconstruct images from their codes.

        Args:
            codes_BL: int64, `codes_per_image` codes for each image, row-major.

        Returns:
            images_B3HW in [−1, 1].

        Raises:
            UserError: the number of codes is wrong, one is outside the codebook, or the codec has
                no decoder.
        """
        if codes_BL.shape[1:] != (self.codes_per_image,):
            raise UserError(
                f"codes of shape {tuple(codes_BL.shape[1:])}: an image has {self.codes_per_image}"
            )
        if codes_BL.numel() and not 0 <= codes_BL.min() <= codes_BL.max() < len(self.codebook):
            raise UserError(f"codes outside of 0 … {len(self.codebook) - 1}")
        side = self.config.codes_per_side
        vectors_BhwD = self.codebook[codes_BL].unflatten(1, (side, side))
        return self.images(vectors_BhwD.permute(0, 3, 1, 2)).clamp(-1, 1)

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruct images through the codebook, for training; see `quantize`.

        Returns:
            reconstructions_B3HW (not clamped) and the weighted commitment loss, a scalar.
        """
        vectors_BDhw, commitment = self.quantize(self.latents(images_B3HW))
        return self.images(vectors_BDhw), commitment

    @torch.no_grad()
    def start_codebook(self, images_B3HW: Tensor) -> None:
        """Initialize the codebook by k-means over the latents of images.

        An image is mostly background, so k-means leaves many vectors in the same place;
        further updates replace those that nothing chooses. Uses random numbers, ends in training
        mode, and takes only as many of the images as fit into a bounded amount of memory.
        """
        self.train()
        max_images = MAX_DISTANCES // (self.config.codebook_size * self.codes_per_image)
        parts = images_B3HW[: max(1, max_images)].split(self.images_at_once)
        latents_BDhw = torch.cat([self.latents(part_B3HW) for part_B3HW in parts])
        for _ in range(_CODEBOOK_UPDATES_AT_START):
            self.quantize(latents_BDhw)

    def autoencode(self, images_B3HW: Tensor) -> Tensor:
        """Reconstruct images without the codebook, for the first steps of training."""
        return self.images(self.latents(images_B3HW))

    def latents(self, images_B3HW: Tensor) -> Tensor:
        """The encoder's output before the codebook, latents_BDhw."""
        folded = functional.pixel_unshuffle(images_B3HW, self.config.patch)
        return cast(Tensor, self.quant_conv(self.encoder(folded)))

    def quantize(self, latents_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codebook vectors, and the weighted commitment loss, always in float32.

        In training mode this also updates the codebook, with random numbers at its first update
        and where unused vectors are replaced.
        """
        with torch.autocast(latents_BDhw.device.type, enabled=False):
            vectors_BDhw, _, commitment = self.quantizer(latents_BDhw.float())
        return vectors_BDhw, commitment

    def images(self, vectors_BDhw: Tensor) -> Tensor:
        """Decode codebook vectors to images_B3HW, not clamped.

        Raises:
            UserError: the codec has no decoder.
        """
        if self.decoder is None:
            raise UserError(
                "this image codec has no decoder: it turns images into codes only; load weights "
                "with a decoder, such as those of Chameleon's original release"
            )
        folded = self.decoder(self.post_quant_conv(vectors_BDhw))
        return functional.pixel_shuffle(folded, self.config.patch)

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors` into a folder, which is created if needed.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        save_tensors(weights, folder / _WEIGHTS_FILE)
        (folder / _CONFIG_FILE).write_text(self.config.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "ImageCodec":
        """Read a codec written by `save`, on the CPU and in evaluation mode.

        Raises:
            UserError: a file is missing or damaged, or the weights do not match the configuration.
        """
        config, file = read_codec_config(folder), folder / _WEIGHTS_FILE
        stored = open_file(file)
        with torch.device("meta"):  # shapes are compared before memory is allocated
            expected = cls(config).state_dict()
        require_match(
            stored.meta_tensors, expected, f"{file}: does not match {folder / _CONFIG_FILE}"
        )
        weights = stored.read(expected)
        if wrong := [name for name, value in weights.items() if not value.isfinite().all()]:
            raise UserError(f"{file}: {wrong[0]} has NaN or infinite values; get a complete copy")
        codec = cls(config)
        codec.load_state_dict(weights)
        if codec.decoder is not None:
            # The order of the codebook's vectors; it decodes a single image faster
            # (docs/results/generate.md). The encoder's rounding, and so codes, stay as they are.
            cast(Any, codec.decoder).to(memory_format=torch.channels_last)
        return codec.eval()


def read_codec_config(folder: Path) -> CodecConfig:
    """The configuration of a codec written by `save`, without its weights.

    Raises:
        UserError: it is missing or damaged.
    """
    file = folder / _CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{folder}: not an image codec (no {_CONFIG_FILE}); restore it from a copy")
    return check(CodecConfig, read_json_object(file), str(file))


def _chunk_sizes(config: CodecConfig, images_B3HW: Tensor) -> tuple[int, int]:
    """How many images pass the encoder, and how many vectors meet the codebook, at once."""
    if images_B3HW.device.type != "cpu":
        return len(images_B3HW), max(1, MAX_DISTANCES // config.codebook_size)
    side = config.image_size // config.patch
    activations = max(
        channels * (side // 2**block) ** 2 for block, channels in enumerate(config.block_channels)
    )
    return (
        max(1, MAX_CPU_ACTIVATIONS // activations),
        max(1, MAX_CPU_DISTANCES // config.codebook_size),
    )


def preprocess(image: Image.Image, size: int) -> Tensor:
    """An image as input of the codec, float [3, size, size] in [−1, 1]; see `square_pixels`."""
    return to_float(torch.from_numpy(square_pixels(image, size)))


def to_float(pixels_BHW3: Tensor) -> Tensor:
    """Pixels, uint8 [..., H, W, 3], as input of the codec, float [..., 3, H, W] in [−1, 1]."""
    return pixels_BHW3.movedim(-1, -3).float() / 255 * 2 - 1


def to_pixels(images_B3HW: Tensor) -> Tensor:
    """Images [..., 3, H, W] in [−1, 1] as pixels, uint8 [..., H, W, 3]; others are clipped."""
    levels_B3HW = ((images_B3HW.float().clamp(-1, 1) + 1) / 2 * 255).round()
    return levels_B3HW.to(torch.uint8).movedim(-3, -1)


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An image [3, H, W] in [−1, 1] as an RGB image; values outside are clipped."""
    return Image.fromarray(to_pixels(image_3HW).cpu().numpy(), "RGB")
