"""SAM 2 from the `sam2` package: built without its configuration files, batched over frames and objects."""
