"""Inference: text from a trained model, and the model as files for other programs.

`continuing` continues a prompt and prints the text. Its `Decoder`, in `generation`, prefills prompts and steps through
all continuations in one compiled loop, in which `sampling` draws the tokens; `text` turns these into text and finds
stops. `prompts` saves the cache of a prompt that was read, and loads it again. `export` writes a model as safetensors
and reads it back. The doors are mc_jax.generate and mc_jax.export.
"""

from mc_jax.inference.generation import NOTHING, Decoder, Request

__all__ = ["NOTHING", "Decoder", "Request"]
