"""Training the refiners: task, batches, simulated prompts, losses, default plans."""
