"""Tasks: from a model and a batch to a loss and metrics, found by the dotted name in `configs/task/`."""
