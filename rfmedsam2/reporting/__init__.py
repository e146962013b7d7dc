"""Training charts and self-contained HTML pages."""
