"""The ways to take a proximal step, behind one interface."""

__all__ = []
