"""Training of one fold of a plan, from initial weights to validation and report."""
