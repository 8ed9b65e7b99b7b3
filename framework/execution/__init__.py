"""Running a plan: in one process by routing gradients, and literally, for comparison."""

from framework.execution.local_network import LocalNetwork
from framework.execution.step_output import StepOutput

__all__ = ["LocalNetwork", "StepOutput"]
