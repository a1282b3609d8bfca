"""The decode loop: prompts, cached reading, sampling and beam search; it knows no task."""
