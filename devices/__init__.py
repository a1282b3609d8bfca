"""What a board can do: one file, one product line."""
