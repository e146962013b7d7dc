"""The published package's helpers by its module names: resizing, masks of everything, ONNX."""
