"""Sinks for a run's metrics, one file each; `runtime.track.Metrics` feeds the one that the config chose, on rank 0."""
