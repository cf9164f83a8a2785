"""Make a great many hostile calls; see `hostile` for what they are and how they are judged.

    python tests/fuzz.py --calls 1000000 --seed 0 --backend cython
    python tests/fuzz.py --linear

The second makes calls of the linear head, see `hostile_linear`. A call depends on the seed and its
number alone. `--only 123` makes call 123 again.
"""

import argparse
import random
import sys
import traceback
import warnings

from support import hostile, hostile_linear
from tqdm import tqdm

import fastloss as fl


def trial(seed, number, backend, kind=hostile):
    """Make one call; a call in words and a complaint, or None."""
    rnd = random.Random(f"{seed} {number}")
    call = kind.draw(rnd)
    while call:
        try:
            complaint = kind.complaint(call, backend)
        except Exception:
            complaint = traceback.format_exc()
        if complaint:
            return f"{hostile.describe(call)}\n{complaint}"
        call = hostile.mutate(rnd, call) if rnd.random() < 0.1 else None
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="cython", choices=fl.available_backends())
    parser.add_argument("--linear", action="store_true", help="call the linear head")
    parser.add_argument("--only", type=int, help="make this one call")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many")
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.calls)
    if options.only is not None:
        numbers = [options.only]
    kind = hostile_linear if options.linear else hostile
    warnings.simplefilter("error")
    failures = 0
    for number in tqdm(numbers, unit=" calls", mininterval=1):
        report = trial(options.seed, number, options.backend, kind)
        if report:
            failures += 1
            again = f"--seed {options.seed} --backend {options.backend} --only {number}"
            again += " --linear" * options.linear
            tqdm.write(f"call {number} ({again}):\n{report}\n")
            if failures >= options.failures:
                break
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
