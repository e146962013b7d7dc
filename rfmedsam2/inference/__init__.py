"""Network + array -> prediction: sliding window, volumes, export by slab."""
