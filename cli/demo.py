"""`ebbtide demo`: a story read by the built-in model in less memory than its pages need."""

from __future__ import annotations

from .run import Run
from .shared_options import with_shared_options

EPILOG = """Example: ebbtide demo"""


@with_shared_options
def demo(run: Run) -> None:
    """See a document answered from a quarter of the memory that it needs."""
    raise NotImplementedError
