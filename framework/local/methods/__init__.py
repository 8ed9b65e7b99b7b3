"""One file per method. Each has ``Options``, with the published defaults, and ``plan(network, options)``.

A new method is a new file here; its name in a recipe is the file's. ``framework.config.methods`` finds it.
"""

from framework.config.methods import Method, load, names

__all__ = ["Method", "load", "names"]
