"""Modules that stand in for libraries which only a GPU has."""
