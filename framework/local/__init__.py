"""Local units, plans, heads, objectives and the methods written in them."""

from framework.local.units import LocalUnit, Plan, ReadingHead, Task

__all__ = ["LocalUnit", "Plan", "ReadingHead", "Task"]
