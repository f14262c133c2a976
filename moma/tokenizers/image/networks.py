"""The encoder and decoder of an image codec: networks of `diffusers` in the shape of its config."""

from typing import TYPE_CHECKING, Any, cast

from torch import nn

if TYPE_CHECKING:
    from moma.tokenizers.image.codec import CodecConfig

# Of an image; `patch` folds the pixels of a block into channels, too.
CHANNELS = 3


def build_encoder(config: "CodecConfig") -> nn.Module:
    """Build the network from folded images to latents."""
    from moma.tokenizers.image.vae import Encoder

    pixels = CHANNELS * config.patch**2
    if not config.encoder_context:  # 1 × 1 convolutions see only the pixels of one square
        channels = config.block_channels[0]
        return nn.Sequential(
            nn.Conv2d(pixels, channels, 1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 1),
            nn.SiLU(),
            nn.Conv2d(channels, config.latent_channels, 1),
        )
    encoder = Encoder(
        in_channels=pixels,
        out_channels=config.latent_channels,
        down_block_types=("DownEncoderBlock2D",) * len(config.block_channels),
        double_z=False,
        **_shared(config),
    )
    if not config.encoder_middle:
        encoder.mid_block = cast(Any, nn.Identity())
    return cast(nn.Module, encoder)


def build_decoder(config: "CodecConfig") -> nn.Module:
    """Build the network from codebook vectors to folded images."""
    from moma.tokenizers.image.vae import Decoder

    decoder = Decoder(
        in_channels=config.latent_channels,
        out_channels=CHANNELS * config.patch**2,
        up_block_types=("UpDecoderBlock2D",) * len(config.block_channels),
        **_shared(config),
    )
    return cast(nn.Module, decoder)


def _shared(config: "CodecConfig") -> dict[str, Any]:
    return {
        "block_out_channels": config.block_channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.middle_attention,
    }
