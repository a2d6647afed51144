"""Marks that many tests share."""

import pytest


def slow(*values, **options):
  """`pytest.param` of a case that the fast tests leave out: see the marker's text in pyproject.toml."""
  return pytest.param(*values, marks=pytest.mark.slow, **options)
