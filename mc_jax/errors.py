"""The one error that bad input raises, and parts of its messages."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
  """A setting or an input that cannot work: the message names it and what would."""


def missing_package(what: str, package: str, extra: str) -> ConfigError:
  """The error for an optional package that is not installed.

  Args:
    what: The setting or file that needs the package.
    package: The package's name.
    extra: The extra of pyproject.toml that installs it. The package is not on an index: extras come from a clone.
  """
  return ConfigError(f"{what} needs the package {package}: pip install -e '.[{extra}]' in the clone of mc_jax")


def listed(names: Sequence[str], most: int = 8) -> str:
  """The first `most` names, separated by commas, and the number of further ones."""
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
