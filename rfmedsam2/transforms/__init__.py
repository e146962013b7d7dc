"""Array -> array: crop, resample, normalize, augment; each can be undone where undoing makes sense."""
