"""The Fisher information matrix of a real network, and its spectrum by the Lanczos method."""
