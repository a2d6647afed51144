"""What processes that prepare data have in common."""

from __future__ import annotations

import multiprocessing
import os
import threading


def follow_parent() -> None:
  """Ends this worker with the process that started it, however that ended: it would wait for work for ever."""

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
