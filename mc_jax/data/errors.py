"""The one error that bad input raises."""


class ConfigError(ValueError):
  """A setting or an input that cannot work: the message names it and what would."""
