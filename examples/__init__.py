"""Training loops of other libraries on a cache; each trains the digits student with kd."""

from teach_once.runtime.machine.torchvision_shim import import_torchvision

# Lightning and timm import torchvision, which needs this first with a CPU-only torch.
import_torchvision()
