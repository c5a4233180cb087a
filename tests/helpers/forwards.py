"""Counts the policy's forward passes."""


def step_and_count(learner, transformer, monkeypatch):
    """Make the first update of a method; return the number of forward passes in it, and its metrics."""
    ran, forward = [], transformer.forward
    monkeypatch.setattr(transformer, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    batch = learner.batch_at(0)
    ran.clear()
    _, metrics = learner.step(batch)
    return len(ran), metrics
