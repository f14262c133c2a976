"""Matrix products of linear layers in float8, by torchao (optional).

Inputs, weights and output gradients are scaled by their largest magnitude and rounded to float8
before each product. Weights, and what is gathered and summed over ranks, keep their dtypes.
"""

from typing import Any

import torch
from torch import nn

from moma.errors import UserError
from moma.runtime.sharding import EngineConfig

# Parts of names of modules whose products stay exact.
_EXACT = ("router", "auxiliary", "head")
# Kernels for float8 support widths that are multiples of this number.
WIDTH_MULTIPLE = 16


def use_float8(model: nn.Module, engine: EngineConfig, device: torch.device) -> None:
    """Compute linear layers in float8 if `engine.float8` says so, except for routers and the head.

    Args:
        model: is changed in place; names and parameters stay the same.

    Raises:
        UserError: torchao is missing, or the device has no products in float8.
    """
    how = engine.float8
    if how == "off":
        return
    if device.type == "cpu" and engine.compute == "bf16":
        raise UserError("engine.float8: on a CPU use engine.compute=fp32")  # without autocast
    # Ada Lovelace, Hopper and later.
    if how == "on" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9)):
        raise UserError(
            "engine.float8: this device has no matrix products in float8; use a GPU of compute "
            "capability 8.9 or above, as an H100, or engine.float8=off"
        )
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(
            f"engine.float8: needs torchao ({error}); install it with pip install 'moma[float8]'"
        ) from error

    def is_converted(module: Any, name: str) -> bool:
        widths = module.in_features, module.out_features
        is_exact = any(part in _EXACT for part in name.split("."))
        return not is_exact and not any(width % WIDTH_MULTIPLE for width in widths)

    # Mixture-of-depths may select any number of tokens, an inner dimension in backward.
    config = Float8LinearConfig(emulate=how == "emulate", pad_inner_dim=True)
    convert_to_float8_training(model, module_filter_fn=is_converted, config=config)
