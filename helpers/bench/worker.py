"""A process that trains for as many seconds as each line of its input says.

It prints a line when it is ready, and then the steps per second of each turn.
"""

import sys
import time

from helpers.bench.transformers_rows import training_step
from helpers.v3 import DeepSeekV3, V3Config

import torch

SHAPE = (8, 129)  # sequences, tokens of one and its last target


def main() -> None:
    """Train on request until the input ends."""
    torch.manual_seed(0)
    config = V3Config.tiny(num_nextn_predict_layers=0)
    model = DeepSeekV3(config)
    step = training_step(model, model, torch.randint(1, config.vocab_size, SHAPE))
    step()
    print("ready", flush=True)
    for line in sys.stdin:
        end = time.perf_counter() + float(line)
        start = time.perf_counter()
        steps = 0
        while time.perf_counter() < end:
            step()
            steps += 1
        print(steps / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
