"""Evaluation of predictions, report pages, and the zero-shot prompt study."""
