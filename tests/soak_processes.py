"""The long versions of test_process_churn.py and test_buffer_churn.py: until ten million pages have been reported of each.

``python tests/soak_processes.py [REPORTS]`` says what was reported, compared and lost, and fails at the first page that was.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from churners import Churning
from scribblers import KINDS, Scribbling

REPORTS = 10_000_000


def main() -> None:
    """Soak both."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else REPORTS
    for how in ("pause", "hold"):
        churning = Churning(random.randrange(1, 1 << 30), how)
        began = time.monotonic()
        churning.run(0, wanted // 2)
        print(f"another process: {churning}; {time.monotonic() - began:.0f} s", flush=True)
    for kinds in ([kind for kind in KINDS if kind != "hugetlb"], ["hugetlb", "plain"]):
        scribbling = Scribbling(kinds, random.randrange(1, 1 << 30))
        began = time.monotonic()
        scribbling.run(0, wanted if "thp" in kinds else wanted // 10)
        print(f"this process: {scribbling}; {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
