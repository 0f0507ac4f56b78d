"""`ttrouting chat`: talk with a model, and turn strategies on and off between answers."""

from ttrouting.cli.chat.start import command

__all__ = ["command"]
