"""Documents, encoding, packing, mixing and batches: given its rank."""

import logging

# grain warns about a profiler of jax, which nothing here uses.
logging.getLogger("absl").addFilter(lambda record: "jax profiler" not in record.getMessage())
