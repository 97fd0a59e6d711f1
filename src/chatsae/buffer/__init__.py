"""The mixing buffer: activations leave in random order, each exactly once."""

from chatsae.buffer.mixer import Mixer, mix

__all__ = ["Mixer", "mix"]
