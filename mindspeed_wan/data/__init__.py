"""Clips and captions: annotations, decoding, transforms, order, loading, cached features."""
