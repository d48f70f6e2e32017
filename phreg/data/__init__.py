"""From images on disk to batches: sources, decoding, crops, sampling."""
