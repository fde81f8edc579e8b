"""Play seeds from the command line: ``python -m tests.simulation --seeds 0-499``."""

import argparse
import hashlib
import statistics
import sys
import time

from tests.simulation.play import play


def main() -> int:
    """Play a range of seeds; print the logs, or what failed and what it cost."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=main.__doc__)
    parser.add_argument("--seeds", default="0-499", help="one seed, or the first and the last (default: 0-499)")
    parser.add_argument("--log", action="store_true", help="print every step")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further seed after so long")
    options = parser.parse_args()
    first, _, last = options.seeds.partition("-")
    costs: list[float] = []
    failed, digest, began = 0, hashlib.sha256(), time.monotonic()
    for seed in range(int(first), int(last or first) + 1):
        if time.monotonic() - began > options.seconds:
            break
        start = time.process_time()
        story = play(seed)
        costs.append(time.process_time() - start)
        digest.update(str(story).encode())
        if options.log:
            print(story)
        if story.violation is not None:
            failed += 1
            print(f"seed {seed}: {story.violation}")
    middle, worst = statistics.median(costs) * 1000, max(costs) * 1000
    print(f"{len(costs)} seeds, {failed} failed; {middle:.0f} ms in the median, {worst:.0f} ms at most")
    print(f"sha256 of all steps: {digest.hexdigest()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
