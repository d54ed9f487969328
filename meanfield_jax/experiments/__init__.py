"""Experiments that compare theory with measurement."""
