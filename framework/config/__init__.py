"""Recipes: their schema, how files and overrides compose to one, and how it is checked."""
