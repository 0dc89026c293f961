"""`ebbtide bench`: the machine's ceilings, then how near a model comes to them."""

from __future__ import annotations

from .plan import ModelArgument
from .run import Run
from .shared_options import with_shared_options

EPILOG = """Example: ebbtide bench ./model --depths 0,8192,32768"""


@with_shared_options
def bench(run: Run, model_argument: ModelArgument = None) -> None:
    """Measure prefill and decode at several depths, next to what the machine allows."""
    raise NotImplementedError
