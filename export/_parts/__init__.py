"""Modules that several families are built of."""
