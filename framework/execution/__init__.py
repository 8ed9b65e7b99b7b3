"""Running a plan: in one process by routing gradients, and literally, for comparison."""

from framework.execution.local_network import LocalNetwork, StepOutput

__all__ = ["LocalNetwork", "StepOutput"]
