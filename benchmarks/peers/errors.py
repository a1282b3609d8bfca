"""What can go wrong."""

from __future__ import annotations

from pathlib import Path


class PeersError(Exception):
    """One line for the user: what is wrong, by name, and what to do."""


class Unavailable(Exception):
    """Why a side has no figures: a row's reason, and never the end of the run."""


def last_line(log: Path) -> str:
    """Return the last line of a log file that says something."""
    return last_words(log.read_text(encoding="utf-8", errors="replace"))


def last_words(text: str) -> str:
    """Return the last line of a text that says something, and not too much."""
    lines = text.splitlines()
    told = [" ".join(line.split()) for line in lines if line.strip(" -=|─│┕┙^~")]
    return told[-1][:300] if told else "it said nothing"
