"""Graphs in, smaller graphs out: one file, one scheme."""
