"""Tests against implementations that others wrote: optional, see docs/parity.md."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import oracles`
