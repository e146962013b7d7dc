"""Image datasets, COCO annotations, prompt files, image files and augmentation."""
