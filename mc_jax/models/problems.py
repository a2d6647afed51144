"""Lines that say what is wrong with a configuration: each names the field, what it got and what would do."""

import math
from collections.abc import Iterator


def choices(prefix: str, config: object, **valid: tuple) -> Iterator[str]:
  """Fields whose values are not among the valid ones."""
  for field, names in valid.items():
    value = getattr(config, field)
    if value not in names:
      yield f"{prefix}.{field}={value!r} is not one of {', '.join(map(str, names))}"


def at_least(prefix: str, config: object, **smallest: float) -> Iterator[str]:
  """Fields whose values are too small; None is none."""
  for field, least in smallest.items():
    value = getattr(config, field)
    if value is not None and value < least:
      yield f"{prefix}.{field}={value} must be at least {least}"


def positive(prefix: str, config: object, *fields: str) -> Iterator[str]:
  """Fields whose values are not positive and finite; None is none."""
  for field in fields:
    value = getattr(config, field)
    if value is not None and not 0 < value < float("inf"):
      yield f"{prefix}.{field}={value} must be a positive number"


def indivisible(value: int, what: str, sizes: dict[str, int], *split_by: str) -> list[str]:
  """A line if axes of the mesh do not divide a value.

  Args:
    value: What is split, a number of rows, heads or columns.
    what: The field that says it, with its value: "model.heads=4".
    sizes: The size of every axis of the mesh.
    split_by: The axes that split it.
  """
  divisor = math.prod(sizes[axis] for axis in split_by)
  if value % divisor == 0:
    return []
  product = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in split_by)
  product += f" = {divisor}" if len(split_by) > 1 else ""
  return [
    f"{what} is not divisible by {product}: use a multiple of {divisor}, "
    f"or a mesh whose {' x '.join(split_by)} is one of {divisors(value, sizes)}"
  ]


def divisors(value: int, sizes: dict[str, int]) -> str:
  """The parts that a mesh of these devices can split a value into, for people."""
  most = math.gcd(value, math.prod(sizes.values()))
  return ", ".join(str(n) for n in range(1, most + 1) if most % n == 0)
