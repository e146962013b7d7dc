"""Version of the package, written into every file that it makes."""

from __future__ import annotations

__version__ = "0.2.0"
