"""Local units, plans, heads, objectives and the methods written in them."""

from framework.local.units import LocalUnit, Plan, Task

__all__ = ["LocalUnit", "Plan", "Task"]
