"""Perceptual and adversarial losses of the image codec; both are optional.

Sources: LPIPS (Zhang et al. 2018), here without learned channel weights; VQGAN (Esser et al. 2021)
for the hinge loss and its adaptive weight; pix2pix (Isola et al. 2017) for the discriminator.
Shape suffixes: B images, H × W pixels, C channels of a layer.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from moma.errors import UserError
from moma.recipe import Config, RequiredPath
from moma.runtime.weights import first_line, read_tensors
from moma.runtime.world import World

# Mean and standard deviation of the images that VGG-16 was trained on, for colors in [0, 1].
_VGG_MEAN, _VGG_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Channels of VGG-16's convolutions by stage; height and width are halved between stages.
_VGG_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_MAX_ADAPTIVE_WEIGHT = 1e4


class PerceptualConfig(Config):
    """A loss on features of VGG-16.

    Attributes:
        weights: file of VGG-16's weights under torchvision's names (`features.0.weight`, …),
            safetensors or written by `torch.save`; without it there is no perceptual loss.
        weight: of the loss.
    """

    weights: RequiredPath | None = None
    weight: float = Field(default=1.0, gt=0)


class AdversarialConfig(Config):
    """A patch discriminator and its loss.

    Attributes:
        weight: of the loss; 0 trains without a discriminator.
        start_step: first step with the adversarial loss, counted from 0.
        adaptive: whether the weight is also scaled so that at the decoder's last layer the
            adversarial gradient is as large as the reconstruction's (VQGAN Eq. 7).
        width: channels of the discriminator's first layer; they double with each layer, up to
            eight times as many.
        layers: number of layers with stride 2.
        learning_rate: of the discriminator.
    """

    weight: float = Field(default=0.0, ge=0)
    start_step: int = Field(default=10_000, ge=0)
    adaptive: bool = True
    width: int = Field(default=64, ge=1, le=2**14)
    layers: int = Field(default=3, ge=1, le=13)
    learning_rate: float = Field(default=1e-4, gt=0, le=10**6)


class PerceptualLoss(nn.Module):
    """Distance of two images' features, of unit length, at the end of each of VGG-16's stages."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for number, widths in enumerate(_VGG_STAGES):
            layers += [nn.MaxPool2d(2)] if number else []
            for width in widths:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
        # So numbered, the layers have torchvision's names.
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(_VGG_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer(
            "deviation", torch.tensor(_VGG_DEVIATION).view(3, 1, 1), persistent=False
        )
        self.requires_grad_(False).eval()

    @classmethod
    def load(cls, file: Path) -> "PerceptualLoss":
        """Read VGG-16's weights.

        Raises:
            UserError: the file cannot be read, or has other weights.
        """
        loss = cls()
        try:
            weights = read_tensors(file, loss.state_dict().keys().__contains__)
            loss.load_state_dict(weights)
        except (UserError, RuntimeError) as error:
            raise UserError(
                f"{file}: not the weights of VGG-16 under torchvision's names "
                f"({first_line(error)}); correct codec_training.perceptual.weights or leave it out"
            ) from error
        return loss

    def forward(self, reconstructions_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Mean over positions and images of the squared distances, summed over stages; a scalar.

        Args:
            reconstructions_B3HW, images_B3HW: in [−1, 1], sides of at least 16.
        """
        both = torch.cat([reconstructions_B3HW, images_B3HW])
        distance = both.new_zeros(())
        for features_BCHW in self._stages(((both + 1) / 2 - self.mean) / self.deviation):
            unit_BCHW = functional.normalize(features_BCHW.float(), dim=1, eps=1e-10)
            reconstructions_BCHW, real_BCHW = unit_BCHW.chunk(2)
            distance = distance + (reconstructions_BCHW - real_BCHW).square().sum(1).mean()
        return distance

    def _stages(self, images_B3HW: Tensor) -> Iterator[Tensor]:
        values = images_B3HW
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield values
            values = layer(values)
        yield values


class Adversary:
    """The discriminator and its training, on the images of all ranks.

    Raises:
        UserError: the images are too small for the number of layers.
    """

    def __init__(self, config: AdversarialConfig, image_size: int, world: World):
        if image_size // 2**config.layers < 4:
            raise UserError(
                f"codec_training.adversarial.layers = {config.layers} is too many for images of "
                f"{image_size} pixels; lower it"
            )
        self.config, self._world = config, world
        self.discriminator = _discriminator(config).to(world.device)
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.learning_rate, betas=(0.5, 0.9)
        )

    def loss(
        self, reconstructions_B3HW: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> Tensor:
        """The weighted generator loss, a scalar.

        Args:
            reconstruction: the reconstruction loss, for the adaptive weight.
            last_layer: weight of the decoder's last layer.
        """
        self.discriminator.requires_grad_(False)
        generator_loss = -self.discriminator(reconstructions_B3HW).float().mean()
        self.discriminator.requires_grad_(True)
        weight: Tensor | float = self.config.weight
        if self.config.adaptive:
            gradients = [
                torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                for loss in (reconstruction, generator_loss)
            ]
            norms = [self._world.sum(each).norm() / self._world.size for each in gradients]
            balance = norms[0] / (norms[1] + 1e-4)
            weight = weight * balance.clamp(max=_MAX_ADAPTIVE_WEIGHT)
        return weight * generator_loss

    def learn(self, reconstructions_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
        """Do one step of the discriminator, and return its hinge loss."""
        real = self.discriminator(images_B3HW).float()
        fake = self.discriminator(reconstructions_B3HW.detach()).float()
        loss = (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean()) / 2
        self.optimizer.zero_grad(set_to_none=True)
        (loss / self._world.size).backward()
        self._world.sum_gradients(self.discriminator.parameters())
        self.optimizer.step()
        return loss.detach()


def _discriminator(config: AdversarialConfig) -> nn.Sequential:
    """Convolutions that score overlapping patches: positive for images, else negative."""
    layers: list[nn.Module] = [nn.Conv2d(3, config.width, 4, 2, 1), nn.LeakyReLU(0.2)]
    before = config.width
    for number in range(1, config.layers + 1):
        width = config.width * min(2**number, 8)
        stride = 2 if number < config.layers else 1
        layers += [
            nn.Conv2d(before, width, 4, stride, 1, bias=False),
            nn.InstanceNorm2d(width, affine=True),
            nn.LeakyReLU(0.2),
        ]
        before = width
    layers.append(nn.Conv2d(before, 1, 4, 1, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
    return nn.Sequential(*layers)
