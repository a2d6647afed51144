"""Lets the tests import the reference beside them."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for `import mqar_statistics`
