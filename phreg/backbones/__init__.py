"""Adapters: one per library, each answering `base.Backbone`'s questions about that library's vision transformers."""
