"""How labelled datasets lie on disk, and how they are read."""
