"""What the tests of the memory share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import samples`
