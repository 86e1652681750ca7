"""What at least two papers have in common. `shared` never imports `projects`."""

from shared import torchvision_cpu

torchvision_cpu.install()
