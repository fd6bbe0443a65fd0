"""What the choice of a step's rows costs: python tests/benchmarks/step_choice.py

For 10^4 to 10^7 rows: seconds of the first step of an epoch, which draws its permutation, of each later step (median), and the
memory that a rank keeps for it. The last line is the slope of a later step over the rows on log-log axes.
"""

from __future__ import annotations

import statistics
import time

import numpy as np

from steerlab.training import schedule

ROWS_PER_STEP = 64
STEPS = 100


def main() -> None:
    """Print the table."""
    sizes, later = [10**power for power in range(4, 8)], []
    for num_rows in sizes:
        schedule._order.cache_clear()
        seconds = []
        for step in range(STEPS):
            start_s = time.perf_counter()
            schedule.rows_of_step(num_rows, ROWS_PER_STEP, 0, step)
            seconds.append(time.perf_counter() - start_s)
        later.append(statistics.median(seconds[1:]))
        kept = schedule._order(num_rows, 0, 0)
        print(
            f"{num_rows:>10,} rows: first step {1000 * seconds[0]:.2f} ms, later ones {1e6 * later[-1]:.1f} us, "
            f"{kept.numel() * kept.element_size() / 1e6:.2f} MB"
        )
    print(f"exponent of a later step: {np.polyfit(np.log(sizes), np.log(later), 1)[0]:.2f}")


if __name__ == "__main__":
    main()
