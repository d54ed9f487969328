"""From a Flax model to a specification: record its run, read the graph, translate its parts."""
