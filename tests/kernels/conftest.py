"""What the tests of what runs across devices share."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))  # for `import topology`

import topology  # noqa: F401  sets what libtpu reads when it is loaded
