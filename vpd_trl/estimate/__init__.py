"""What a training run needs, before it starts: memory of each GPU, operations and time."""

from .devices import DEVICES, Device
from .plan import ENGINES, Estimate, Plan, estimate, with_parts


__all__ = ["DEVICES", "ENGINES", "Device", "Estimate", "Plan", "estimate", "with_parts"]
