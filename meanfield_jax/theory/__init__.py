"""From a specification to order parameters, Fisher statistics and learning rates."""
