"""Training of the embedded world's networks from nothing, one file per stage, each on `loop.fit` and resumable.

Each stage trains a part of the pipeline in place; `recipes/build_shapes.py` runs them in order and saves the results.
"""
