"""`phreg inspect`: a model looked at from all sides, as data, as a page and as a folder."""
