"""Adapters, one per library, which answer `base.Backbone`'s questions about its vision transformers."""
