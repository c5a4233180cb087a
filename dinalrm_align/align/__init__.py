"""Ways to align a policy to a reward, and the judgement of what came of it."""
