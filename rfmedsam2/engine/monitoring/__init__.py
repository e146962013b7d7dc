"""What a training says of itself: metrics, trackers, the time left."""
