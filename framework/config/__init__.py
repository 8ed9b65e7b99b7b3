"""Recipes: their schema, how they are composed, and how they are checked."""
