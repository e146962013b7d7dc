"""Segmentation metrics: overlap and surface distances of volumes, boundary IoU of images."""
