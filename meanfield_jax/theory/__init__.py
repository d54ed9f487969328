"""Mean-field theory: order parameters, Fisher statistics and learning rates of a network."""
