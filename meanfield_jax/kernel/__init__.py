"""The state that travels through the layers, and the Gaussian expectations they take."""
