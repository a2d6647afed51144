"""What the tests of the kernels share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for `import tpu_cases`
