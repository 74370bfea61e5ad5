"""The optim shelf: learning-rate schedules and parameter groups, as plain functions."""
