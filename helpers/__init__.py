"""The helpers behind the notebooks: one room a subject, and imports run one way.

    notebooks
      -> page, reasoning, cluster, evidence (claims, cost, results)
      -> training
      -> v3
      -> evidence.facts, checks

Each room's `__init__` says what lives there. Importing any of them comes through here
first, so this is the one place that may set what torch reads from its environment once,
when it is loaded:

- GOMP_SPINCOUNT: a thread that waits spins 1,000 times and then sleeps. With the
  default it spins for milliseconds, and two busy notebooks on two cores stop each other
  almost completely.
- THP_MEM_ALLOC_ENABLE: large tensors lie in pages of 2 MB where Linux has them.
  Otherwise a training step takes 46,000 small pages from the kernel, which clears each
  of them: a tenth of the step.
"""

import os
import sys
import warnings

if "torch" in sys.modules and "GOMP_SPINCOUNT" not in os.environ:
    warnings.warn(
        "torch was imported before helpers, so its threads wait by spinning and two "
        "busy notebooks slow each other down. Import from helpers first.",
        stacklevel=2,
    )
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
