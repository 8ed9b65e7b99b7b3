"""Running a plan: in one process by routing, and literally, for comparison."""

from framework.execution.local_network import LocalNetwork

__all__ = ["LocalNetwork"]
