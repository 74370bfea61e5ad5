"""From a run folder to processes. No torch, but in the job."""
