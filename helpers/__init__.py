"""The helpers behind the notebooks: one room a subject, and imports run one way.

    notebooks
      -> page, reasoning, cluster, evidence (claims, cost, results)
      -> training
      -> v3
      -> evidence.facts, checks

Each room's `__init__` says what lives there. Importing any of them comes through here
first, so this is the one place that may set how torch's threads behave: OpenMP reads
its environment once, when torch is loaded. A thread that waits spins 1,000 times and
then sleeps. With the default it spins for milliseconds, and two busy notebooks on two
cores stop each other almost completely.
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
