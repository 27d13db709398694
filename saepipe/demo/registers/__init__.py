"""The registers: each is a function that writes one document of its kind."""

from __future__ import annotations

from collections.abc import Callable

from saepipe.demo.grammar import Writer
from saepipe.demo.registers.code import code
from saepipe.demo.registers.formal import legal, letter
from saepipe.demo.registers.hebrew import hebrew
from saepipe.demo.registers.kitchen import recipe
from saepipe.demo.registers.narrative import poem, story
from saepipe.demo.registers.network import http, log
from saepipe.demo.registers.opinion import dialogue, review
from saepipe.demo.registers.reference import encyclopedia, sport, weather
from saepipe.demo.registers.science import arithmetic, dna
from saepipe.demo.registers.tables import csv, json

REGISTERS: dict[str, Callable[[Writer], None]] = {
    "story": story,
    "poem": poem,
    "recipe": recipe,
    "legal": legal,
    "letter": letter,
    "http": http,
    "log": log,
    "dna": dna,
    "arithmetic": arithmetic,
    "code": code,
    "hebrew": hebrew,
    "dialogue": dialogue,
    "review": review,
    "encyclopedia": encyclopedia,
    "weather": weather,
    "sport": sport,
    "json": json,
    "csv": csv,
}
"""Every register by name; `corpus.document` picks one uniformly."""
