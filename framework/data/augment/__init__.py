"""Views of an image (augmentation)."""
