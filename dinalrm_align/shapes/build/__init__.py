"""Training of the embedded world's networks from scratch, in resumable stages.

Each stage trains part of the pipeline in place; `recipes/build_shapes.py` runs them in order and saves the results.
"""
