"""Running a plan: in one process by routing, and literally, for comparison."""

from framework.execution.routing import LocalNetwork

__all__ = ["LocalNetwork"]
