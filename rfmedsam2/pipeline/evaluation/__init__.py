"""Scores of predictions, the report page, and the zero-shot prompt study."""
