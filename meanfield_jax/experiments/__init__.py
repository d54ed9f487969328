"""Theory held against measurement."""
