"""Programs on the durations of one prompt."""
