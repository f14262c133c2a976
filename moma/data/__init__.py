"""Documents → encoded shards → micro-batches of one rank, without a process group."""

import logging

# grain warns about a profiler of jax, which nothing here uses.
logging.getLogger("absl").addFilter(lambda record: "jax profiler" not in record.getMessage())
