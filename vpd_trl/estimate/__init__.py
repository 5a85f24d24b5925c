"""What a training run needs, before it starts: memory of each GPU, operations and time."""

from .devices import DEVICES, Device
from .estimate import Estimate, estimate
from .plan import ENGINES, Plan


__all__ = ["DEVICES", "ENGINES", "Device", "Estimate", "Plan", "estimate"]
