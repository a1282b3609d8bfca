"""This machine: its hardware, its name, its power and its energy."""
