"""Measuring samples: features, Frechet distance, precision and recall, the quality table."""
