"""What the tests across devices share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "memory"))  # for `import samples`
