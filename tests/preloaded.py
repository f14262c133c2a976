"""What the process has imported from which ranks and commands are forked, lazy imports too."""

import gc

gc.disable()

import diffusers.models.autoencoders.vae  # noqa: E402, F401
import pytest  # noqa: E402, F401
import torch._dynamo  # noqa: E402
import torch.utils.tensorboard  # noqa: E402, F401
import vector_quantize_pytorch  # noqa: E402, F401

import moma.bench.synthetic  # noqa: E402
import moma.data.encode.prepare  # noqa: E402
import moma.evaluate.perplexity  # noqa: E402
import moma.plan.memory  # noqa: E402
import moma.train.chain  # noqa: E402, F401

# No garbage: the forked processes neither search nor copy it.
gc.freeze()
gc.enable()
