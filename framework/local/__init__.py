"""Local units, plans, heads, objectives, and one file per method that puts them together.

A recipe's options are checked without PyTorch, which takes seconds to import. So the modules that define options
(``options``, ``units``, ``heads``, ``reconstruction``, ``lam``, and every method of this package) import PyTorch in
the functions that build something, and not at the top. A method of your own may do as it likes.
"""

from framework.config.method_options import Execution, MethodOptions
from framework.local.heads import Classifier, Projection
from framework.local.needs import Need
from framework.local.options import Asynchronous
from framework.local.units import LocalUnit, NetworkInfo, Plan, sliding_windows

__all__ = [
    "Asynchronous",
    "Classifier",
    "Execution",
    "LocalUnit",
    "MethodOptions",
    "Need",
    "NetworkInfo",
    "Plan",
    "Projection",
    "sliding_windows",
]
