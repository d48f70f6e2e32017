"""Figures: how features and predictions are scored."""
