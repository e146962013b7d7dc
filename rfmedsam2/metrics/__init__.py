"""How well masks agree: overlap, surface and boundary metrics of volumes and images."""
