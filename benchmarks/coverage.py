"""How often a 95 % bootstrap interval over a few seeds covers the true mean: the table of docs/compare.md.

python benchmarks/coverage.py
"""

import numpy as np

from turnwise.paired import bootstrap_interval

SEEDS = (3, 4, 5, 6, 8, 10, 15, 20)
SAMPLES = 1500
RARE = 0.2
"""The probability that a run collapses and loses 1; otherwise differences have a standard deviation of .1."""


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=n)


def collapsing(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mean 0: small differences, and now and then a run that is lost."""
    return rng.normal(0.0, 0.1, n) - (rng.random(n) < RARE) + RARE


def main() -> None:
    """Prints the shares of intervals that cover 0."""
    rng = np.random.default_rng(1)
    print(f"{'seeds':>8}  normal  one run in {1 / RARE:.0f} collapses")
    for n in SEEDS:
        covered = []
        for draw in (normal, collapsing):
            found = [bootstrap_interval(draw(rng, n).tolist()) for _ in range(SAMPLES)]
            covered.append(np.mean([interval.low <= 0 <= interval.high for interval in found]))
        print(f"{n:8}  {covered[0]:6.2f}  {covered[1]:.2f}", flush=True)


if __name__ == "__main__":
    main()
