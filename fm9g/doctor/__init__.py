"""Checks before a run (`fm9g doctor`): packages, GPUs, limits of the machine, disk, and the network to node 0."""
