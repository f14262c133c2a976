"""The networks of `diffusers`, which takes seconds to import: most commands use no codec.

Imported where they are built, or before processes are forked that build them.
"""

import logging

# torchao, which it imports, warns of kernels for other machines.
_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    from diffusers.models.autoencoders.vae import Decoder, Encoder
finally:
    logging.disable(_disabled)

__all__ = ["Decoder", "Encoder"]
