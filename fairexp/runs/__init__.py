"""Reading run folders. No torch."""
