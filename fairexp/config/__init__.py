"""From the command line to a frozen, checked run folder. No torch."""
