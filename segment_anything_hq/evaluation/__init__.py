"""Evaluation: prompted masks, simulated clicks, COCO AP, latency, and the HTML report."""
