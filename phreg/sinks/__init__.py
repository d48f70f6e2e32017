"""Sinks: the hidden units that cause artifact tokens, and how they are moved into registers."""
