"""Array -> array: crop, resample, normalise, augment; each can be undone where undoing makes sense."""
