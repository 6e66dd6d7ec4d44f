"""Deliberately broken bridges, each with the check that must kill it."""
