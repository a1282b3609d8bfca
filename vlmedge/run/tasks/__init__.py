"""What a bundle can do: one file, one kind of task."""
