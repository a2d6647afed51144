"""Worker processes that prepare data."""

from __future__ import annotations

import multiprocessing
import os
import threading


def follow_parent() -> None:
  """Ends this worker when its parent process ends; if the parent is killed, the worker would otherwise wait forever."""

  def follow() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
