"""Perceptual and adversarial losses, each against a slow and simple computation."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from moma.errors import UserError
from moma.runtime.world import World
from moma.tokenizers.image.losses import AdversarialConfig, Adversary, PerceptualLoss
from tests.factories import random_images
from tests.hub.foreign import random_vgg


@pytest.fixture(scope="module")
def vgg_weights():
    return random_vgg()


@pytest.fixture(scope="module")
def vgg_file(vgg_weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(vgg_weights, file)
    return file


@pytest.fixture(name="pair")
def two_batches():
    return list(random_images(4).split(2))


def slow_distance(weights, first, second):
    """The perceptual distance, image by image, layer by layer."""

    def stages(image):
        colors = (image + 1) / 2
        values = torch.stack(
            [
                (colors[channel] - mean) / deviation
                for channel, (mean, deviation) in enumerate(
                    zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
                )
            ]
        )
        kept = []
        for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28):
            if number in (5, 10, 17, 24):
                kept.append(values)
                values = functional.max_pool2d(values[None], 2)[0]
            weight, bias = weights[f"features.{number}.weight"], weights[f"features.{number}.bias"]
            values = functional.conv2d(values[None], weight, bias, padding=1)[0].clamp(min=0)
        return [*kept, values]

    total = 0.0
    for one, two in zip(first, second, strict=True):
        for a, b in zip(stages(one), stages(two), strict=True):
            unit_a, unit_b = a / a.norm(dim=0, keepdim=True), b / b.norm(dim=0, keepdim=True)
            total += (unit_a - unit_b).square().sum(0).mean().item() / len(first)
    return total


def test_the_perceptual_distance_agrees_with_a_slow_one(vgg_weights, vgg_file, pair):
    loss = PerceptualLoss.load(vgg_file)
    assert loss(*pair).item() == pytest.approx(slow_distance(vgg_weights, *pair), rel=1e-4)
    assert loss(pair[0], pair[0]).item() == 0


def test_only_the_reconstruction_gets_a_gradient(vgg_file, pair):
    loss = PerceptualLoss.load(vgg_file)
    reconstructions = pair[0].requires_grad_()
    loss(reconstructions, pair[1]).backward()
    assert reconstructions.grad is not None and reconstructions.grad.abs().sum() > 0
    assert not [weight for weight in loss.parameters() if weight.requires_grad]


def test_weights_written_by_torch_give_the_same_loss(vgg_weights, vgg_file, pair, tmp_path):
    torch.save(vgg_weights, tmp_path / "vgg16.pth")
    loaded = PerceptualLoss.load(tmp_path / "vgg16.pth")
    assert torch.equal(loaded(*pair), PerceptualLoss.load(vgg_file)(*pair))


@pytest.mark.parametrize("content", [None, b"torn", {"a": torch.zeros(1)}])
@pytest.mark.parametrize("name", ["vgg.safetensors", "vgg.pth"])
def test_other_files_are_refused(tmp_path, name, content):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        (save_file if name.endswith("tensors") else torch.save)(content, file)
    with pytest.raises(UserError, match=r"vgg\..*perceptual\.weights"):
        PerceptualLoss.load(file)


def adversary(**changes) -> Adversary:
    torch.manual_seed(0)
    values = {"weight": 0.5, "width": 8, "layers": 1, "learning_rate": 1e-2} | changes
    return Adversary(AdversarialConfig(**values), image_size=16, world=World(torch.device("cpu")))


def test_the_default_discriminator_has_pix2pixs_size():
    one = Adversary(AdversarialConfig(weight=1), 256, World(torch.device("meta")))
    # Isola et al.'s 70 × 70 discriminator has 2,768,705 weights, 3,072 of them for a second input
    # image.
    assert sum(w.numel() for w in one.discriminator.parameters()) == 2_768_705 - 3_072


def test_the_discriminator_has_the_hinge_loss(pair):
    learner = adversary()
    before = copy.deepcopy(learner.discriminator)
    real, reconstructions = pair[1], pair[0].requires_grad_()
    loss = learner.learn(reconstructions, real)
    scores = [before(batch).flatten().tolist() for batch in (real, reconstructions)]
    hinge = [max(0.0, 1 - score) for score in scores[0]], [max(0.0, 1 + s) for s in scores[1]]
    expected = sum(sum(part) / len(part) for part in hinge) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert reconstructions.grad is None


def test_the_discriminator_learns_to_distinguish_them():
    learner = adversary()
    draw = torch.Generator().manual_seed(0)
    for _ in range(60):
        real = torch.rand(4, 3, 16, 16, generator=draw) * 2 - 1
        loss = learner.learn(real.mean((2, 3), keepdim=True).expand_as(real), real)
    assert loss < 0.2


def codec_like(pair):
    """A last layer, its output, and the reconstruction loss."""
    torch.manual_seed(1)
    layer = torch.nn.Conv2d(3, 3, 3, padding=1)
    reconstructions = layer(pair[0])
    return layer, reconstructions, functional.l1_loss(reconstructions, pair[1])


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer(pair, weight):
    layer, reconstructions, reconstruction = codec_like(pair)
    loss = adversary(weight=weight).loss(reconstructions, reconstruction, layer.weight)
    (of_loss,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    (of_reconstruction,) = torch.autograd.grad(reconstruction, layer.weight)
    expected = weight * of_reconstruction.norm().item()
    assert of_loss.norm().item() == pytest.approx(expected, rel=0.05)


def test_a_fixed_weight_is_fixed_and_the_discriminator_gets_no_gradient(pair):
    layer, reconstructions, reconstruction = codec_like(pair)
    learner = adversary(adaptive=False)
    loss = learner.loss(reconstructions, reconstruction, layer.weight)
    assert loss.item() == pytest.approx(-0.5 * learner.discriminator(reconstructions).mean().item())
    loss.backward()
    assert layer.weight.grad is not None and layer.weight.grad.norm() > 0
    assert all(weight.grad is None for weight in learner.discriminator.parameters())
    assert all(weight.requires_grad for weight in learner.discriminator.parameters())


def test_too_many_layers_for_the_images_are_refused():
    with pytest.raises(UserError, match="layers = 3 is too many for images of 16"):
        adversary(layers=3)
