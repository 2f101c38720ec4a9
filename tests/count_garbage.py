"""sockd whose workers say, on SIGUSR1, how many objects only the garbage collector can free.

count_garbage.py [options of sockd]
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sockd


class Worker(sockd.Worker):
    """A worker whose garbage nobody collects but to count it."""

    def run(self) -> int:
        gc.disable()
        return super().run()

    def report(self) -> None:
        self.log.write("info", f"{gc.collect()} objects of garbage, {len(self.sessions)} sessions")


if __name__ == "__main__":
    sockd.Worker = Worker
    sys.exit(sockd.main())
