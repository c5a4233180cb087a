"""The embedded world: a small SD3 pipeline trained on rendered shapes, with an oracle that scores generated images."""
