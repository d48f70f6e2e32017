"""Looking at a model: which of its tokens are artifacts, where they lie and from which block on."""
