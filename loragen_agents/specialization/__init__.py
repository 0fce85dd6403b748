"""From a registry to a specialised model: generated once, kept in memory and on disk."""
