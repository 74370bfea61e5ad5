"""One process of a run."""
