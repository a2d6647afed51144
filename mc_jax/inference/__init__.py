"""What is done with a trained model but for measuring it: generation, and export for other programs."""

from mc_jax.inference.generation import NOTHING, Decoder, Request

__all__ = ["NOTHING", "Decoder", "Request"]
