"""From trained models to label maps: files, arrays, boxes, model archives."""
