"""Measuring a model before and after."""
