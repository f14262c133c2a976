"""The networks of `diffusers`, which takes seconds to import: most commands use no codec.

Imported where they are built, or before processes are forked that build them.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

# Whoever imports one of their modules imports all, those of a hundred models.
_PACKAGES = tuple(f"diffusers.models.{name}" for name in ("autoencoders", "transformers", "unets"))


@contextmanager
def _without_other_models() -> Iterator[None]:
    """Import only the modules that are named from packages not imported yet."""
    added: dict[str, ModuleType] = {}
    for name in _PACKAGES:
        if name not in sys.modules and (spec := find_spec(name)) is not None:
            added[name] = sys.modules[name] = ModuleType(name)
            added[name].__path__ = spec.submodule_search_locations or []
    try:
        yield
    finally:
        for name, package in added.items():
            if sys.modules.get(name) is package:
                del sys.modules[name]  # whoever needs another module imports the package


# torchao, which it imports, warns of kernels for other machines.
_disabled = logging.root.manager.disable
logging.disable(logging.WARNING)
try:
    with _without_other_models():
        from diffusers.models.autoencoders.vae import Decoder, Encoder
finally:
    logging.disable(_disabled)

__all__ = ["Decoder", "Encoder"]
