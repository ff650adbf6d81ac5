"""Training loops of other people's making, on a cache: each trains the digits student with kd."""

from teach_once.runtime.machine.torchvision_shim import import_torchvision

# Lightning and timm import torchvision, which a CPU-only torch refuses unless this came first.
import_torchvision()
