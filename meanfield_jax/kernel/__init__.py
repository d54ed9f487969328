"""The kernel that is propagated through the layers, and the Gaussian expectations they need."""
